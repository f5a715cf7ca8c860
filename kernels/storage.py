"""Number formats as bits: the twin of csrc/storage.h. Numbers of a byte are codec.py's.

bfloat16 is handled as 16-bit integers: its rounding is then the same on every device and in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import BFLOAT16, DRAWN_BFLOAT16, DRAWN_FLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, UINT8


@triton.jit
def pointer(address, DTYPE: tl.constexpr):
    """An address as a pointer to numbers of a storage."""
    if DTYPE == FLOAT32:
        return address.to(tl.pointer_type(tl.float32))
    elif DTYPE == FLOAT64:
        return address.to(tl.pointer_type(tl.float64))
    elif DTYPE == FLOAT16 or DTYPE == DRAWN_FLOAT16:
        return address.to(tl.pointer_type(tl.float16))
    elif DTYPE == INT8:
        return address.to(tl.pointer_type(tl.int8))
    elif DTYPE == UINT8:
        return address.to(tl.pointer_type(tl.uint8))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def widen(stored, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Stored numbers in the compute type."""
    if DTYPE == BFLOAT16 or DTYPE == DRAWN_BFLOAT16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return stored.to(COMPUTE)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """Numbers of the compute type as they are stored: rounded once, to nearest, ties to even."""
    if DTYPE == BFLOAT16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)
    elif DTYPE == FLOAT16:
        return value.to(tl.float32).to(tl.float16)
    else:
        return value


@triton.jit
def narrow_ties_away(value, DTYPE: tl.constexpr):
    """A parameter beside a master weight: bfloat16 to nearest, ties away from zero."""
    if DTYPE == BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        return tl.where(value != value, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16)
    else:
        return narrow(value, DTYPE)


@triton.jit
def widen_master(param, master, DTYPE: tl.constexpr):
    """The master where it still rounds to its parameter, elsewhere the parameter: it has been written since."""
    rounded = narrow_ties_away(master, DTYPE).to(tl.int16, bitcast=True)
    return tl.where(rounded == param.to(tl.int16, bitcast=True), master, widen(param, DTYPE, tl.float32))


@triton.jit
def widen_split(param, remainder):
    """The float32 master of which a bfloat16 parameter and a remainder are the halves.

    A remainder with which the parameter would make a NaN does not belong to it, and counts as 0.
    """
    upper = param.to(tl.int32) << 16
    whole = upper + remainder.to(tl.int32)
    return tl.where((whole & 0x7FFFFFFF) > 0x7F800000, upper, whole).to(tl.float32, bitcast=True)


@triton.jit
def remainder_of(value, param):
    """What the bfloat16 parameter, rounded from the float32 value, lacks of it."""
    difference = value.to(tl.int32, bitcast=True) - (param.to(tl.int32) << 16)
    return tl.where(value != value, 0, difference).to(tl.int16)


@triton.jit
def load_number(address, dtype):
    """One number at each address, float32 or float64 by its dtype, in float64; 0 at address 0."""
    wide = tl.load(address.to(tl.pointer_type(tl.float64)), mask=(address != 0) & (dtype == FLOAT64), other=0.0)
    narrow = tl.load(address.to(tl.pointer_type(tl.float32)), mask=(address != 0) & (dtype == FLOAT32), other=0.0)
    return tl.where(dtype == FLOAT64, wide, narrow.to(tl.float64))


@triton.jit
def load_any_number(address, dtype):
    """The same, 16-bit dtypes included."""
    half = tl.load(address.to(tl.pointer_type(tl.float16)), mask=(address != 0) & (dtype == FLOAT16), other=0.0)
    brain = tl.load(address.to(tl.pointer_type(tl.int16)), mask=(address != 0) & (dtype == BFLOAT16), other=0)
    brain = (brain.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    number = tl.where(dtype == FLOAT16, half.to(tl.float64), load_number(address, dtype))
    return tl.where(dtype == BFLOAT16, brain.to(tl.float64), number)


@triton.jit
def store_number(address, dtype, value, mask):
    """`load_number`'s opposite."""
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask=mask & (dtype == FLOAT64))
    tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=mask & (dtype == FLOAT32))
