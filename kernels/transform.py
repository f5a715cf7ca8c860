"""What happens to a gradient element before a rule sees it: sign, loss scale, clipping, coupled weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rule import DIRECTION_SQ, FINITE, GRAD_SQ
from .table import CLIP_MAX, CLIP_MIN, GRAD_SCALE, GRAD_SCALE_ADDRESS, read_float32, read_number

# The kinds of clipping, as `Clip` in csrc/prepare.h numbers them.
CLIP_NONE, CLIP_BY_GLOBAL_NORM, CLIP_BY_NORM, CLIP_BY_VALUE = map(tl.constexpr, range(4))
INFINITY = tl.constexpr(float("inf"))


class Transform(NamedTuple):
    """``clamp(scale * grad, min, max) + weight_decay * param``."""

    scale: Any
    min: Any
    max: Any
    weight_decay: Any


TRANSFORM = tl.constexpr(len(Transform._fields))


@triton.jit
def clamp(grad, by):
    """The transform without its weight decay. By comparisons, which let a NaN through."""
    grad = by.scale * grad
    grad = tl.where(grad < by.min, by.min, grad)
    return tl.where(grad > by.max, by.max, grad)


@triton.jit
def transform(grad, param, by):
    grad = clamp(grad, by)
    return tl.where(by.weight_decay != 0, grad + by.weight_decay * param, grad)


@triton.jit
def grad_scale_of(table):
    """1 / loss scale."""
    address = tl.load(table + GRAD_SCALE_ADDRESS)
    loss_scale = tl.where(address != 0, read_float32(address), 1.0).to(tl.float64)
    return tl.where(address != 0, 1 / loss_scale, read_number(table, GRAD_SCALE))


@triton.jit
def bounds_of(table, clipped, CLIP: tl.constexpr):
    """What the elements of rows are clamped to."""
    low, high = -INFINITY, INFINITY
    if CLIP == CLIP_BY_VALUE:
        low, high = read_number(table, CLIP_MIN), read_number(table, CLIP_MAX)
    return tl.where(clipped != 0, low, -INFINITY).to(tl.float64), tl.where(clipped != 0, high, INFINITY).to(tl.float64)


@triton.jit
def needs_of(needs, clipped, CLIP: tl.constexpr, FINDS_INF: tl.constexpr):
    """The norms that are reduced for rows before their prepare, from those that their groups need."""
    needs = needs & ~DIRECTION_SQ
    if CLIP == CLIP_BY_GLOBAL_NORM or CLIP == CLIP_BY_NORM:
        needs = tl.where(clipped != 0, needs | GRAD_SQ, needs)
    if FINDS_INF:
        needs = needs | FINITE
    return needs
