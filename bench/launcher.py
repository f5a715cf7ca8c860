"""Times the host's part of Triton's steps: the refresh of the plan, and a launch; no GPU is needed.

Kernels are compiled for a GPU and launched at a driver that runs nothing (`offline.py`). The refresh in Python, which
serves where there is no compiled extension, stands beside the compiled one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.backends import extension

from .measure import row_of_pairs

ELEMENTS = 16  # of each tensor: only the host's cost is left
# By name: tensors and groups.
LAYOUTS = {
    "150 tensors, 1 group": (150, 1),
    "465 groups of 1 tensor": (465, 465),
    "1000 tensors, 50 groups": (1000, 50),
    "1500 tensors, 1 group": (1500, 1),
}
STEPS = 5  # in a block
LAUNCHES = 100


def _optimizer(tensors: int, groups: int, backend: str, compiled: bool = True) -> FusedOptimizer:
    """AdamW after a few steps; its plan is read through the extension or, if not ``compiled``, in Python."""
    params = [Parameter(torch.randn(ELEMENTS)) for _ in range(tensors)]
    optimizer = fused_optim.AdamW([{"params": params[i::groups]} for i in range(groups)], backend=backend)
    known = extension._C
    try:
        if not compiled:
            extension._C = None
        for _ in range(3):
            _change_grads(optimizer)
            optimizer.step()
    finally:
        extension._C = known
    return optimizer


def _change_grads(optimizer: FusedOptimizer) -> None:
    """The gradients of the step before last: other addresses than the last one's."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad, param.other_grad = getattr(param, "other_grad", None), param.grad
            if param.grad is None:
                param.grad = torch.ones(ELEMENTS)


def _refresh(optimizer: FusedOptimizer) -> Callable[[], None]:
    plan = optimizer.plan
    assert plan is not None

    def refresh() -> None:
        with torch._C.DisableTorchFunction():
            plan.native.refresh(optimizer.param_groups, optimizer.state)

    return refresh


def _seconds(call: Callable[[], Any], before: Callable[[], None], calls: int = STEPS) -> float:
    times = []
    for _ in range(calls):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _pairs(
    rounds: int, ours: FusedOptimizer, our_call: Callable[[], Any], other: FusedOptimizer, their_call: Callable[[], Any]
) -> list[tuple[float, float]]:
    return [
        (_seconds(our_call, lambda: _change_grads(ours)), _seconds(their_call, lambda: _change_grads(other)))
        for _ in range(rounds)
    ]


def _launches(rounds: int) -> dict[str, Any]:
    """One launch of apply, beside a small operation of torch's."""
    from fused_optim.kernels import apply

    optimizer = _optimizer(150, 1, "triton")
    ((_, _, phases),) = optimizer.plan.native._devices  # type: ignore[union-attr]
    layout, table = phases._layout, phases.table.live
    (bucket,) = layout.buckets
    number = torch.ones(ELEMENTS)

    def launch() -> None:
        for _ in range(LAUNCHES):
            phases._launch(
                apply.apply_kernel,
                len(bucket.tiles),
                *(table.words, 1, 150, bucket.tiles, table.records, table.control),
                UPDATE=bucket.rule.update,
                BACKWARDS=False,
                **bucket.constants,
            )

    def add() -> None:
        for _ in range(LAUNCHES):
            number.add_(1.0)

    seconds = [
        (_seconds(launch, lambda: None) / LAUNCHES, _seconds(add, lambda: None) / LAUNCHES) for _ in range(rounds)
    ]
    return row_of_pairs("one launch of apply", "tensor.add_(1.0)", "triton", seconds)


def time_launcher(rounds: int) -> list[dict[str, Any]]:
    """The figures of each case."""
    from .offline import pretend

    pretend("sm_90")
    rows = []
    for name, (tensors, groups) in LAYOUTS.items():
        in_python, compiled = (_optimizer(tensors, groups, "triton", kind) for kind in (False, True))
        seconds = _pairs(rounds, in_python, _refresh(in_python), compiled, _refresh(compiled))
        rows.append(row_of_pairs(f"refresh in Python, {name}", "compiled refresh", "triton", seconds))
        other = _optimizer(tensors, groups, "cpu")
        seconds = _pairs(rounds, compiled, compiled.step, other, other.step)
        rows.append(row_of_pairs(f"host's part of a step, {name}", "step of the cpu backend", "triton", seconds))
    return [*rows, _launches(rounds)]
