"""Which processes have the parts of sharded matrices, and which one makes them orthogonal: from shapes alone.

Every process of a mesh comes to the same answers, and none asks another. Processes are numbers here: their places in
the sorted list of a mesh's ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ..rule.orthogonal import Matrices


class Part(NamedTuple):
    """The part of a tensor that one process has: in each dimension, from where on and how much."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]


class Team(NamedTuple):
    """Processes that have the same matrices between them: of one parameter, and of every other that lies as it does."""

    shape: tuple[int, ...]  # of what they have together: whole matrices, in their order
    parts: Mapping[int, Part]  # by process; replicas have the same
    replicas: Mapping[int, tuple[int, ...]]  # by process: which replica it belongs to

    @property
    def is_whole(self) -> bool:
        """Whether each process has all of it, so that nothing need be exchanged."""
        return all(part.sizes == self.shape for part in self.parts.values())

    def beside(self, process: int) -> list[int]:
        """The processes of a process's own replica, which have everything between them, each part once."""
        return [other for other in self.parts if self.replicas[other] == self.replicas[process]]


class Mesh(NamedTuple):
    """A mesh as numbers."""

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]  # of its processes, sorted
    coordinates: tuple[tuple[int, ...], ...]  # of each

    @classmethod
    def of(cls, device_mesh: Any) -> Mesh:
        ranks = device_mesh.mesh.flatten().tolist()
        sizes = tuple(device_mesh.mesh.shape)
        places = sorted(range(len(ranks)), key=ranks.__getitem__)
        coordinates = (
            tuple(place // prod(sizes[dim + 1 :]) % size for dim, size in enumerate(sizes)) for place in places
        )
        return cls(sizes, tuple(sorted(ranks)), tuple(coordinates))


def why_not_dealt(placements: Sequence[Any], sizes: Sequence[int]) -> str | None:
    """Why nobody here can tell which part of a tensor each process has; None: it can be told."""
    for at, placement in enumerate(placements):
        kind = type(placement).__name__
        if placement.is_replicate() or kind == "Shard":
            continue
        if kind != "_StridedShard":
            return f"{placement!r} is not known"
        later = [size for size, other in zip(sizes[at + 1 :], placements[at + 1 :]) if _is_along(other, placement.dim)]
        if placement.split_factor != prod(later):
            return f"{placement!r} is not what FSDP makes of a parameter that is sharded already"
    return None


def part_of(shape: Sequence[int], mesh: Mesh, placements: Sequence[Any], process: int) -> Part:
    """The part of a tensor that a process has, as DTensor cuts it.

    Args:
        shape: of the whole tensor.
        placements: for which `why_not_dealt` has no objection.
    """
    starts, sizes = [0] * len(shape), list(shape)
    cuts = [(at, placement) for at, placement in enumerate(placements) if not placement.is_replicate()]
    in_turn = [cut for cut in cuts if type(cut[1]).__name__ == "Shard"]
    # FSDP cuts what tensor parallelism has cut before, although its dimension of the mesh comes first.
    in_turn += [cut for cut in reversed(cuts) if type(cut[1]).__name__ != "Shard"]
    for at, placement in in_turn:
        dim, size = placement.dim % len(shape), sizes[placement.dim]
        length = -(-size // mesh.sizes[at])  # the last ones have less, or nothing
        start = min(length * mesh.coordinates[process][at], size)
        starts[dim] += start
        sizes[dim] = min(length, size - start)
    return Part(tuple(starts), tuple(sizes))


def teams_of(shape: Sequence[int], matrices: Matrices, mesh: Mesh, placements: Sequence[Any]) -> list[Team]:
    """The teams of a parameter's processes.

    A dimension that only counts matrices, as that of experts, parts the processes into teams; so do heads, if no
    process has only a part of one.
    """
    # The dimension that the rows of the matrices are in.
    last = len(shape) - 2
    rows = last if matrices.columns == shape[-1] and shape[last] % max(matrices.rows, 1) == 0 else 0
    parts = [part_of(shape, mesh, placements, process) for process in range(len(mesh.ranks))]
    height = max(matrices.rows, 1)
    heads_are_whole = all(
        part.starts[rows] % height == 0 and part.sizes[rows] % height == 0 for part in parts if 0 not in part.sizes
    )
    if heads_are_whole:
        parts = [
            Part(
                (*part.starts[:rows], part.starts[rows] // height, 0, *part.starts[rows + 1 :]),
                (*part.sizes[:rows], part.sizes[rows] // height, height, *part.sizes[rows + 1 :]),
            )
            for part in parts
        ]
    counts = rows + heads_are_whole  # dimensions that count matrices
    inner = (*((height,) if heads_are_whole else (shape[rows],)), *shape[rows + 1 :])
    replicated = [at for at, placement in enumerate(placements) if placement.is_replicate()]
    members: dict[Part, dict[int, Part]] = {}
    for process, part in enumerate(parts):
        members.setdefault(Part(part.starts[:counts], part.sizes[:counts]), {})[process] = Part(
            (*(0 for _ in range(counts)), *part.starts[counts:]), part.sizes
        )
    return [
        Team(
            (*slab.sizes, *inner),
            of_team,
            {process: tuple(mesh.coordinates[process][at] for at in replicated) for process in of_team},
        )
        for slab, of_team in members.items()
    ]


def deal(teams: Sequence[Team], count: int, work: float, loads: list[float]) -> list[list[int]]:
    """The process that makes the matrices of a parameter orthogonal, for each team and each of ``count`` parameters.

    Each goes to the process that has the least to do so far.

    Args:
        work: of one matrix' element, in whatever unit.
        loads: what each process of the mesh has to do; brought up to date.
    """
    owners: list[list[int]] = []
    for team in teams:
        of_team = []
        for _ in range(count):
            owner = min(team.parts, key=lambda process: (loads[process], process))
            loads[owner] += work * prod(team.shape)
            of_team.append(owner)
        owners.append(of_team)
    return owners


class Run(NamedTuple):
    """Parts of equal sizes side by side along one dimension."""

    length: int  # how many
    part: Part  # the first
    dimension: int


def runs_of(parts: Sequence[Part]) -> list[Run]:
    """Parts in turn, with neighbours of equal sizes taken together; the empty ones are left out."""
    runs: list[Run] = []
    for part in parts:
        if 0 in part.sizes:
            continue
        dimension = _dimension_of_neighbours(runs[-1], part) if runs else None
        if dimension is None:
            runs.append(Run(1, part, 0))
        else:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1, dimension=dimension)
    return runs


def _dimension_of_neighbours(run: Run, part: Part) -> int | None:
    """The dimension along which a part is the next of a run; None: it is not."""
    if part.sizes != run.part.sizes:
        return None
    differing = [dim for dim, pair in enumerate(zip(part.starts, run.part.starts)) if pair[0] != pair[1]]
    if len(differing) != 1 or (run.length > 1 and differing[0] != run.dimension):
        return None
    dimension = differing[0]
    follows = part.starts[dimension] == run.part.starts[dimension] + run.length * part.sizes[dimension]
    return dimension if follows else None


def _is_along(placement: Any, dim: int) -> bool:
    return not placement.is_replicate() and placement.dim == dim
