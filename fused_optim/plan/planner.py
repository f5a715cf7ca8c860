"""Which plan an optimizer gets: the compiled one or the one in Python, and Triton's around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import extension
from ..tensors import kind_of, local, negative_bit, same_placement
from .plan import Plan, Row, current_stream, describe_tensor
from .python_plan import PythonPlan
from .triton_plan import LaunchedPlan, LaunchedRows


def make_plan(
    rows: list[Row],
    rules: list[str],
    groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    structural_keys: tuple[str, ...],
    trust_ratio: Callable[[dict[str, Any]], tuple[float, ...] | None] | None,
) -> Plan:
    """The compiled plan, or the one in Python; around it the launcher where rows are Triton's."""
    devices: dict[torch.device, list[int]] = {}
    for index, row in enumerate(rows):
        if row.native and row.backend == "triton":
            devices.setdefault(row.param.device, []).append(index)
    launched = list(devices.values())
    reader: Any
    if extension._C is not None and any(row.native for row in rows):
        reader = extension._C.Plan(
            rules=rules,
            rows=[tuple(row[:8]) for row in rows],
            launched=launched,
            defaults=defaults,
            structural=structural_keys,
            exchange_api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
            kind_of=kind_of,
            same_placement=same_placement,
            describe=describe_tensor,
            current_stream=current_stream,
            negative_bit=negative_bit(),
            trust_ratio=trust_ratio,
        )
    elif not launched:
        reader = PythonPlan(rows, len(groups))
    else:
        from ..kernels import phases
        from ..kernels.rules.trust_ratio import needs_of

        known = phases.rules()
        reader = PythonPlan(
            rows,
            len(groups),
            launched,
            {row.group: known[rules[row.group]] for row in rows if row.native and row.backend == "triton"},
            needs_of,
            defaults,
            structural_keys,
            trust_ratio,
        )
    if not launched:
        return reader
    from ..kernels import phases

    capturable = any(group.get("capturable", False) for group in groups)
    return LaunchedPlan(
        reader,
        [
            LaunchedRows(
                device,
                indices,
                phases.Phases(
                    device,
                    [rules[rows[index].group] for index in indices],
                    [local(rows[index].param).numel() for index in indices],
                    len(groups),
                    capturable,
                ),
            )
            for device, indices in devices.items()
        ],
        phases.Step,
    )
