"""The norms that a step has measured, for logging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .eager.parameter import MeasuredNorms
from .plan.plan import Plan, Row


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


def collect_norms(
    rows: Sequence[Row],
    plan: Plan | None,
    witnessed: Mapping[int, MeasuredNorms],
    measured: Mapping[torch.device, Tensor],
) -> Norms | None:
    """The norms of all rows that the last step measured, in their order; None if there are none."""
    found: dict[int, Tensor] = {}
    for index, norms in witnessed.items():
        device = rows[index].param.device
        found[index] = torch.stack([torch.as_tensor(norm, dtype=torch.float32, device=device) for norm in norms])
    for index, *numbers in plan.norms() if plan is not None else ():
        device = rows[index].param.device
        if device in measured:
            place = sum(row.native and row.param.device == device for row in rows[:index])
            found[index] = measured[device][place]
        else:
            found[index] = torch.tensor(numbers, dtype=torch.float32)
    if not found:
        return None
    first = found[min(found)].device
    table = torch.stack([found[index].to(first) for index in sorted(found)])
    names = tuple(rows[index].own_name or rows[index].name for index in sorted(found))
    return Norms(names, *table.unbind(1))
