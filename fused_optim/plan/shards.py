"""DTensor parameters (FSDP2, HSDP, tensor parallel): the part that this process has, and norms of the whole.

The plan works on local tensors and asks nothing of a DTensor but where its local tensor is and whether it lies as the
parameter does. What needs the whole tensor is its norms: `Shards` adds them up over the processes, those of all tensors
of a mesh in one collective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from ..row import GRAD_MAX, GRAD_SQ, NORMS, Row
from ..tensors import is_sharded, like, same_placement


def check_placement(param: Tensor, place: str) -> None:
    """Refuse a parameter of which no process has the values.

    Raises:
        ValueError: a placement is Partial; the text names the parameter.
    """
    for placement in getattr(param, "placements", ()):
        if placement.is_partial():
            raise ValueError(
                f"{place} is a DTensor with the placement {placement!r}: no process has its values, only a term of "
                "them; redistribute it to Shard or Replicate before it becomes a parameter"
            )


def refuse_flattened(place: str, what: str, way_out: str = "") -> NoReturn:
    """Refuse a parameter of FSDP1, a shard that is no DTensor, where ``what`` needs the norm of the whole tensor.

    Raises:
        ValueError: the text names both, and the remedy.
    """
    raise ValueError(
        f"{place} is flattened and cut up by FullyShardedDataParallel, and {what} needs the norms of whole tensors; "
        f"shard the model by torch.distributed.fsdp.fully_shard, whose DTensors know the whole{way_out}"
    )


def redistribute_grad(param: Tensor) -> str | None:
    """Bring the gradient of a DTensor to where its parameter is; None if it is there, else how it lay.

    ``param.grad`` is replaced by its equal: a Partial gradient by its sum, as torch's operations would at each use.
    """
    grad, sharded = cast(Any, param.grad), cast(Any, param)
    if not is_sharded(param) or grad is None:
        return None
    under_way = hasattr(grad._local_tensor, "wait")  # the result of a collective
    if same_placement(grad._spec, sharded._spec) and not under_way:
        return None
    lay = str(grad.placements)
    part = grad.redistribute(placements=sharded.placements)._local_tensor
    param.grad = like(param, part.wait() if hasattr(part, "wait") else part)
    return None if lay == str(sharded.placements) else lay


class MeshRows(NamedTuple):
    """The rows on one mesh that one table of norms has."""

    mesh: Any  # DeviceMesh
    groups: tuple[Any, ...]  # to reduce over, one after the other
    positions: Tensor  # of the rows in the table
    counted: Tensor  # whether this process's part of each counts: of replicas one does


class Shards:
    """The rows of one table of norms whose parameters are DTensors, by mesh.

    Every process of a mesh must have the same rows in the same order; `check_same_rows` compares them.

    Args:
        rows: all rows of the plan.
        positions: where the table has a row, by its index.
        device: where the table is.
        total_only: no rule and no clip asks for more than the sum of squares over all rows.
        takes_maximum: a rule asks for the largest magnitude.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        positions: Mapping[int, int],
        device: torch.device,
        *,
        total_only: bool,
        takes_maximum: bool,
    ) -> None:
        self._total_only = total_only
        self._takes_maximum = takes_maximum
        self.positions = {index: place for index, place in positions.items() if is_sharded(rows[index].param)}
        by_mesh: dict[Any, list[int]] = {}
        for index in self.positions:
            by_mesh.setdefault(cast(Any, rows[index].param).device_mesh, []).append(index)
        self._meshes = []
        for mesh, indices in by_mesh.items():
            placements = [cast(Any, rows[index].param).placements for index in indices]
            if any(not placement.is_replicate() for of_one in placements for placement in of_one):
                places = torch.tensor([self.positions[index] for index in indices], device=device)
                counted = torch.tensor([_counts(mesh, of_one) for of_one in placements], device=device)
                self._meshes.append(MeshRows(mesh, groups_of(mesh), places, counted))

    def __bool__(self) -> bool:
        return bool(self._meshes)

    def add_up(self, table: Tensor) -> float:
        """Replace the parts of norms in a table of float64 [rows, `NORMS` or more] by those of whole tensors.

        One collective a mesh, two where a maximum is wanted; where a mesh of several dimensions is not the world, that
        many for each dimension. Every process gets the same bits.

        Returns:
            The sum of squares over the rows that are 0 in the table now: where only the total counts, one number is
            exchanged for them all.
        """
        sum_of_squares = 0.0
        for mesh, groups, positions, counted in self._meshes:
            part = table[positions]
            part[~counted] = 0.0  # not a product: a NaN would stay one
            if self._total_only:
                total = part[:, GRAD_SQ].sum().to(mesh.device_type)
                for group in groups:
                    torch.distributed.all_reduce(total, group=group)
                table[positions] = 0.0
                sum_of_squares += total.item()
                continue
            maximum = part[:, GRAD_MAX].clone()
            part[:, GRAD_MAX] = maximum.isnan().to(part.dtype)  # a collective's maximum may lose a NaN
            part, maximum = part.to(mesh.device_type), maximum.to(mesh.device_type)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
                if self._takes_maximum:
                    torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=group)
            part[:, GRAD_MAX] = torch.where(part[:, GRAD_MAX] > 0, torch.nan, maximum)
            table[positions] = part.to(table.device)
        return sum_of_squares


class Exchange:
    """Adds up the norms of one step over the processes; `Step.exchange` of the plan.

    Args:
        shards: of each CUDA device and, at None, of the host.
        eager: the rows that the eager path steps take part: ``exchange(table, shards)`` puts theirs in.
        buffers: of each CUDA device.
        wants_total: the host asks for a device's sum of squares, and waits for it.
    """

    def __init__(
        self,
        shards: Mapping[torch.device | None, Shards],
        eager: Any,
        buffers: Sequence[Any],
        *,
        wants_total: bool,
    ) -> None:
        self._shards, self._eager, self._buffers, self._wants_total = shards, eager, buffers, wants_total

    def __call__(self, norms: Any) -> float:
        """Of the norms on the host, a buffer; or of those on a CUDA device, by its index."""
        if not isinstance(norms, int):
            if None not in self._shards:
                return 0.0
            table = torch.frombuffer(norms, dtype=torch.float64).view(-1, NORMS)
            return self._eager.exchange(table, self._shards[None])
        buffers = next(buffers for buffers in self._buffers if (buffers.device.index or 0) == norms)
        self._eager.exchange(buffers.exchanged, self._shards[buffers.device])
        clipped = [row.clipped for row in buffers.rows.values()]
        return float(buffers.exchanged[clipped, GRAD_SQ].sum()) if self._wants_total else 0.0


def check_same_rows(rows: Sequence[Row], rules: Sequence[str], agreed: str) -> str:
    """Compare the sharded rows of all processes of each mesh, unless they are those that were ``agreed``: a collective.

    Returns:
        What the processes agree on now.

    Raises:
        RuntimeError: they differ, on every process; the text names the first parameter that does.
    """
    by_mesh = signatures(rows, rules)
    digests = [hashlib.sha256("\n".join(lines).encode()).hexdigest() for lines in by_mesh.values()]
    if agreed == "".join(digests):
        return agreed
    for (mesh, lines), digest in zip(by_mesh.items(), digests):
        if len(set(_gather(digest, groups_of(mesh)))) > 1:
            refuse_different(mesh, lines)
    return "".join(digests)


def signatures(rows: Sequence[Row], rules: Sequence[str], iterations: Sequence[Any] = ()) -> dict[Any, list[str]]:
    """What must be the same in all processes of each mesh: a line a sharded row. ``iterations``: of each row."""
    by_mesh: dict[Any, list[str]] = {}
    for index, row in enumerate(rows):
        if is_sharded(row.param):
            iteration = f", {row.matrices}, {iterations[index]}" if iterations and row.matrices is not None else ""
            line = _signature(row, rules) + iteration
            by_mesh.setdefault(cast(Any, row.param).device_mesh, []).append(line)
    return by_mesh


def refuse_different(mesh: Any, lines: list[str]) -> NoReturn:
    """Find where the processes of a mesh differ: a collective.

    Raises:
        RuntimeError: on every process; the text names the first parameter that differs.
    """
    everyone = _gather((torch.distributed.get_rank(), lines), groups_of(mesh))
    first_rank, first = everyone[0]
    rank, others = next((rank, others) for rank, others in everyone if others != first)
    raise RuntimeError(_difference(mesh, first_rank, first, rank, others))


def _counts(mesh: Any, placements: Sequence[Any]) -> bool:
    coordinate = mesh.get_coordinate()
    return coordinate is not None and all(
        not placement.is_replicate() or place == 0 for placement, place in zip(placements, coordinate)
    )


def groups_of(mesh: Any) -> tuple[Any, ...]:
    """What to reduce over to reach all processes of a mesh; none for a process outside of it."""
    if mesh.get_coordinate() is None:
        return ()
    if mesh.ndim > 1 and sorted(mesh.mesh.flatten().tolist()) == list(range(torch.distributed.get_world_size())):
        return (torch.distributed.group.WORLD,)
    return tuple(mesh.get_group(dim) for dim in range(mesh.ndim))


def _gather(item: Any, groups: Sequence[Any]) -> list[Any]:
    """That of every process of a mesh, in one order for all of them."""
    items = [item]
    for group in groups:
        lists: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(lists, items, group=group)
        items = [one for several in lists for one in several]
    return items


def _signature(row: Row, rules: Sequence[str]) -> str:
    param: Any = row.param
    return (
        f"{row.name} of shape {tuple(param.shape)}, {param.dtype}, {param.placements}, rule {rules[row.group]}, "
        f"lr_scale {row.lr_scale!r}, weight_decay_scale {row.weight_decay_scale!r}, clipped {row.clipped}, "
        f"has_trust_ratio {row.has_trust_ratio}"
    )


def _difference(mesh: Any, rank: int, lines: list[str], other_rank: int, others: list[str]) -> str:
    place = next((i for i, pair in enumerate(zip(lines, others)) if pair[0] != pair[1]), min(len(lines), len(others)))
    here, there = (which[place] if place < len(which) else "nothing more" for which in (lines, others))
    return (
        f"the processes of {mesh} have different parameters in this optimizer: rank {rank} has {here}, rank "
        f"{other_rank} has {there}; build the optimizer from the same parameters in the same order everywhere"
    )
