"""torch's C shim, which the compiled plan asks about tensors: its functions, found and tried in the running torch."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row import DTYPES
from ..tensors import WORD, negative_bit, word

# aoti_torch_get_… in torch/csrc/inductor/aoti_torch/c/shim.h.
SHIM_FUNCTIONS = (
    "layout",
    "dtype",
    "device_type",
    "device_index",
    "dim",
    "storage_size",
    "data_ptr",
    "sizes",
    "strides",
)


class TensorShim(NamedTuple):
    """Functions of torch's C shim, by their addresses, as `TensorShim` in csrc/plan/tensor_reader.h."""

    handle: int  # where a Python object has its TensorImpl's address
    storage: int  # where that has its StorageImpl's: a hint for the caches, 0 if it is not found
    layout: int
    dtype: int
    device_type: int
    device_index: int
    dim: int
    storage_size: int
    data_ptr: int
    sizes: int
    strides: int
    strided: int  # torch's numbers for the layout, and
    cpu: int  # for devices
    cuda: int
    dtypes: bytes  # by torch's number of a dtype that of `row.DTYPES`, 0 for all others


@functools.cache
def tensor_shim() -> TensorShim | None:
    """Where the compiled plan asks about tensors: the C shim of torch's shared library, whose functions are stable.

    They take a tensor by the address of a word that holds its TensorImpl's, as every Python tensor has one. The answers
    are compared with what Python says of a mixed lot; None where one differs, or torch has no such function.
    """
    negative = negative_bit()
    if negative is None:
        return None
    try:
        library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # torch has loaded it
        functions = {name: getattr(library, f"aoti_torch_get_{name}") for name in SHIM_FUNCTIONS}
        dtypes = bytearray(64)
        for dtype, number in DTYPES.items():
            dtypes[getattr(library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()] = number
        numbers = {
            "strided": library.aoti_torch_layout_strided(),
            "cpu": library.aoti_torch_device_type_cpu(),
            "cuda": -1 if torch.version.hip is not None else library.aoti_torch_device_type_cuda(),
        }
    except (OSError, AttributeError, IndexError):
        return None
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}
    shim = TensorShim(handle=negative.handle, storage=0, dtypes=bytes(dtypes), **addresses, **numbers)
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        shapes = ((3,), (2, 3), (1, 4, 1, 5), (1,) * 7)
        lot = [torch.empty(shape, dtype=dtype, device="cpu") for dtype in DTYPES for shape in shapes]
        lot += [tensor.transpose(0, -1)[1:] for tensor in lot if tensor.shape[-1] > 1]
    words = range(0, negative.keys, WORD)
    storage = (at for at in words if all(word(one._cdata, at) == one.untyped_storage()._cdata for one in lot))
    shim = shim._replace(storage=next(storage, 0))
    return shim if all(_answers(functions, tensor, shim) for tensor in lot) else None


def _answers(functions: dict[str, Any], tensor: Tensor, shim: TensorShim) -> bool:
    """Whether the shim says of a CPU tensor what Python does."""

    def ask(name: str, kind: Any) -> Any:
        answer = kind()
        if functions[name](ctypes.c_void_p(id(tensor) + shim.handle), ctypes.byref(answer)) != 0:
            return None
        return answer.value if hasattr(answer, "value") else answer[: tensor.ndim]

    numbers = ctypes.POINTER(ctypes.c_int64)
    return (
        ask("layout", ctypes.c_int32) == shim.strided
        and ask("device_type", ctypes.c_int32) == shim.cpu
        and shim.dtypes[ask("dtype", ctypes.c_int32) or 0] == DTYPES[tensor.dtype]
        and ask("dim", ctypes.c_int64) == tensor.ndim
        and ask("storage_size", ctypes.c_int64) == tensor.untyped_storage().nbytes()
        and ask("data_ptr", ctypes.c_uint64) == tensor.data_ptr()
        and ask("sizes", numbers) == list(tensor.shape)
        and ask("strides", numbers) == list(tensor.stride())
    )
