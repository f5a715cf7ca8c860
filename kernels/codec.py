"""Numbers of a byte, and rounding by random words: the twin of csrc/codec.h, bit for bit.

A state's groups of 32 consecutive elements have a scale each, the exponent of a power of two, biased by 127. Only
products, IEEE's roots and integer operations take part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rule import square_root
from .table import DRAWN_BFLOAT16, DRAWN_FLOAT16, INT8, UINT8

GROUP = tl.constexpr(32)
# 1 / 127^2 and 1 / 254^2, rounded to float32.
MEAN_UNIT, ROOT_UNIT = (tl.constexpr(float.fromhex(f"0x1.040c2p-{power}")) for power in (14, 16))
# The least bits of a magnitude that is not finite, and how far they are from those of negative numbers.
NOT_FINITE, ABOVE_FINITE = tl.constexpr(0x7F800000), tl.constexpr(0x00800000)


def takes_words(dtypes: tuple[int, ...]) -> bool:
    """Whether columns of these storages are rounded by random words."""
    drawn = (INT8.value, UINT8.value, DRAWN_BFLOAT16.value, DRAWN_FLOAT16.value)
    return any(dtype in drawn for dtype in dtypes)


@triton.jit
def mix(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def random_key(seed, step, place):
    """What the random words of parameters at one step are made from."""
    return mix(mix(mix(seed.to(tl.uint32) + 0x9E3779B9) ^ step.to(tl.uint32)) ^ (place.to(tl.uint32) + 0x85EBCA6B))


@triton.jit
def random_words(key, first, i, COUNT: tl.constexpr):
    """The words of the elements `first + i` of a whole tensor; i: less than COUNT."""
    upper, begin = (first >> 32).to(tl.uint32), first.to(tl.uint32)
    lower = begin + i.to(tl.uint32)
    numbers = lower * 0x9E3779B9 + (key ^ mix(upper))
    if begin > 0xFFFFFFFF - COUNT:  # then the upper half of some places is one more
        numbers = tl.where(lower < begin, lower * 0x9E3779B9 + (key ^ mix(upper + 1)), numbers)
    return mix(numbers)


@triton.jit
def spread(of_groups, COUNT: tl.constexpr):
    """A number a group as a number an element."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(of_groups, 1), [COUNT // GROUP, GROUP]), [COUNT])


@triton.jit
def power_of_two(exponent):
    """2 to a biased exponent; 0 for 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(codes, exponents, DTYPE: tl.constexpr):
    """The float32 numbers of codes, and of the exponents of their groups."""
    power = spread(power_of_two(exponents.to(tl.int32)), codes.shape[0])
    f = codes.to(tl.float32)
    if DTYPE == UINT8:
        root = (f * f * ROOT_UNIT) * power
        return tl.where(codes == 255, float("inf"), root * root)
    else:
        return tl.where(codes == -128, float("nan"), (f * tl.abs(f) * MEAN_UNIT) * power)


@triton.jit
def encode(value, words, DTYPE: tl.constexpr):
    """Codes of float32 numbers, and the exponents of their groups."""
    IS_ROOT: tl.constexpr = DTYPE == UINT8
    LEVELS: tl.constexpr = 254 if IS_ROOT else 127
    FLOOR: tl.constexpr = 4
    LEAST: tl.constexpr = 127 - 51 if IS_ROOT else 127 - 112
    MOST: tl.constexpr = 127 + 63 if IS_ROOT else 127 + 126
    COUNT: tl.constexpr = value.shape[0]
    if IS_ROOT:
        magnitude = square_root(value)
        random = ((words >> 16) & 0xFFFC) + 2
    else:
        magnitude = tl.abs(value)
        random = (words & 0xFF00) | 0x80
    # Above those of the least number by 1; what is not finite wraps around to negative ones.
    bits = (magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF) + ABOVE_FINITE
    most = tl.maximum(tl.max(tl.reshape(bits, [COUNT // GROUP, GROUP]), 1), ABOVE_FINITE)
    exponents = tl.minimum(tl.maximum((most - 1) >> 23, LEAST), MOST)
    exponents = tl.where(most > ABOVE_FINITE, exponents, 0)
    inverse = spread(power_of_two(254 - exponents), COUNT)
    # In units of 2^-16 codes; the factor 65536 changes no rounding.
    y = square_root(magnitude * inverse) * (LEVELS * 65536.0)
    codes = tl.minimum((y.to(tl.int32) + random.to(tl.int32)) >> 16, LEVELS)
    if IS_ROOT:
        codes = tl.maximum(codes, tl.minimum(bits - ABOVE_FINITE, FLOOR))  # the least root is far above those bits
        return tl.where(bits < 0, 255, codes).to(tl.uint8), exponents.to(tl.uint8)
    else:
        codes = tl.where(value < 0, -codes, codes)
        return tl.where(bits < 0, -128, codes).to(tl.int8), exponents.to(tl.uint8)


@triton.jit
def narrow_stochastically(value, words, DTYPE: tl.constexpr):
    """Float32 numbers as they are stored in 16 bits: up or down, so that the mean over all random words is the
    number."""
    bits, random = value.to(tl.uint32, bitcast=True), (words * 0x9E3779B1) >> 16
    magnitude = bits & 0x7FFFFFFF
    if DTYPE == DRAWN_BFLOAT16:
        return tl.where(magnitude > NOT_FINITE, 0x7FC0, (bits + random) >> 16).to(tl.int16)
    else:
        normal = tl.minimum((magnitude - 0x38000000 + (random >> 3)) >> 13, 0x7C00)
        # A subnormal is a multiple of 2^-24.
        is_small = magnitude < 0x38800000
        scaled = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
        small = ((scaled * 65536.0).to(tl.int32).to(tl.uint32) + random) >> 16
        rounded = tl.where(is_small, small, normal)
        rounded = tl.where(magnitude > NOT_FINITE, 0x7E00 | ((magnitude >> 13) & 0x3FF), rounded)
        return (rounded | ((bits >> 31) << 15)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def widen_split8(param, remainder):
    """The master of 24 bits of a bfloat16 parameter and the upper 8 of the 16 bits that it lacks.

    A remainder counts as 0 beside zeros and beside what is not finite, where it could make a NaN.
    """
    upper = param.to(tl.uint32) << 16
    counts = (upper & 0x7FFFFFFF) - 1 < NOT_FINITE - 1
    return tl.where(counts, upper + (remainder.to(tl.uint32) << 8), upper).to(tl.float32, bitcast=True)


@triton.jit
def narrow_split8(value, words):
    """The bfloat16 parameter and the remainder of 8 bits of float32 numbers."""
    is_nan = value != value
    bits = value.to(tl.uint32, bitcast=True) + (words & 255)
    param = tl.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16)
    return param.to(tl.int16), tl.where(is_nan, 0, bits >> 8).to(tl.int8)
