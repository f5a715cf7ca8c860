"""What kind of memory a tensor is: plain, the part of a DTensor that this process has, or neither."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

# As `TensorKind` in csrc/plan/tensor_reader.h numbers them.
OTHER, PLAIN, SHARDED = range(3)


def is_plain(kind: type) -> bool:
    """Whether tensors of a type are plain memory: no ``__torch_dispatch__`` stands between them and their data."""
    return (
        issubclass(kind, Tensor)
        and not issubclass(kind, UninitializedTensorMixin)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def dtensor_type() -> Any:
    """``torch.distributed.tensor.DTensor``; None while nobody has imported it, and so nobody has one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def kind_of(kind: type) -> int:
    """What stands behind tensors of a type: nothing that the plan may read, plain memory, or a local tensor."""
    if kind is dtensor_type():
        return SHARDED
    return PLAIN if is_plain(kind) else OTHER


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor) is dtensor_type()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has: of a DTensor its local tensor, without a copy."""
    return cast(Tensor, tensor._local_tensor) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(param: Tensor, part: Tensor) -> Tensor:
    """A local part as a tensor that lies as ``param`` does."""
    if not is_sharded(param):
        return part
    sharded: Any = param
    return cast(
        Tensor,
        dtensor_type().from_local(
            part, sharded.device_mesh, sharded.placements, run_check=False, shape=param.shape, stride=param.stride()
        ),
    )


def same_placement(spec: Any, other: Any) -> bool:
    """Whether two DTensors of these specs have their elements in the same processes."""
    return bool(spec.mesh == other.mesh and spec.placements == other.placements and spec.shape == other.shape)
