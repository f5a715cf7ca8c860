"""Directions that are made orthogonal between the two passes of a step: where they lie, and what is done to them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from math import prod
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row import DTYPES, FIRST_STATE, Row
from ..rule.contract import Rule
from ..rule.hyperparameters import comparable
from ..rule.orthogonal import Iteration, kept_dtype, matrices_in_memory, orthogonalize_
from ..tensors import is_sharded, local
from .dealt import Dealt, Spread, exchange
from .read_groups import is_constant
from .teams import Mesh, Team, deal, part_of, teams_of, why_not_dealt


class Batch(NamedTuple):
    """Matrices of the same shape that are made orthogonal together, whatever their parameters' groups."""

    directions: Tensor  # [matrices, rows, columns]
    iteration: Iteration
    params: list[weakref.ref[Tensor]]  # of which they are

    def is_active(self) -> bool:
        """Whether one of the parameters has a gradient; directions of the others are of an earlier step, and nobody
        reads them."""
        return any((param := ref()) is not None and param.grad is not None for ref in self.params)


class Settings:
    """What the groups say of directions; no native plan reads it.

    Args:
        groups: the optimizer's.
        keys: of what they say.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
        self._keys = keys
        self._found = self._of(groups)
        self._said = list(map(comparable, self._found))
        self._constant = all(map(is_constant, self._found))

    def hold(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups still say the same."""
        found = self._of(groups)
        if self._constant and len(found) == len(self._found) and all(map(is_, found, self._found)):
            return True
        return list(map(comparable, found)) == self._said

    def _of(self, groups: Sequence[dict[str, Any]]) -> list[Any]:
        return [group.get(key) for group in groups for key in self._keys]


class Directions:
    """The directions of an optimizer's rows, side by side in one buffer a shape: those of native rows, and of all rows
    whose matrices several processes have parts of.

    Called as `Step.exchange` between the two passes: with the norms of the host's rows, or with the index of a device
    for the rows there.

    Args:
        batches: of the host, at None, and of each device, by its index.
        dealt: matrices of which other processes have parts, likewise.
        parts: where the directions of the latter lie, by the index of the row.
        iterations: what is done to each row's matrices.
    """

    def __init__(
        self,
        batches: Mapping[int | None, Sequence[Batch]],
        dealt: Mapping[int | None, Sequence[Dealt]],
        parts: Mapping[int, Tensor],
        iterations: Sequence[Iteration | None],
    ) -> None:
        self._batches, self.dealt, self.parts, self.iterations = batches, dealt, parts, iterations

    def __call__(self, norms: Any) -> float:
        index = norms if isinstance(norms, int) else None
        with torch.no_grad():
            for batch in self._batches.get(index, ()):
                if batch.is_active():
                    orthogonalize_(batch.directions, batch.iteration)
            exchange(self.dealt.get(index, ()))
        return 0.0

    def finish(self) -> None:
        """Exchange what no native plan has asked for: other processes wait for it."""
        for of_table in self.dealt.values():
            with torch.no_grad():
                exchange(of_table)

    @classmethod
    def of(cls, rows: Sequence[Row], groups: Sequence[dict[str, Any]], rule: Rule) -> Directions | None:
        """Make room for directions, and tell the rows where; None: there are none.

        ``groups``: with the optimizer's defaults in them.

        Raises:
            ValueError: a sharded parameter of which nobody can tell who has which part, or that autograd is to follow.
        """
        iterations: list[Iteration | None] = [None] * len(rows)
        alone: dict[tuple[torch.device, torch.dtype, tuple[int, int], Iteration], list[tuple[Row, int]]] = {}
        shared: dict[Spread, list[int]] = {}
        teams: dict[Spread, list[Team]] = {}
        for index, row in enumerate(rows):
            if row.matrices is None or 0 in row.param.shape:
                continue
            group = groups[row.group]
            row.direction_column = FIRST_STATE + len([*rule.tensor_state_names(group), *rule.state_names(group)])
            iteration = rule.iteration(group, row.matrices, row.dtype)
            iterations[index] = iteration
            dtype = kept_dtype(iteration.dtype, row.dtype)
            if is_sharded(row.param):
                sharded: Any = row.param
                mesh, placements, shape = sharded.device_mesh, sharded.placements, tuple(sharded.shape)
                spread = Spread(mesh, placements, shape, row.matrices, iteration, dtype, row.device)
                if spread not in teams:
                    check_spread(row, differentiable=bool(group.get("differentiable")))
                    teams[spread] = teams_of(shape, row.matrices, Mesh.of(mesh), placements)
                if not all(team.is_whole for team in teams[spread]):
                    shared.setdefault(spread, []).append(index)
                    continue
            part = local(row.param)
            if row.native and part.numel():
                in_memory = matrices_in_memory(part, row.matrices)
                assert in_memory is not None
                key = (row.device, dtype, (in_memory.rows, in_memory.columns), iteration)
                alone.setdefault(key, []).append((row, part.numel() // prod(key[2])))
        batches: dict[int | None, list[Batch]] = {}
        for (device, dtype, size, iteration), members in alone.items():
            count = sum(matrices for _, matrices in members)
            directions = torch.zeros(count, *size, dtype=dtype, device=device)
            place = directions.data_ptr()
            for row, matrices in members:
                row.direction_address, row.direction_dtype = place, DTYPES[dtype]
                place += matrices * prod(size) * directions.element_size()
            params = [row.param_ref for row, _ in members]
            batches.setdefault(_table_of(members[0][0]), []).append(Batch(directions, iteration, params))
        dealt, parts = _deal_out(rows, shared, teams)
        return cls(batches, dealt, parts, iterations) if batches or dealt else None


def check_spread(row: Row, *, differentiable: bool) -> None:
    """Refuse a sharded matrix that cannot be made orthogonal.

    Raises:
        ValueError: the text names the parameter and the remedy.
    """
    sharded: Any = row.param
    mesh, placements = Mesh.of(sharded.device_mesh), sharded.placements
    if all(placement.is_replicate() for placement in placements):
        return
    if differentiable:
        raise ValueError(
            f"{row.name} is sharded and its group is differentiable: autograd does not follow the exchange that makes "
            "its matrices orthogonal; leave differentiable out, or replicate the parameter"
        )
    reason = why_not_dealt(placements, mesh.sizes)
    rank = torch.distributed.get_rank()
    if reason is None and rank in mesh.ranks:
        expected = part_of(sharded.shape, mesh, placements, mesh.ranks.index(rank)).sizes
        found = tuple(local(sharded).shape)
        if found != expected:
            reason = f"this process has a part of shape {found}, not of shape {expected} as torch.chunk cuts"
    if reason is not None:
        raise ValueError(
            f"{row.name} is a DTensor with the placements {placements}, whose matrices cannot be brought together: "
            f"{reason}; redistribute it to Shard or Replicate"
        )


def _deal_out(
    rows: Sequence[Row], shared: Mapping[Spread, Sequence[int]], teams: Mapping[Spread, Sequence[Team]]
) -> tuple[dict[int | None, list[Dealt]], dict[int, Tensor]]:
    """The matrices of which several processes have parts, by `_table_of`; where each row's part lies, by its index."""
    dealt: dict[int | None, list[Dealt]] = {}
    parts: dict[int, Tensor] = {}
    loads: dict[Any, list[float]] = {}
    # The largest first, as the last ones then make up for what they have left uneven.
    for spread, indices in sorted(shared.items(), key=lambda item: -item[0].work() * prod(item[0].shape)):
        mesh, rank = Mesh.of(spread.mesh), torch.distributed.get_rank()
        load = loads.setdefault(spread.mesh, [0.0] * len(mesh.ranks))
        owners = deal(teams[spread], len(indices), spread.work(), load)
        if rank not in mesh.ranks:
            continue
        me = mesh.ranks.index(rank)
        team, of_team = next(pair for pair in zip(teams[spread], owners) if me in pair[0].parts)
        members = [rows[index] for index in indices]
        one = Dealt(members, spread, mesh, team, of_team, me)
        for index, row, part in zip(indices, members, one.parts):
            row.direction_address, row.direction_dtype = part.data_ptr() or one.address, DTYPES[spread.dtype]
            parts[index] = part
        dealt.setdefault(_table_of(members[0]), []).append(one)
    return dealt, parts


def _table_of(row: Row) -> int | None:
    """Which call of `Directions` a row waits for: None, that of the host, or that of a device, by its index."""
    return None if row.backend in ("cpu", "eager") else row.device.index or 0
