"""Numbers of a byte, and rounding by random words: the arithmetic of 8-bit states in torch operations.

A state's groups of 32 consecutive elements have a scale each, the exponent of a power of two. Averages of gradients are
kept as int8, by the root of their magnitude; averages of squares as uint8, by their fourth root. Only products, IEEE's
roots and integer operations take part, so that csrc/codec.h gives the same bits.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ..rule.arithmetic import square_root

GROUP = 32
# The random word that rounds to nearest: for what is encoded outside of a step.
MIDDLE = 0x80008080
LIMIT = 1 << 32
_GOLDEN = 0x9E3779B9


class Code(NamedTuple):
    """How a magnitude x is written: `levels` times the root of x over the group's power of two."""

    levels: int
    floor: int  # the least code of what is not 0
    least: int  # the exponents that a group may have, biased by 127 as in a float32
    most: int

    @property
    def unit(self) -> float:
        """1 / levels^2, rounded to float32."""
        (rounded,) = struct.unpack("f", struct.pack("f", 1 / self.levels**2))
        return float(rounded)


MEAN = Code(levels=127, floor=0, least=-112 + 127, most=126 + 127)
ROOT = Code(levels=254, floor=4, least=-51 + 127, most=63 + 127)
NOT_A_NUMBER, INFINITE = -128, 255  # codes of what is not finite


def signed(word: int) -> int:
    """The int32 number of a 32-bit word."""
    word &= 0xFFFFFFFF
    return word - LIMIT if word >= 1 << 31 else word


def shifted(word: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int32 words."""
    return (word >> bits) & ((1 << (32 - bits)) - 1)


def mix(word: Tensor) -> Tensor:
    word = (word ^ shifted(word, 16)) * signed(0x7FEB352D)
    word = (word ^ shifted(word, 15)) * signed(0x846CA68B)
    return word ^ shifted(word, 16)


def random_key(seed: int, step: float | Tensor, place: int, device: torch.device) -> Tensor:
    """What the random words of one parameter at one step are made from: 0-d, int32.

    Args:
        seed: of the optimizer.
        step: the count of this step, 1 at the first.
        place: of the parameter among all parameters of the optimizer.
        device: of the key.
    """

    def word(number: int) -> Tensor:
        return torch.tensor(signed(number), dtype=torch.int32, device=device)

    # What is no number counts as 0, as in csrc/prepare.h.
    if isinstance(step, Tensor):
        count = step.nan_to_num(0, 0, 0).to(torch.int64).to(torch.int32)
    else:
        count = word(int(step) if math.isfinite(step) else 0)
    return mix(mix(mix(word(seed + _GOLDEN)) ^ count) ^ word(place + 0x85EBCA6B))


def random_words(index: Tensor, key: Tensor) -> Tensor:
    """A 32-bit word for each element, as int32; ``index``: int64, its place in the whole tensor."""
    upper = mix((index >> 32).to(torch.int32))  # 0 below 2^32
    return mix(index.to(torch.int32) * signed(_GOLDEN) + (key ^ upper))


def middle_words(like: Tensor) -> Tensor:
    return torch.full(like.shape, signed(MIDDLE), dtype=torch.int32, device=like.device)


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32)


def _power(exponent: Tensor) -> Tensor:
    """2 to an exponent that is biased by 127; 0 for 0."""
    return (exponent << 23).view(torch.float32)


def _encode(x: Tensor, code: Code, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of magnitudes [groups, GROUP], and the exponent of each group [groups, 1]; what is not finite counts as 0.

    ``random``: 16 bits an element, which are added below the code.
    """
    known = torch.where(x < float("inf"), x, torch.zeros_like(x))
    largest = known.amax(1, keepdim=True)
    exponent = ((_bits(largest) + 0x7FFFFF) >> 23).clamp(code.least, code.most)
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent))
    y = square_root(known * _power(254 - exponent)) * float(code.levels)
    levels = (((y * 65536).to(torch.int32) + random) >> 16).clamp_max(code.levels)
    levels = torch.where(known > 0, levels.clamp_min(code.floor), levels)
    return torch.where(exponent > 0, levels, torch.zeros_like(levels)), exponent


def encode(value: Tensor, dtype: torch.dtype, words: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a state and the exponents of its groups.

    Args:
        value: float32, of a shape whose rows along dimension 0 hold whole groups.
        dtype: ``torch.int8`` for an average of gradients, ``torch.uint8`` for one of squares.
        words: int32, a random word for each element.

    Returns:
        The codes, of the shape of ``value``, and the exponents, uint8, of `scale_shape`.
    """
    grouped, words = value.reshape(-1, GROUP), words.reshape(-1, GROUP)
    if dtype == torch.uint8:
        x = square_root(grouped)
        levels, exponent = _encode(x, ROOT, (shifted(words, 16) & 0xFFFC) + 2)
        levels = torch.where(x < float("inf"), levels, INFINITE)
    else:
        x = grouped.abs()
        levels, exponent = _encode(x, MEAN, (shifted(words, 8) & 255) * 256 + 128)
        levels = torch.where(x < float("inf"), torch.where(grouped < 0, -levels, levels), NOT_A_NUMBER)
    return levels.to(dtype).view(value.shape), exponent.to(torch.uint8).view(scale_shape(value.shape))


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    """The float32 numbers of a state's codes."""
    power = _power(exponents.reshape(-1, 1).to(torch.int32))
    grouped = codes.reshape(-1, GROUP)
    f = grouped.to(torch.float32)
    value = (f * f.abs() * (ROOT if codes.dtype == torch.uint8 else MEAN).unit) * power
    if codes.dtype == torch.uint8:
        value = torch.where(grouped == INFINITE, float("inf"), value * value)
    else:
        value = torch.where(grouped == NOT_A_NUMBER, float("nan"), value)
    return value.view(codes.shape)


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """The shape of a state's exponents: one a group, so that they can be sharded along dimension 0 like the codes."""
    row = 1
    for size in shape[1:]:
        row *= size
    return shape[0], row // GROUP


def round_stochastically(value: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Float32 numbers as bfloat16 or float16: up or down, so that the mean over all random words is the number."""
    bits, random = _bits(value), shifted(words * signed(0x9E3779B1), 16)
    nan = torch.isnan(value)
    if dtype == torch.bfloat16:
        rounded = shifted(bits + random, 16).to(torch.int16)
        return torch.where(nan, torch.full_like(rounded, 0x7FC0), rounded).view(torch.bfloat16)
    magnitude = bits & 0x7FFFFFFF
    # A float16 that is no subnormal keeps 10 of 23 bits; a subnormal is a multiple of 2^-24.
    normal = ((magnitude - 0x38000000 + shifted(random, 3)) >> 13).clamp_max(0x7C00)
    small = torch.where(magnitude < 0x38800000, value.abs(), torch.zeros_like(value)) * 2.0**24
    subnormal = ((small * 65536).to(torch.int32) + random) >> 16
    rounded = torch.where(magnitude < 0x38800000, subnormal, normal)
    rounded = torch.where(nan, 0x7E00 | ((magnitude >> 13) & 0x3FF), rounded)
    return (rounded | (shifted(bits, 31) << 15)).to(torch.int16).view(torch.float16)
