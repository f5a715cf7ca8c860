"""The plan as Python sees it: which rows there are, and which of them a native backend may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..options.clip import ClipOptions
from ..tensors import is_dense, is_plain, is_sharded, local, same_strides

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Those that work on tensors of a device without waiting for it: they read and write numbers where they are.
DEVICE_BACKENDS = ("cuda", "triton")
NATIVE_BACKENDS = ("cpu", *DEVICE_BACKENDS)
_DLPACK_CODES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int16: (0, 16),  # the remainder of a split master weight
}
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}


class Row(NamedTuple):
    """One parameter of the plan."""

    group: int
    param: Tensor
    lr_scale: float
    weight_decay_scale: float
    native: bool
    clipped: bool  # takes part in clipping
    has_trust_ratio: bool  # takes part in trust ratios
    master: str | None  # state key of its master weight
    dtype: torch.dtype  # of the parameter, and
    device: torch.device  # where it was, when the plan was built
    name: str
    backend: str
    refused: str | None  # why no native backend takes it
    own_name: str | None  # where the group has names


# Index of a CUDA device, and addresses on it: loss scale, found_inf, global norm, non-finite flag, norms of its rows
# (float32 of shape [rows, 3]), norms that processes exchange (float64 of shape [rows, `NORMS` + 1]); 0: none.
DeviceScalars = tuple[int, int, int, int, int, int, int]

# Called before norms are used, to add up those of rows of which other processes have parts: with the norms of all rows,
# float64 of shape [rows, `NORMS`], or with the index of a CUDA device, for those of its rows. Returns the sum of
# squares over rows that it has set to 0, or what the device adds to that of `reduce`.
Exchange = Callable[[Any], float]
NORMS = 5  # `Norms` in csrc/prepare.h: sums, but for
GRAD_SQ, GRAD_MAX = 0, 1  # the second, a maximum


class Plan(Protocol):
    """What every plan does; see ``csrc/plan/plan.h``. `fused_optim._C.Plan` is the compiled one, `PythonPlan` reads in
    Python, `LaunchedPlan` launches Triton's kernels for the rows that one of them has read."""

    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> Sequence[tuple[int, str]] | None: ...

    def reduce(
        self,
        grad_scale: float,
        threads: int,
        clip: ClipOptions,
        scalars: Sequence[DeviceScalars] = (),
        exchange: Exchange | None = None,
        finds_inf: bool = False,
    ) -> float: ...

    def non_finite(self) -> bool: ...

    def run(
        self,
        grad_scale: float,
        threads: int,
        clip: ClipOptions,
        global_norm: float | None,
        scalars: Sequence[DeviceScalars] = (),
        exchange: Exchange | None = None,
    ) -> None: ...

    def captured(self) -> bool: ...

    def touched(self) -> list[Tensor]: ...

    def release(self) -> None: ...

    def norms(self) -> list[tuple[int, float, float, float]]: ...


def describe_tensor(
    tensor: Tensor,
) -> tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """Address, device type and index, type code and bits (DLPack's), shape, strides: for a torch without the
    DLPack C exchange API. None for a tensor that is not plain memory."""
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return None
    code, bits = _DLPACK_CODES.get(tensor.dtype, (0, 0))
    device = _DLPACK_DEVICES.get(tensor.device.type)
    if device is None:
        return None
    return (
        tensor.data_ptr(),
        device,
        tensor.device.index or 0,
        code,
        bits,
        tuple(tensor.shape),
        tensor.stride(),
    )


def current_stream(index: int) -> int:
    """The address of torch's stream on a CUDA device: for a torch without the DLPack C exchange API."""
    return torch.cuda.current_stream(index).cuda_stream


def why_not_native(param: Tensor, group: dict[str, Any], backend: str) -> str | None:
    """Why a parameter of this group cannot go through a native backend; None if it can."""
    if backend not in NATIVE_BACKENDS:
        return f"its backend is {backend}"
    if not is_plain(type(local(param))):
        kind = "a DTensor around a " if is_sharded(param) else "a "
        return f"it is {kind}{type(local(param)).__name__}, not plain memory"
    if param.dtype not in NATIVE_DTYPES:
        return f"its dtype is {param.dtype}"
    if group["differentiable"]:
        return "its group is differentiable"
    if param.layout != torch.strided or param.is_inference():
        return "it is an inference or a sparse tensor"
    if local(param).is_neg():
        return "it is a view whose negation is pending"
    if not is_dense(local(param)):
        return f"its strides {tuple(local(param).stride())} leave gaps in memory or overlap"
    return None


def why_refused(row: Row, kind: str) -> str:
    """Why the plan did not take a native row at this step, in words."""
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
        return "its state is not in plain memory"
    return "its memory cannot be read"
