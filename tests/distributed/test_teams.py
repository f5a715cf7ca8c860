"""Who has which part of a sharded matrix, and who makes it orthogonal: torch's own answers, without a process."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from fused_optim.plan.teams import Mesh, Part, Run, deal, part_of, runs_of, teams_of, why_not_dealt
from fused_optim.rule.orthogonal import Matrices


def mesh_of(*sizes: int) -> Mesh:
    return Mesh(sizes, tuple(range(prod(sizes))), tuple(itertools.product(*map(range, sizes))))


class Ranks:
    """What `Mesh.of` asks of a DeviceMesh."""

    def __init__(self, ranks: list[list[int]]) -> None:
        self.mesh = torch.tensor(ranks)


def test_a_mesh_in_the_order_of_its_ranks() -> None:
    assert Mesh.of(Ranks([[7, 2, 5], [1, 4, 3]])) == Mesh(
        (2, 3), (1, 2, 3, 4, 5, 7), ((1, 0), (0, 1), (1, 2), (1, 1), (0, 2), (0, 0))
    )


@pytest.mark.parametrize("shape", [(16, 8), (9, 5), (3, 7), (1, 4), (5, 6, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("sizes", "placements"),
    [
        ((4,), (Shard(0),)),
        ((3,), (Shard(1),)),
        ((4,), (Shard(-1),)),
        ((2, 3), (Replicate(), Shard(0))),
        ((2, 3), (Shard(0), Shard(1))),
        ((3, 2), (Shard(0), Shard(0))),
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((2, 2, 2), (Replicate(), _StridedShard(1, split_factor=2), Shard(1))),
    ],
)
def test_parts_are_torchs(shape: tuple[int, ...], sizes: tuple[int, ...], placements: tuple[Any, ...]) -> None:
    mesh = mesh_of(*sizes)
    assert why_not_dealt(placements, sizes) is None
    positive = tuple(Shard(p.dim % len(shape)) if type(p) is Shard else p for p in placements)
    covered = torch.zeros(shape, dtype=torch.int64)
    for process, coordinate in enumerate(mesh.coordinates):
        part = part_of(shape, mesh, placements, process)
        local, offset = _compute_local_shape_and_global_offset(shape, sizes, list(coordinate), positive)
        assert part.sizes == tuple(local)
        if 0 not in part.sizes:
            assert part.starts == tuple(offset)
        covered[tuple(slice(start, start + size) for start, size in zip(*part, strict=True))] += 1
    replicas = prod(size for size, placement in zip(sizes, placements) if placement.is_replicate())
    assert torch.equal(covered, torch.full(shape, replicas))


@pytest.mark.parametrize(
    ("shape", "matrices", "placements", "sizes", "teams", "slab"),
    [
        ((16, 8), Matrices(1, 16, 8), (Shard(0),), (4,), 1, (16, 8)),
        ((8, 6, 5), Matrices(8, 6, 5), (Shard(0),), (4,), 4, (2, 1, 6, 5)),  # experts
        ((8, 6, 5), Matrices(8, 6, 5), (Shard(0), Shard(1)), (4, 2), 4, (2, 6, 5)),  # experts of rows
        ((8, 6, 5), Matrices(1, 8, 30), (Shard(0),), (4,), 1, (8, 6, 5)),  # flattened
        ((24, 5), Matrices(4, 6, 5), (Shard(0),), (4,), 4, (1, 6, 5)),  # a head each
        ((24, 5), Matrices(3, 8, 5), (Shard(0),), (4,), 1, (24, 5)),
        ((6, 4, 3, 3), Matrices(1, 6, 36), (Shard(1),), (2,), 1, (1, 6, 4, 3, 3)),
        ((4, 1, 9), Matrices(1, 4, 9), (Shard(0),), (2,), 1, (4, 1, 9)),  # flattened, and no batch
    ],
)
def test_teams(
    shape: tuple[int, ...],
    matrices: Matrices,
    placements: tuple[Any, ...],
    sizes: tuple[int, ...],
    teams: int,
    slab: tuple[int, ...],
) -> None:
    found = teams_of(shape, matrices, mesh_of(*sizes), placements)
    assert len(found) == teams
    assert found[0].shape == slab
    assert sum(prod(team.shape) for team in found) == prod(shape)
    for team in found:
        replica = team.beside(next(iter(team.parts)))
        assert sum(prod(team.parts[process].sizes) for process in replica) == prod(team.shape)
    assert all(team.is_whole for team in found) == (len(found) == prod(sizes))


def test_neighbours_are_taken_together() -> None:
    parts = [Part((start, 0), (min(3, max(0, 8 - start)), 5)) for start in (0, 3, 6, 9)]
    assert runs_of(parts) == [Run(2, parts[0], 0), Run(1, parts[2], 0)]
    squares = [Part((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]
    assert runs_of(squares) == [Run(2, squares[0], 1), Run(2, squares[2], 1)]
    assert runs_of([parts[0], parts[0]]) == [Run(1, parts[0], 0), Run(1, parts[0], 0)]


# The largest share of the products that one process has, and an even one; that of 48 matrices, measured.
@pytest.mark.parametrize(("processes", "uneven"), [(2, 1.0), (4, 1.0), (8, 1.03), (16, 1.1)])
def test_the_work_is_dealt_out_evenly(processes: int, uneven: float) -> None:
    """The matrices of GPT-2 small, whose blocks have four each."""
    mesh, loads = mesh_of(processes), [0.0] * processes
    for shape in ((3072, 768), (768, 3072), (2304, 768), (768, 768)):
        matrices = Matrices(1, *shape)
        small, large = sorted(shape)
        owners = deal(teams_of(shape, matrices, mesh, (Shard(0),)), 12, small * (2 * large + small) / large, loads)
        assert len(owners[0]) == 12
    assert max(loads) * processes / sum(loads) <= uneven


def test_what_torch_does_not_say_is_refused() -> None:
    assert "FSDP" in str(why_not_dealt((_StridedShard(0, split_factor=3), Shard(0)), (2, 2)))
    assert "FSDP" in str(why_not_dealt((_StridedShard(0, split_factor=2), Shard(1)), (2, 2)))
