"""The rows of one step that the eager path takes, phase by phase beside the plan's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..options.clip import GLOBAL_NORM, NO_CLIP, NORM, VALUE, ClipOptions
from ..plan.directions import Directions
from ..plan.shards import Shards
from ..row import NORMS, Row
from ..rule.contract import Rule
from ..state.formats import scale_key
from ..tensors import has_numbers, is_sharded, local, plain_float
from .parameter import EagerStep, MeasuredNorms, Randomness, TensorNorms, step_eager
from .sparse import listed_rows


class EagerSteps:
    """Steps of single rows by torch operations; each waits in a phase for the norms of the whole tensor.

    Args:
        rule: the mathematics.
        rows: by their indices in the plan.
        groups: theirs, by index, with the optimizer's defaults in them.
        states: the optimizer's.
        clip: how gradients are clipped.
        grad_scale: what gradients are multiplied by.
        directions: where those are that are made orthogonal with the parts of other processes.
    """

    __slots__ = (
        "_clip",
        "_coalesced",
        "_groups",
        "_norms",
        "_parts",
        "_rows",
        "_rule",
        "_states",
        "_steps",
        "measured",
    )

    def __init__(
        self,
        rule: Rule,
        rows: Mapping[int, Row],
        groups: Mapping[int, dict[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        clip: ClipOptions,
        grad_scale: float,
        directions: Directions | None = None,
    ) -> None:
        self.measured: dict[int, MeasuredNorms] = {}  # of the rows that are done
        self._rule, self._rows, self._groups, self._states, self._clip = rule, rows, groups, states, clip
        self._parts: Mapping[int, Tensor] = {} if directions is None else directions.parts
        self._coalesced: dict[Tensor, Tensor] = {}  # sparse gradients, by parameter
        self._steps: dict[int, EagerStep] = {}
        self._norms: dict[int, TensorNorms] = {}
        try:
            for index, row in rows.items():
                grad = row.param.grad
                if grad is not None and grad.is_sparse:
                    self._coalesced[row.param] = grad.detach().coalesce()
                self._steps[index] = self._begin(index, row, grad_scale)
                self._advance(index, None)
        except BaseException:
            self.close()
            raise

    def squares(self, shards: Collection[Shards]) -> list[float]:
        """Of the gradients that take part in clipping, scaled; those among ``shards`` stand in the exchanged norms."""
        return [
            norms.sums()[0]
            for index, norms in self._norms.items()
            if self._rows[index].clipped and not any(index in table.positions for table in shards)
        ]

    def non_finite(self) -> bool:
        """Whether some gradient has an element that is infinite or NaN."""
        grads = (local(self._grad_of(self._rows[index])) for index in self._steps)
        return any(has_numbers(grad) and not torch.isfinite(grad).all() for grad in grads)

    def exchange(self, table: Tensor, shards: Shards) -> float:
        """Put the norms of the rows among ``shards`` into the table that is added up, and take them from it."""
        places = [(index, shards.positions[index]) for index in self._steps if index in shards.positions]
        for index, place in places:
            table[place, :NORMS] = torch.tensor(self._norms[index].sums(), dtype=table.dtype)
        sum_of_squares = shards.add_up(table)
        for index, place in places:
            self._norms[index] = TensorNorms.of_sums(table[place, :NORMS].tolist())
        return sum_of_squares

    def step(self, global_norm: float, shards: Collection[Shards]) -> None:
        """Take every row to its end; one whose direction other processes have parts of, to where it needs them."""
        for index in list(self._steps):
            coefficient = 1.0
            if self._rows[index].clipped and self._clip.kind in (GLOBAL_NORM, NORM):
                norm = global_norm if self._clip.kind == GLOBAL_NORM else plain_float(self._norms[index].grad_norm)
                coefficient = self._clip.coefficient(norm)
            self._advance(index, (self._norms[index], coefficient))
            waits = index in self._parts or any(index in table.positions for table in shards)
            if index in self._steps and not waits:
                self._advance(index, (self._norms[index], 1.0))

    def finish(self) -> None:
        """Take to their ends those that have waited for other processes' parts of their direction."""
        for index in list(self._steps):
            self._advance(index, (self._norms[index], 1.0))

    def close(self) -> None:
        """Let go of the gradients of rows that were begun and will not be stepped."""
        for step in self._steps.values():
            step.close()
        self._steps, self._norms, self._coalesced = {}, {}, {}

    def _advance(self, index: int, sent: tuple[TensorNorms, float] | None) -> None:
        try:
            with torch.set_grad_enabled(bool(self._groups[self._rows[index].group].get("differentiable"))):
                step = self._steps[index]
                self._norms[index] = next(step) if sent is None else step.send(sent)
        except StopIteration as done:
            if done.value is not None:
                self.measured[index] = done.value
            del self._steps[index], self._norms[index]

    def _begin(self, index: int, row: Row, grad_scale: float) -> EagerStep:
        group = self._groups[row.group]
        names = self._rule.state_names(group)
        columns = (*names, *filter(self._states.get(row.param, {}).__contains__, map(scale_key, names)))
        with self._tensors(row, columns if row.master is None else (*columns, row.master)) as (param, grad, state):
            measured = yield from step_eager(
                self._rule,
                group,
                param,
                grad,
                state,
                names,
                self._rule.tensor_state_names(group),
                has_trust_ratio=row.has_trust_ratio,
                lr_scale=row.lr_scale,
                weight_decay_scale=row.weight_decay_scale,
                grad_scale=grad_scale,
                clips=row.clipped and self._clip.kind in (GLOBAL_NORM, NORM),
                bounds=(self._clip.min, self._clip.max) if row.clipped and self._clip.kind == VALUE else None,
                master=row.master,
                matrices=row.matrices,
                exchanged=self._parts.get(index),
                randomness=self._randomness(row) if row.draws else None,
            )
        return measured

    def _randomness(self, row: Row) -> Randomness:
        coalesced = self._coalesced.get(row.param)
        listed = None if coalesced is None else coalesced._indices()[0]
        return Randomness(row.seed, row.place, row.first, row.counts, row.stochastic, listed)

    @contextmanager
    def _tensors(self, row: Row, columns: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """What the step reads and writes: of a DTensor this process's part, of a sparse gradient the listed rows."""
        param, grad, state = row.param, self._grad_of(row), self._states.get(row.param, {})
        coalesced = self._coalesced.get(param)
        if coalesced is not None:
            with listed_rows(param, coalesced, state, columns) as (listed, its_state):
                yield listed, grad, its_state
        elif is_sharded(param) and not self._groups[row.group].get("differentiable"):
            parts = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            yield local(param).detach(), local(grad), parts
            torch._C._increment_version([param])  # what was written is the part
        else:
            yield param, grad, state

    def _grad_of(self, row: Row) -> Tensor:
        """Its gradient; of a sparse one the rows that it lists."""
        coalesced = self._coalesced.get(row.param)
        grad = row.param.grad if coalesced is None else coalesced._values()
        assert grad is not None
        return grad


# The eager rows of a step in which the plan takes every row: there are none, and one object serves all such steps.
NO_STEPS = EagerSteps(Rule(), {}, {}, {}, NO_CLIP, 1.0)
