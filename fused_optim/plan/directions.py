"""Directions that are made orthogonal between the two passes of a step: where they lie, and what is done to them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row import DTYPES, FIRST_STATE, Row
from ..rule.contract import Rule
from ..rule.hyperparameters import comparable
from ..rule.orthogonal import Iteration, kept_dtype, matrices_in_memory, orthogonalize_
from ..tensors import local
from .read_groups import is_constant


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
    """The directions of an optimizer's native rows, side by side in one buffer a shape.

    Called as `Step.exchange` between the two passes: with the norms of the host's rows, or with the index of a device
    for the rows there.

    Args:
        batches: of the host, at None, and of each device, by its index.
    """

    def __init__(self, batches: Mapping[int | None, Sequence[Batch]]) -> None:
        self._batches = batches

    def __call__(self, norms: Any) -> float:
        with torch.no_grad():
            for batch in self._batches.get(norms if isinstance(norms, int) else None, ()):
                if batch.is_active():
                    orthogonalize_(batch.directions, batch.iteration)
        return 0.0

    @classmethod
    def of(cls, rows: Sequence[Row], groups: Sequence[dict[str, Any]], rule: Rule) -> Directions | None:
        """Make room for the directions of native rows, and tell the rows where; None: there are none.

        ``groups``: with the optimizer's defaults in them.
        """
        found: dict[tuple[torch.device, torch.dtype, tuple[int, int], Iteration], list[tuple[Row, int]]] = {}
        for row in rows:
            if row.matrices is None or not row.native or 0 in row.param.shape:
                continue
            iteration = rule.iteration(groups[row.group], row.matrices, row.dtype)
            dtype = kept_dtype(iteration.dtype, row.dtype)
            in_memory = matrices_in_memory(local(row.param), row.matrices)
            assert in_memory is not None
            key = (row.device, dtype, (in_memory.rows, in_memory.columns), iteration)
            found.setdefault(key, []).append((row, in_memory.batch))
        batches: dict[int | None, list[Batch]] = {}
        for (device, dtype, shape, iteration), members in found.items():
            count = sum(matrices for _, matrices in members)
            directions = torch.zeros(count, *shape, dtype=dtype, device=device)
            place = directions.data_ptr()
            for row, matrices in members:
                group = groups[row.group]
                row.direction_column = FIRST_STATE + len([*rule.tensor_state_names(group), *rule.state_names(group)])
                row.direction_address, row.direction_dtype = place, DTYPES[dtype]
                place += matrices * shape[0] * shape[1] * directions.element_size()
            index = None if members[0][0].backend == "cpu" else device.index or 0
            batches.setdefault(index, []).append(Batch(directions, iteration, [row.param_ref for row, _ in members]))
        return cls(batches) if batches else None
