"""The arithmetic of kernels/codec.py on tensors: each kernel is one program, of as many elements as a power of two."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fused_optim.kernels import codec
from fused_optim.kernels.codec import decode as to_numbers
from fused_optim.kernels.codec import encode as to_codes
from fused_optim.kernels.codec import narrow_split8, narrow_stochastically, random_key, random_words, widen_split8
from fused_optim.kernels.refresh import _quiet
from fused_optim.kernels.table import DRAWN_BFLOAT16, DRAWN_FLOAT16, INT8, UINT8
from torch import Tensor

GROUP = codec.GROUP
DTYPES = {torch.int8: INT8, torch.uint8: UINT8, torch.bfloat16: DRAWN_BFLOAT16, torch.float16: DRAWN_FLOAT16}


@triton.jit
def decode_kernel(codes, exponents, out, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    i, groups = tl.arange(0, COUNT), tl.arange(0, COUNT // GROUP)
    tl.store(out + i, to_numbers(tl.load(codes + i), tl.load(exponents + groups), DTYPE))


@triton.jit
def encode_kernel(values, words, codes, exponents, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    i, groups = tl.arange(0, COUNT), tl.arange(0, COUNT // GROUP)
    found, of_groups = to_codes(tl.load(values + i), tl.load(words + i).to(tl.uint32), DTYPE)
    tl.store(codes + i, found)
    tl.store(exponents + groups, of_groups)


@triton.jit
def round_kernel(values, words, out, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    rounded = narrow_stochastically(tl.load(values + i), tl.load(words + i).to(tl.uint32), DTYPE)
    tl.store(out + i, rounded.to(tl.int16, bitcast=True))


@triton.jit
def split8_kernel(values, words, params, remainders, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    param, remainder = narrow_split8(tl.load(values + i), tl.load(words + i).to(tl.uint32))
    tl.store(params + i, param)
    tl.store(remainders + i, remainder)


@triton.jit
def whole8_kernel(params, remainders, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, widen_split8(tl.load(params + i), tl.load(remainders + i)))


@triton.jit
def words_kernel(seed, step, place, first, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    key = random_key(tl.load(seed), tl.load(step), tl.load(place))
    tl.store(out + i, random_words(key, tl.load(first), i, COUNT).to(tl.int32))


def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
    with _quiet():
        kernel[(1,)](*arguments, **constants)


def decode(codes: Tensor, exponents: Tensor) -> Tensor:
    out = torch.empty(codes.shape, dtype=torch.float32)
    launch(decode_kernel, codes, exponents, out, DTYPE=DTYPES[codes.dtype], COUNT=codes.numel())
    return out


def encode(values: Tensor, dtype: torch.dtype, words: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(values.shape, dtype=dtype)
    exponents = torch.empty(values.numel() // 32, dtype=torch.uint8)
    launch(encode_kernel, values, words, codes, exponents, DTYPE=DTYPES[dtype], COUNT=values.numel())
    return codes, exponents


def round_stochastically(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.int16)
    launch(round_kernel, values, words, out, DTYPE=DTYPES[dtype], COUNT=values.numel())
    return out.view(dtype)


def split8(values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    params, remainders = torch.empty(values.shape, dtype=torch.int16), torch.empty(values.shape, dtype=torch.int8)
    launch(split8_kernel, values, words, params, remainders, COUNT=values.numel())
    return params.view(torch.bfloat16), remainders


def whole8(params: Tensor, remainders: Tensor) -> Tensor:
    out = torch.empty(params.shape, dtype=torch.float32)
    launch(whole8_kernel, params.view(torch.int16), remainders, out, COUNT=params.numel())
    return out


def words_of(seed: int, step: int, place: int, first: int, count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.int32)
    launch(words_kernel, *(torch.tensor([number]) for number in (seed, step, place, first)), out, COUNT=count)
    return out
