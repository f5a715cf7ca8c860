"""What kind of memory a tensor is: plain, the part of a DTensor that this process has, or neither."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin, is_lazy  # type: ignore[attr-defined]

# As `TensorKind` in csrc/plan/tensor_reader.h numbers them.
OTHER, PLAIN, SHARDED = range(3)

_DLPACK_CODES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.int16: (0, 16),  # remainders of split master weights, and codes of 8-bit states
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
}
_DLPACK_DEVICES = {"cpu": 1, "cuda": 2}


def lasting() -> AbstractContextManager[Any]:
    """Where tensors are made that outlive the step: one that was made under ``torch.inference_mode()`` cannot be
    written outside of it."""
    return _outside_of_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _outside_of_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():  # the first alone would let autograd record
        yield


def is_plain(kind: type) -> bool:
    """Whether tensors of a type are plain memory: no ``__torch_dispatch__`` stands between them and their data."""
    return (
        issubclass(kind, Tensor)
        and not issubclass(kind, UninitializedTensorMixin)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def has_numbers(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor: a meta or fake one has a shape alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def plain_float(number: float | Tensor) -> float:
    """A number as Python's, waiting for its device; 0 for a tensor without numbers."""
    return float(number) if not isinstance(number, Tensor) or has_numbers(number) else 0.0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


# A tensor's shape and its strides.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def layout_of(tensor: Tensor) -> Layout | None:
    """None for a tensor that has no strides, or whose shape is not known yet."""
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return None
    return tuple(tensor.shape), tensor.stride()


def same_strides(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return is_same_order(tensor.stride(), other.stride(), tensor.shape)


def is_same_order(strides: Sequence[int], other: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether these strides give the elements of a tensor the same order.

    The stride of a dimension of size 1 says nothing: the gradient of a 1x1 convolution whose input is channels_last has
    another than the weight. Where there are no elements no stride says anything.
    """
    return strides == other or 0 in shape or all(a == b for a, b, size in zip(strides, other, shape) if size != 1)


WORD = 8  # bytes
TENSOR_IMPL = 256  # bytes at most; torch 2.13's has 192, and the key set at its end


class NegativeBit(NamedTuple):
    """Where a tensor's pending negation stands, as `NegativeBit` in csrc/plan/tensor_reader.h."""

    handle: int
    keys: int
    mask: int


@functools.cache
def negative_bit() -> NegativeBit | None:
    """Where the compiled plan finds whether a tensor's negation is pending (``is_neg()``); None: it must ask.

    A pending negation is a bit of the key set in torch's TensorImpl, the only fact about a tensor that DLPack does not
    tell. To ask costs a sixth of what a parameter may cost, so the bit is looked for once: in the word that is one
    number in all tensors of a mixed lot that answer True, and the same without one bit in all that answer False.
    """
    dtypes, shapes = (torch.float32, torch.bfloat16, torch.float64), ((), (2,), (1,) * 7)
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        lot = [torch.empty(shape, dtype=dtype, device="cpu") for dtype in dtypes for shape in shapes]
        for derive in (torch._neg_view, torch.detach, torch._neg_view, torch.squeeze, torch._neg_view):
            lot += map(derive, tuple(lot[-len(shapes) :]))
        answers = [tensor.is_neg() for tensor in lot]
    handles = range(0, Tensor.__basicsize__, WORD)
    handle = next((at for at in handles if all(word(id(tensor), at) == tensor._cdata for tensor in lot)), None)
    if handle is None:
        return None
    for keys in range(0, TENSOR_IMPL, WORD):
        words = {(answer, word(tensor._cdata, keys)) for answer, tensor in zip(answers, lot)}
        if len(words) == 2:
            (_, positive), (_, negative) = sorted(words)
            mask = positive ^ negative
            if mask.bit_count() == 1 and negative & mask:
                return NegativeBit(handle, keys, mask)
    return None


def word(address: int, offset: int) -> int:
    return ctypes.c_uint64.from_address(address + offset).value


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


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP's first kind has flattened a parameter: it is a flat one, or a view of one. With all of its
    strategies but one it is then a shard, and no DTensor that knows the whole."""
    return bool(getattr(param, "_fsdp_flattened", False))


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
        tensor.data_ptr() if has_memory(tensor) else 0,
        device,
        tensor.device.index or 0,
        code,
        bits,
        tuple(tensor.shape),
        tensor.stride(),
    )


# No process has memory below it: an address below is the offset of a view into a storage that was freed, or that of a
# tensor of no elements. 39-bit address spaces lie below it as a whole; there each tensor is asked.
LEAST_ADDRESS = 1 << 44


def has_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != 0


def current_stream(index: int) -> int:
    """The address of torch's stream on a CUDA device: for a torch without the DLPack C exchange API."""
    return torch.cuda.current_stream(index).cuda_stream


def make_room() -> None:
    """Give back the memory that torch's allocator holds and does not use, as torch does where there is none left.

    During a capture into a graph it cannot.
    """
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.empty_cache()
