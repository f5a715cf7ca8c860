"""The reduce phase: sums over a tensor's gradient and parameter.

A program sums one chunk of a row: every lane adds up its own elements in float64, tile after tile, and the lanes are
added along a tree. A second launch adds the chunks of rows that have several. A chunk's length follows from its row's
number of elements alone and there are no atomics, so the bits are the same from run to run, on every device, and
whatever other rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import TILE, Tile, column, load_param, load_tile, param_columns, read_columns, widen_param
from .rule import DECAYED_SQ, FINITE, GRAD_MAX, GRAD_SQ, PARAM_SQ
from .storage import load_any_number, widen
from .table import (
    BFLOAT16,
    CLIPPED,
    FLOAT16,
    GRAD,
    HYPER,
    HYPER_ADDRESS,
    HYPER_DTYPE,
    MAXIMIZE,
    NEEDS,
    NUMEL,
    ROW_ACTIVE,
    ROW_GROUP,
    WEIGHT_DECAY_SCALE,
    group_at,
    row_at,
)
from .transform import Transform, bounds_of, clamp, grad_scale_of, needs_of, transform

# Tiles of a chunk, and more where a row would have more chunks than one program adds in a few rounds.
CHUNK_TILES = tl.constexpr(8)
MOST_CHUNKS = tl.constexpr(4096)
# The sums of a row or a chunk, in this order: of the squares of gradient (after its sign, the loss scale and clipping
# by value), its largest magnitude, of parameter, gradient plus weight decay, and direction; 1 if an element of the
# gradient is infinite or NaN. `NORMS` in fused_optim/plan/plan.py, and one.
SUMS = tl.constexpr(6)
SUM_GRAD_SQ, SUM_GRAD_MAX, SUM_PARAM_SQ, SUM_DECAYED_SQ, SUM_DIRECTION_SQ, SUM_NON_FINITE = map(tl.constexpr, range(6))
# Sums that a program adds at a time.
ADDED = tl.constexpr(1024)


@triton.jit
def read_hyper(table, group_count, group, index, TENSORS: tl.constexpr):
    """A hyperparameter: a number that the group holds itself or, with TENSORS, that a tensor of the user's does."""
    number = tl.load(group_at(table, group_count, group, HYPER + index)).to(tl.float64, bitcast=True)
    if TENSORS:
        address = tl.load(group_at(table, group_count, group, HYPER_ADDRESS + index))
        dtype = tl.load(group_at(table, group_count, group, HYPER_DTYPE + index))
        number = tl.where(address != 0, load_any_number(address, dtype), number)
    return number


@triton.jit
def chunk_tiles(numel):
    """Tiles of a chunk of a row; `tiles_of_chunk` in layout.py says the same."""
    return tl.maximum(tl.cdiv(numel, MOST_CHUNKS * TILE), CHUNK_TILES)


@triton.jit
def transform_before_norms(table, group_count, group, clipped, weight_decay, COMPUTE: tl.constexpr, CLIP: tl.constexpr):
    """The part of the transform that is known before any norm is."""
    scale = grad_scale_of(table)
    maximize = tl.load(group_at(table, group_count, group, MAXIMIZE)).to(tl.float64, bitcast=True)
    low, high = bounds_of(table, clipped, CLIP)
    return Transform(
        scale=tl.where(maximize != 0, -scale, scale).to(COMPUTE),
        min=low.to(COMPUTE),
        max=high.to(COMPUTE),
        weight_decay=weight_decay.to(COMPUTE),
    )


@triton.jit
def load_norms(tile, DTYPES: tl.constexpr, NORMS: tl.constexpr, WHOLE: tl.constexpr):
    """What a tile's norms are taken of, as it is stored: gradient, parameter and master weight, or 0 for each that is
    not asked for."""
    i = tl.arange(0, TILE)
    grad, param, master = 0, 0, 0
    if (GRAD_SQ | GRAD_MAX | DECAYED_SQ | FINITE) & NORMS:
        grad = load_tile(column(tile.columns.grad, tile.begin, DTYPES[GRAD], WHOLE), i, tile.left, WHOLE)
    if (PARAM_SQ | DECAYED_SQ) & NORMS:
        param, master = load_param(param_columns(tile, DTYPES, WHOLE), i, tile.left, DTYPES, WHOLE)
    return grad, param, master


@triton.jit
def add_norms(loaded, sums, by, DTYPES: tl.constexpr, COMPUTE: tl.constexpr, NORMS: tl.constexpr):
    """Adds the elements of a tile to the sums of their lanes."""
    grad_sq, grad_max, param_sq, decayed_sq, non_finite = sums
    if (GRAD_SQ | GRAD_MAX | DECAYED_SQ | FINITE) & NORMS:
        stored = widen(loaded[0], DTYPES[GRAD], COMPUTE)
        grad = clamp(stored, by).to(tl.float64)
        if GRAD_SQ & NORMS:
            grad_sq += grad * grad
        if GRAD_MAX & NORMS:
            magnitude = tl.where(grad < 0, -grad, grad)
            grad_max = tl.where((magnitude > grad_max) | (magnitude != magnitude), magnitude, grad_max)
        if FINITE & NORMS:
            non_finite = tl.where(stored - stored != 0, 1.0, non_finite)
    if (PARAM_SQ | DECAYED_SQ) & NORMS:
        param = widen_param(loaded[1], loaded[2], DTYPES, COMPUTE)
        wide = param.to(tl.float64)
        if PARAM_SQ & NORMS:
            param_sq += wide * wide
        if DECAYED_SQ & NORMS:
            decayed = transform(stored, param, by).to(tl.float64)
            decayed_sq += decayed * decayed
    return grad_sq, grad_max, param_sq, decayed_sq, non_finite


@triton.jit
def sum_tiles(
    columns,
    begin,
    left,
    sums,
    by,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORMS: tl.constexpr,
    WHOLE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Adds so many tiles; all are asked for before the first is added."""
    loaded = ()
    for k in tl.static_range(COUNT):
        tile = Tile(columns, begin + k * TILE, left - k * TILE)
        loaded = loaded + (load_norms(tile, DTYPES, NORMS, WHOLE),)
    for k in tl.static_range(COUNT):
        sums = add_norms(loaded[k], sums, by, DTYPES, COMPUTE, NORMS)
    return sums


@triton.jit
def largest_of(values):
    """The largest number of a tile that holds none below 0, or NaN if there is one: tl.max alone may lose it."""
    nans = tl.sum((values != values).to(tl.int32), 0)
    largest = tl.max(tl.where(values != values, 0.0, values), 0)
    return tl.where(nans > 0, float("nan"), largest)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def reduce_kernel(
    table,
    group_count,
    row_count,
    chunks,  # [chunks, 3]: row, first tile, where its sums go
    sums,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORMS: tl.constexpr,  # what any row of the bucket needs
    WEIGHT_DECAY: tl.constexpr,  # its index among the hyperparameters
    CLIP: tl.constexpr,
    FINDS_INF: tl.constexpr,
    TENSORS: tl.constexpr,
):
    # Tiles that are under way together: four reads of 16 bytes a thread or more.
    NARROW_GRADS: tl.constexpr = DTYPES[GRAD] == BFLOAT16 or DTYPES[GRAD] == FLOAT16
    TOGETHER: tl.constexpr = 4 if NARROW_GRADS and not (PARAM_SQ | DECAYED_SQ) & NORMS else 2
    chunk = tl.program_id(0)
    row = tl.load(chunks + 3 * chunk)
    first_tile = tl.load(chunks + 3 * chunk + 1)
    out = tl.load(chunks + 3 * chunk + 2)
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    clipped = tl.load(row_at(table, group_count, row_count, row, CLIPPED))
    group = tl.load(row_at(table, group_count, row_count, row, ROW_GROUP))
    columns = read_columns(table, group_count, row_count, row, DTYPES, 0, False)
    numel = tl.load(row_at(table, group_count, row_count, row, NUMEL))
    needs = needs_of(tl.load(group_at(table, group_count, group, NEEDS)), clipped, CLIP, FINDS_INF)
    if (active != 0) & (needs != 0):
        scale = tl.load(row_at(table, group_count, row_count, row, WEIGHT_DECAY_SCALE)).to(tl.float64, bitcast=True)
        weight_decay = read_hyper(table, group_count, group, WEIGHT_DECAY, TENSORS) * scale
        by = transform_before_norms(table, group_count, group, clipped, weight_decay, COMPUTE, CLIP)
        zeros = tl.zeros([TILE], tl.float64)
        grad_sq, grad_max, param_sq, decayed_sq, non_finite = zeros, zeros, zeros, zeros, zeros
        begin = first_tile.to(tl.int64) * TILE
        left = numel - begin
        aligned = (columns.grad | columns.param | columns.master) & 15 == 0
        tiles = tl.minimum(tl.cdiv(left, TILE), chunk_tiles(numel)).to(tl.int32)
        together = tl.where(aligned, tl.minimum(left // TILE, tiles).to(tl.int32), 0) // TOGETHER * TOGETHER
        for t in range(0, together, TOGETHER):
            running = (grad_sq, grad_max, param_sq, decayed_sq, non_finite)
            grad_sq, grad_max, param_sq, decayed_sq, non_finite = sum_tiles(
                columns, begin + t * TILE, left - t * TILE, running, by, DTYPES, COMPUTE, NORMS, True, TOGETHER
            )
        for t in range(together, tiles):
            running = (grad_sq, grad_max, param_sq, decayed_sq, non_finite)
            at, rest = begin + t * TILE, left - t * TILE
            if aligned & (rest >= TILE):
                grad_sq, grad_max, param_sq, decayed_sq, non_finite = sum_tiles(
                    columns, at, rest, running, by, DTYPES, COMPUTE, NORMS, True, 1
                )
            else:
                grad_sq, grad_max, param_sq, decayed_sq, non_finite = sum_tiles(
                    columns, at, rest, running, by, DTYPES, COMPUTE, NORMS, False, 1
                )
        at = sums + out.to(tl.int64) * SUMS
        tl.store(at + SUM_GRAD_SQ, tl.sum(grad_sq, 0))
        tl.store(at + SUM_GRAD_MAX, largest_of(grad_max))
        tl.store(at + SUM_PARAM_SQ, tl.sum(param_sq, 0))
        tl.store(at + SUM_DECAYED_SQ, tl.sum(decayed_sq, 0))
        tl.store(at + SUM_DIRECTION_SQ, 0.0)
        tl.store(at + SUM_NON_FINITE, tl.max(non_finite, 0))


@triton.jit(do_not_specialize=["group_count", "row_count"])
def total_kernel(table, group_count, row_count, totals, sums):
    """The sums of the rows that have several chunks: `totals` holds row, first chunk's sums, chunks."""
    program = tl.program_id(0)
    row = tl.load(totals + 3 * program)
    first = tl.load(totals + 3 * program + 1)
    count = tl.load(totals + 3 * program + 2)
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    if active != 0:
        lanes = tl.arange(0, ADDED)
        zeros = tl.zeros([ADDED], tl.float64)
        grad_sq, grad_max, param_sq, decayed_sq, non_finite = zeros, zeros, zeros, zeros, zeros
        for begin in range(0, count, ADDED):
            mask = begin + lanes < count
            at = sums + (first + begin + lanes).to(tl.int64) * SUMS
            grad_sq += tl.load(at + SUM_GRAD_SQ, mask=mask, other=0.0)
            param_sq += tl.load(at + SUM_PARAM_SQ, mask=mask, other=0.0)
            decayed_sq += tl.load(at + SUM_DECAYED_SQ, mask=mask, other=0.0)
            non_finite += tl.load(at + SUM_NON_FINITE, mask=mask, other=0.0)
            magnitude = tl.load(at + SUM_GRAD_MAX, mask=mask, other=0.0)
            grad_max = tl.where((magnitude > grad_max) | (magnitude != magnitude), magnitude, grad_max)
        at = sums + row.to(tl.int64) * SUMS
        tl.store(at + SUM_GRAD_SQ, tl.sum(grad_sq, 0))
        tl.store(at + SUM_GRAD_MAX, largest_of(grad_max))
        tl.store(at + SUM_PARAM_SQ, tl.sum(param_sq, 0))
        tl.store(at + SUM_DECAYED_SQ, tl.sum(decayed_sq, 0))
        tl.store(at + SUM_DIRECTION_SQ, 0.0)
        tl.store(at + SUM_NON_FINITE, tl.minimum(tl.sum(non_finite, 0), 1.0))


@triton.jit(do_not_specialize=["address", "count"])
def copy_kernel(sums, address, count, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Norms on their way to other processes, whose memory is at an address, or back."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exchanged = tl.cast(address, tl.int64).to(tl.pointer_type(tl.float64))
    if OUT:
        tl.store(exchanged + i, tl.load(sums + i, mask=i < count), mask=i < count)
    else:
        tl.store(sums + i, tl.load(exchanged + i, mask=i < count), mask=i < count)
