"""Directions of sharded matrices: brought together in one process each, made orthogonal there, and brought back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row import Row
from ..rule.orthogonal import Iteration, Matrices, orthogonalize_
from .teams import Mesh, Part, Run, Team, runs_of


def group_of(device_mesh: Any, mesh: Mesh) -> Any:
    """The process group of a whole mesh; None: there is none, as for several dimensions of a part of the world."""
    if device_mesh.ndim == 1:
        return device_mesh.get_group()
    is_world = mesh.ranks == tuple(range(torch.distributed.get_world_size()))
    return torch.distributed.group.WORLD if is_world else None


def all_to_all(
    received: Tensor, sent: Tensor, receives: list[int], sends: list[int], group: Any, ranks: Sequence[int]
) -> Sequence[Any]:
    """Send every process of a mesh its piece.

    Args:
        received, sent: the pieces in the order of the processes.
        receives, sends: their numbers of elements.
        group: of all of them; None: there is none.
        ranks: of all of them.

    Returns:
        What to wait for.
    """
    if group is not None:
        return [torch.distributed.all_to_all_single(received, sent, receives, sends, group=group, async_op=True)]
    # A new group would want all processes of the world, of which some may not have this optimizer.
    operations = []
    for rank, there, here in zip(ranks, received.split(receives), sent.split(sends)):
        if rank == torch.distributed.get_rank():
            there.copy_(here)
            continue
        operations += [torch.distributed.P2POp(torch.distributed.isend, here, rank)] if here.numel() else []
        operations += [torch.distributed.P2POp(torch.distributed.irecv, there, rank)] if there.numel() else []
    return torch.distributed.batch_isend_irecv(operations) if operations else []


class Spread(NamedTuple):
    """How matrices lie on a mesh, and what is to be done to them: alike, they are exchanged together."""

    mesh: Any  # DeviceMesh
    placements: tuple[Any, ...]
    shape: tuple[int, ...]  # of the whole parameter
    matrices: Matrices
    iteration: Iteration
    dtype: torch.dtype  # of the directions
    device: torch.device  # of this process's parts

    def work(self) -> float:
        """What one element costs, in multiplications of one polynomial of it."""
        small, large = sorted(self.matrices[1:])
        return small * (2 * large + small) / large


class Dealt:
    """The matrices of parameters that lie alike, and where this process has its parts of them.

    A step of theirs is `gather`, `orthogonalize` and `finish`. All processes of the mesh take part in each, in the same
    order, whether they have something of the matrices or not.

    Args:
        rows: of the parameters.
        spread: how they lie.
        mesh: on which.
        team: that of this process.
        owners: who makes the matrices of each parameter orthogonal.
        me: this process, by its place in the mesh.
    """

    def __init__(
        self, rows: Sequence[Row], spread: Spread, mesh: Mesh, team: Team, owners: Sequence[int], me: int
    ) -> None:
        self.is_active = False  # takes part in this step, and has not been exchanged yet
        self.device_mesh, self._team = spread.mesh, team
        self._group, self._ranks = group_of(spread.mesh, mesh), mesh.ranks
        self._size, self._iteration = (spread.matrices.rows, spread.matrices.columns), spread.iteration
        processes = range(len(mesh.ranks))
        counts = [owners.count(process) for process in processes]
        self._count = counts[me]
        size = prod(team.parts[me].sizes)
        own = team.beside(me)
        self._sends = [counts[process] * size if process in own else 0 for process in processes]
        self._receives = self._splits(processes, {process: team.parts[process] for process in own})
        self._gathered = runs_of([team.parts[process] for process in own])
        self._returns = self._splits(processes, team.parts)
        self._returned = runs_of(list(team.parts.values()))
        self._results = [count * size for count in counts]
        starts = [sum(self._results[:process]) for process in processes]
        self._sent = _adjacent((starts[process], length) for process, length in enumerate(self._sends) if length)
        # Side by side in the order of their owners, as both collectives have them; never without an address.
        memory = torch.zeros(max(sum(self._results), 1), dtype=spread.dtype, device=spread.device)
        self.address = memory.data_ptr()
        self._directions = memory[: sum(self._results)]
        order = sorted(range(len(rows)), key=lambda index: (owners[index], index))
        places = {index: memory[at * size : (at + 1) * size] for at, index in enumerate(order)}
        self._params = [row.param_ref for row in rows]
        self.parts = [places[index] for index in range(len(rows))]  # of each row, its elements in their order
        self._works: Sequence[Any] = []
        self._incoming = self._result = memory[:0]  # held while it is on its way

    def _splits(self, processes: Sequence[int], parts: Mapping[int, Part]) -> list[int]:
        return [self._count * prod(parts[process].sizes) if process in parts else 0 for process in processes]

    def has_gradients(self) -> bool:
        return any((param := ref()) is not None and param.grad is not None for ref in self._params)

    def activate(self, is_active: bool) -> None:
        """Take part in the step that begins, or not: all processes alike."""
        self.is_active = is_active
        for ref, part in zip(self._params, self.parts) if is_active else ():
            param = ref()
            if param is None or param.grad is None:  # in another process it may have one
                part.zero_()

    def gather(self) -> None:
        """Send the parts to the owners; the collective may still be under way."""
        pieces = [self._directions.narrow(0, start, length) for start, length in self._sent]
        sent = pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else self._directions[:0]
        sent = sent.to(self.device_mesh.device_type)
        self._incoming = sent.new_empty(sum(self._receives))
        self._works = all_to_all(self._incoming, sent, self._receives, self._sends, self._group, self._ranks)

    def orthogonalize(self) -> None:
        """Make the own matrices orthogonal and send the parts back; the collective may still be under way."""
        self._wait()
        outgoing = self._incoming
        if outgoing.numel() != sum(self._returns):  # replicas get parts that they have not sent
            outgoing = outgoing.new_empty(sum(self._returns))
        if self._count:
            whole = outgoing.new_empty(self._count, *self._team.shape)
            for part, block in _blocks(whole, self._incoming, self._gathered):
                part.copy_(block)
            orthogonalize_(whole.view(-1, *self._size), self._iteration)
            for part, block in _blocks(whole, outgoing, self._returned):
                block.copy_(part)
        self._result = self._directions
        if self._result.device.type != outgoing.device.type:
            self._result = outgoing.new_empty(self._directions.numel())
        self._incoming = outgoing
        self._works = all_to_all(self._result, outgoing, self._results, self._returns, self._group, self._ranks)

    def finish(self) -> None:
        """Wait until this process's parts are back."""
        self._wait()
        if self._result is not self._directions:
            self._directions.copy_(self._result)
        self._incoming = self._result = self._directions[:0]
        self.is_active = False

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []


def exchange(dealt: Sequence[Dealt]) -> None:
    """One step of the active ones: while the matrices of one shape are multiplied, those of the next are on their way.

    Two collectives for each, and none waits for the host.
    """
    active = [one for one in dealt if one.is_active]
    for one in active[:1]:
        one.gather()
    for one, following in zip(active, [*active[1:], None]):
        if following is not None:
            following.gather()
        one.orthogonalize()
    for one in active:
        one.finish()


def _adjacent(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces of one tensor, each where it starts and how long it is, with neighbours taken together."""
    found: list[tuple[int, int]] = []
    for start, length in pieces:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def _blocks(whole: Tensor, flat: Tensor, runs: Sequence[Run]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of matrices [count, ...] and of the parts that processes have of them, one after the other: the views that are
    the same numbers."""
    place, count = 0, whole.shape[0]
    for length, (starts, sizes), dimension in runs:
        part = whole
        for dim, (start, size) in enumerate(zip(starts, sizes)):
            part = part.narrow(dim + 1, start, size * length if dim == dimension else size)
        part = part.unflatten(dimension + 1, (length, sizes[dimension])).movedim(dimension + 1, 0)
        numel = length * count * prod(sizes)
        yield part, flat[place : place + numel].view(length, count, *sizes)
        place += numel
