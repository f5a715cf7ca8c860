"""The norms that a step has measured, for logging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .eager.parameter import MeasuredNorms
from .plan.built_plan import BuiltPlan


class Norms(NamedTuple):
    """Norms of the last step: the names of n parameters, and three float32 tensors of shape [n].

    A parameter without a name is named by its place. ``grad_norm`` is the L2 norm of the gradient, unscaled and
    clipped, before the trust ratio; ``param_norm`` that of the parameter before the step; NaN where the step did not
    need it. ``trust_ratio`` is 1 where there is none.
    """

    names: tuple[str, ...]
    grad_norm: Tensor
    param_norm: Tensor
    trust_ratio: Tensor


class LastStep:
    """What is known of the last step; read when the user asks.

    Args:
        plan: whose rows it stepped.
        eager: norms of the rows that the eager path stepped, by index.
        grad_norm: the global norm of the gradients; a tensor where a device has measured it; None: nobody asked.
    """

    __slots__ = ("_eager", "_grad_norm", "_plan")

    def __init__(self, plan: BuiltPlan, eager: Mapping[int, MeasuredNorms], grad_norm: float | Tensor | None) -> None:
        self._plan, self._eager, self._grad_norm = plan, eager, grad_norm

    def grad_norm(self) -> Tensor | None:
        """The global norm of the gradients as a tensor of its own: the next step writes the device's again."""
        if isinstance(self._grad_norm, Tensor):
            return self._grad_norm.clone()
        return None if self._grad_norm is None else torch.tensor(self._grad_norm, dtype=torch.float32)

    def norms(self) -> Norms | None:
        """The norms of all rows that the step measured, in their order; None if there are none."""
        rows, found = self._plan.rows, dict(self._plan.measured())
        for index, norms in self._eager.items():
            device = rows[index].device
            found[index] = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=device) for norm in norms])
        if not found:
            return None
        first = found[min(found)].device
        table = torch.stack([found[index].to(first) for index in sorted(found)])
        names = tuple(rows[index].own_name or rows[index].name for index in sorted(found))
        return Norms(names, *table.unbind(1))


def global_norm(squares: list[float]) -> float:
    """The root of a sum that is rounded once."""
    return math.sqrt(math.fsum(squares) if all(map(math.isfinite, squares)) else sum(squares))
