"""Rows that the plan cannot step as they are: refused, or made ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backends.choice import FallbackLog
from ..options.options import Options
from ..row import Row
from ..rule.contract import Rule
from ..state import states
from ..tensors import lasting
from .shards import redistribute_grad


def make_ready(
    rows: Sequence[Row],
    groups: Mapping[int, dict[str, Any]],
    all_states: dict[Tensor, Any],
    rule: Rule,
    options: Options,
    defaults: dict[str, Any],
    log: FallbackLog,
) -> None:
    """Create states, and bring states and gradients into the shape that the plan reads. First all rows are checked.

    Args:
        rows: those that the plan has reported.
        groups: theirs, by index, with the optimizer's defaults in them.

    Raises:
        RuntimeError, TypeError, ValueError: what cannot be used; the text names it, and nothing has changed.
    """
    for index, group in groups.items():
        rule.check_group(index, group, defaults)
        rule.trust_ratio(group)  # which has limits of its own
    for row in rows:
        states.check_grad(row, groups[row.group], rule, options)
        states.check_state(row, all_states.get(row.param), groups[row.group], rule)
    taken: dict[int, Tensor] = {}
    for row in rows:
        lay = redistribute_grad(row.param)
        if lay is not None:
            log.once(
                "placement",
                "%s: the gradient of %s lay as %s, and was redistributed to where the parameter is",
                row.name,
                lay,
            )
        with lasting():
            replaced = states.repair_state(row, all_states, groups[row.group], rule, options, taken)
        for key, reason in replaced:
            log.once(reason, "%s: the step goes on with a copy of state %r of %s, which %s", key, row.name, reason)
