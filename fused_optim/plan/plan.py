"""The plan as Python sees it, and which rows a native backend may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..row import Row
from ..rule.orthogonal import Matrices, matrices_in_memory
from ..tensors import is_dense, is_plain, is_sharded, local, same_strides
from .step import Step

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Backends that work on tensors of a device without waiting for it: they read and write numbers where they are.
DEVICE_BACKENDS = ("cuda", "triton")
NATIVE_BACKENDS = ("cpu", *DEVICE_BACKENDS)


class Plan(Protocol):
    """What every plan does; see ``csrc/plan/plan.h``. `fused_optim._C.Plan` is the compiled one, `PythonPlan` reads in
    Python, `TritonPlan` launches Triton's kernels for the rows that one of them has read."""

    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> Sequence[tuple[int, str]] | None: ...

    def reduce(self, step: Step) -> float: ...

    def non_finite(self) -> bool: ...

    def apply(self, step: Step) -> None: ...

    def release(self) -> None: ...

    def captured(self) -> bool: ...

    def written(self) -> list[Tensor]: ...

    def norms(self) -> list[tuple[int, float, float, float]]: ...


def why_not_native(param: Tensor, group: dict[str, Any], backend: str, matrices: Matrices | None) -> str | None:
    """Why a parameter of this group cannot go through a native backend; None if it can.

    ``matrices``: those that it is, if its direction is made orthogonal.
    """
    if backend not in NATIVE_BACKENDS:
        return f"its backend is {backend}"
    if not is_plain(type(local(param))):
        kind = "a DTensor around a " if is_sharded(param) else "a "
        return f"it is {kind}{type(local(param)).__name__}, not plain memory"
    if param.dtype not in NATIVE_DTYPES:
        return f"its dtype is {param.dtype}"
    if group.get("differentiable"):
        return "its group is differentiable"
    if param.layout != torch.strided or param.is_inference():
        return "it is an inference or a sparse tensor"
    if local(param).is_neg():
        return "it is a view whose negation is pending"
    if not is_dense(local(param)):
        return f"its strides {tuple(local(param).stride())} leave gaps in memory or overlap"
    if matrices is not None and not lies_as_matrices(param, matrices):
        return f"its strides {tuple(local(param).stride())} part the numbers of a matrix that is made orthogonal"
    return None


def lies_as_matrices(param: Tensor, matrices: Matrices) -> bool:
    """Whether a direction written in the order of a parameter's memory is matrices, or parts of them."""
    if is_sharded(param) and not all(placement.is_replicate() for placement in param.placements):  # type: ignore[attr-defined]
        return local(param).is_contiguous()
    return matrices_in_memory(local(param), matrices) is not None


def why_refused(row: Row, kind: str, state: Mapping[str, Any], numbers: Sequence[str]) -> str:
    """Why the plan did not take a native row at this step, in words.

    ``state``: that of its parameter; ``numbers``: the names of the rule's states that have one number a tensor.
    """
    param, grad = local(row.param), row.param.grad
    if kind == "grad" and grad is not None:
        grad = local(grad)
        if grad.is_sparse:
            return "its gradient is sparse"
        if not is_plain(type(grad)):
            return f"its gradient is a {type(grad).__name__}, not plain memory"
        if not same_strides(grad, param):
            return f"its gradient has strides {grad.stride()}, the parameter {param.stride()}"
        if grad.dtype != param.dtype:
            return f"its gradient has dtype {grad.dtype}, the parameter {param.dtype}"
        return "its gradient is a view whose negation is pending, or has no memory"
    if kind == "overlap":
        return "it shares memory with another parameter of this optimizer"
    if kind == "state":
        dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(numbers, (torch.float32, torch.float64))
        if row.counts:
            dtypes["step"] = (torch.float32,)
        reasons = (why_state_refused(name, value, param, dtypes.get(name)) for name, value in state.items())
        return next(filter(None, reasons), "its state is not in plain memory")
    return "its memory cannot be read"


def why_state_refused(
    name: str, state: Any, param: Tensor, dtypes_of_number: tuple[torch.dtype, ...] | None
) -> str | None:
    """Why the plan did not take a state that is in plain memory; None if that is not the one, or something else.

    ``dtypes_of_number``: which it may have, if it is one number a tensor.
    """
    part = local(state) if isinstance(state, Tensor) else None
    if part is None or not is_plain(type(part)) or part.layout != torch.strided:
        return None
    if part.is_neg():
        return f"its state {name!r} is a view whose negation is pending"
    if dtypes_of_number is not None and part.dtype not in dtypes_of_number:
        return f"its state {name!r} has dtype {part.dtype}, not {' or '.join(map(str, dtypes_of_number))}"
    if part.shape == param.shape and not same_strides(part, param):
        return f"its state {name!r} has strides {part.stride()}, the parameter {param.stride()}"
    return None
