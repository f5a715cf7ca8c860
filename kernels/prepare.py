"""The prepare phase: norms and hyperparameters in, scalars for the element update out; the twin of csrc/prepare.h.

What is per tensor is computed here, once, in float64, for many tensors at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .apply import KEY, RECORD
from .codec import random_key
from .reduce import (
    SUM_DECAYED_SQ,
    SUM_DIRECTION_SQ,
    SUM_GRAD_MAX,
    SUM_GRAD_SQ,
    SUM_NON_FINITE,
    SUM_PARAM_SQ,
    SUMS,
    read_hyper,
)
from .rule import GRAD_SQ, PARAM_SQ, TensorContext
from .rules.trust_ratio import TrustRatio, apply_trust_ratio
from .storage import load_number, store_number
from .table import (
    CLIP_MAX,
    CLIP_MIN,
    CLIP_NORM,
    CLIPPED,
    COUNTER,
    FIRST_STATE,
    FLOAT32,
    FOUND_INF_ADDRESS,
    GLOBAL_NORM,
    GRAD_NORM_ADDRESS,
    HAS_TRUST_RATIO,
    LR_SCALE,
    MAXIMIZE,
    MEASURED_ADDRESS,
    NEEDS,
    NON_FINITE_ADDRESS,
    PLACE,
    ROW_ACTIVE,
    ROW_GROUP,
    ROW_STATE,
    SEED,
    STORAGES,
    TRUST,
    TRUST_WORDS,
    WEIGHT_DECAY_SCALE,
    group_at,
    read_float32,
    read_number,
    row_at,
)
from .transform import (
    CLIP_BY_GLOBAL_NORM,
    CLIP_BY_NORM,
    CLIP_BY_VALUE,
    INFINITY,
    TRANSFORM,
    bounds_of,
    grad_scale_of,
    needs_of,
)

# The index of the learning rate among a rule's hyperparameters.
LR = tl.constexpr(0)
# Rows that a program prepares.
PREPARED = tl.constexpr(64)
# Lanes in which the rows' sums are added.
LANES = tl.constexpr(128)
# Sums of tiles that a program adds at a time. Those of a row that has more than FEW_TILES are first added in pieces.
ADDED_TILES = tl.constexpr(2048)
FEW_TILES = tl.constexpr(8192)
MOST_PIECES = tl.constexpr(4096)


@triton.jit
def add_compensated(sum, lost, term):
    """sum + term, and what rounding has lost so far: exact enough that the order of the rows does not show."""
    next = sum + term
    part = next - sum
    return next, lost + ((sum - (next - part)) + (term - part))


@triton.jit
def combine(sum, lost, other, other_lost):
    return add_compensated(sum, lost + other_lost, other)


@triton.jit
def sum_rows(table, group_count, row_count, sums, EXCHANGED: tl.constexpr):
    """The sum of squares over all rows that take part in clipping, and the number of sums that are not finite.

    With EXCHANGED the sums are those of all processes, and a row counts that has its gradient in another one.
    Every program for itself: reading a few numbers a row once more is cheaper than another launch.
    """
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    lost = tl.zeros([LANES], tl.float64)
    non_finite = tl.zeros([LANES], tl.float64)
    for begin in range(0, row_count, LANES):
        row = begin + lanes
        mask = row < row_count
        active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE), mask=mask, other=0) != 0
        clipped = tl.load(row_at(table, group_count, row_count, row, CLIPPED), mask=mask, other=0) != 0
        at = sums + row.to(tl.int64) * SUMS
        counts = mask & clipped
        if not EXCHANGED:
            counts = counts & active
        term = tl.load(at + SUM_GRAD_SQ, mask=counts, other=0.0)
        total, lost = add_compensated(total, lost, term)
        non_finite += tl.load(at + SUM_NON_FINITE, mask=mask & active, other=0.0)
    total, lost = tl.reduce((total, lost), 0, combine)
    return tl.where(total - total == 0, total + lost, total), tl.sum(non_finite, 0)


@triton.jit
def clip_coefficient(table, clipped, grad_sq, global_norm, CLIP: tl.constexpr):
    """What a clip by a norm multiplies gradients with."""
    coefficient = tl.where(clipped, 1.0, 1.0).to(tl.float64)
    if CLIP == CLIP_BY_GLOBAL_NORM or CLIP == CLIP_BY_NORM:
        clip_norm = read_number(table, CLIP_NORM)
        if CLIP == CLIP_BY_GLOBAL_NORM:
            larger = tl.where((clip_norm > global_norm) | (clip_norm != clip_norm), clip_norm, global_norm)
            scale = clip_norm / larger + coefficient * 0
        else:
            norm = tl.sqrt(grad_sq)
            scale = tl.where(norm <= clip_norm, 1, clip_norm / norm)  # NaN spreads over the tensor
        coefficient = tl.where(clipped, tl.where(clip_norm == INFINITY, 1, scale), coefficient)
    return coefficient


@triton.jit
def read_hypers(table, group_count, group, COUNT: tl.constexpr, TENSORS: tl.constexpr):
    """The hyperparameters of groups in the rule's order."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (read_hyper(table, group_count, group, i, TENSORS),)
    return values


@triton.jit
def where_holds(condition, mask):
    """A mask, where one condition for all of it holds; the interpreter of triton 3.9 cannot `&` the two."""
    return tl.where(condition, mask.to(tl.int32), 0) != 0


@triton.jit
def store_measured(table, row, grad_norm, param_norm, trust_ratio, mask):
    """The norms of rows as a user may read them after the step."""
    address = tl.load(table + MEASURED_ADDRESS)
    at = address.to(tl.pointer_type(tl.float32)) + 3 * row.to(tl.int64)
    mask = where_holds(address != 0, mask)
    tl.store(at, grad_norm.to(tl.float32), mask=mask)
    tl.store(at + 1, param_norm.to(tl.float32), mask=mask)
    tl.store(at + 2, trust_ratio.to(tl.float32), mask=mask)


@triton.jit
def keys_of(field, row_count, is_listed, steps, mask):
    """The keys of rows' random words at this step, which is counted here for rows whose rule counts none."""
    counter = tl.load(field + COUNTER * row_count, mask=is_listed, other=0).to(tl.pointer_type(tl.float32))
    counts = mask & (counter.to(tl.int64) != 0)
    count = tl.load(counter, mask=counts, other=0.0) + 1
    tl.store(counter, count, mask=counts)
    seed = tl.load(field + SEED * row_count, mask=is_listed, other=0)
    place = tl.load(field + PLACE * row_count, mask=is_listed, other=0)
    return random_key(seed, tl.where(counts, count.to(tl.float64), steps).to(tl.int64), place)


@triton.jit(do_not_specialize=["group_count", "row_count", "listed_count"])
def prepare_kernel(
    table,
    group_count,
    row_count,
    listed,  # the rows of this rule
    listed_count,
    sums,
    records,
    control,
    PREPARE: tl.constexpr,
    HYPER_COUNT: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,  # its index among the hyperparameters
    STATE_COUNT: tl.constexpr,
    SCALAR_COUNT: tl.constexpr,
    CLIP: tl.constexpr,
    FINDS_INF: tl.constexpr,
    ADDS_NORM: tl.constexpr,  # the global norm is that of these rows; otherwise the header has it
    EXCHANGED: tl.constexpr,  # the sums are those of all processes
    MEASURES: tl.constexpr,  # something was reduced
    TRUSTS: tl.constexpr,  # some group has a trust ratio
    TENSORS: tl.constexpr,  # some hyperparameter is a tensor on the device
    DRAWS: tl.constexpr,  # some row of the rule takes random words
):
    global_norm = read_number(table, GLOBAL_NORM)
    non_finite = global_norm * 0
    if FINDS_INF or ADDS_NORM:
        grad_sq, non_finite = sum_rows(table, group_count, row_count, sums, EXCHANGED)
        if ADDS_NORM:
            global_norm = tl.sqrt(grad_sq)
    skip = read_float32(tl.load(table + FOUND_INF_ADDRESS)) != 0
    if FINDS_INF:
        skip = skip | (non_finite != 0)
    if tl.program_id(0) == 0:
        tl.store(control, skip.to(tl.int32))
        if CLIP == CLIP_BY_GLOBAL_NORM or CLIP == CLIP_BY_NORM:
            address = tl.load(table + GRAD_NORM_ADDRESS)
            tl.store(address.to(tl.pointer_type(tl.float32)), global_norm.to(tl.float32), mask=address != 0)
        if FINDS_INF:
            address = tl.load(table + NON_FINITE_ADDRESS)
            found = (non_finite != 0).to(tl.float32)
            tl.store(address.to(tl.pointer_type(tl.float32)), found, mask=address != 0)

    place = tl.program_id(0) * PREPARED + tl.arange(0, PREPARED)
    is_listed = place < listed_count
    row = tl.load(listed + place, mask=is_listed, other=0)
    field = row_at(table, group_count, row_count, row, 0)
    # What the table says of a row is read at once, whether the row is active or not; its states are read if it is.
    active = tl.load(field + ROW_ACTIVE * row_count, mask=is_listed, other=0)
    group = tl.load(field + ROW_GROUP * row_count, mask=is_listed, other=0)
    clipped = tl.load(field + CLIPPED * row_count, mask=is_listed, other=0) != 0
    mask = where_holds(skip == 0, active != 0)
    hyper = read_hypers(table, group_count, group, HYPER_COUNT, TENSORS)

    # Norms.
    zeros = tl.zeros([PREPARED], tl.float64)
    grad_sq, grad_max, param_sq, decayed_sq = zeros, zeros, zeros, zeros
    needs = needs_of(tl.load(group_at(table, group_count, group, NEEDS)), clipped, CLIP, FINDS_INF)
    if MEASURES:
        at = sums + row.to(tl.int64) * SUMS
        measured = mask & (needs != 0)
        grad_sq = tl.where(measured, tl.load(at + SUM_GRAD_SQ), 0.0)
        grad_max = tl.where(measured, tl.load(at + SUM_GRAD_MAX), 0.0)
        param_sq = tl.where(measured, tl.load(at + SUM_PARAM_SQ), 0.0)
        decayed_sq = tl.where(measured, tl.load(at + SUM_DECAYED_SQ), 0.0)
    coefficient = clip_coefficient(table, clipped, grad_sq, global_norm, CLIP)
    tensor = TensorContext(
        lr_scale=tl.load(field + LR_SCALE * row_count, mask=is_listed, other=0).to(tl.float64, bitcast=True),
        weight_decay_scale=tl.load(field + WEIGHT_DECAY_SCALE * row_count, mask=is_listed, other=0).to(
            tl.float64, bitcast=True
        ),
        grad_norm=coefficient * tl.sqrt(grad_sq),
        grad_max=coefficient * grad_max,
        param_norm=tl.sqrt(param_sq),
        direction_norm=zeros,
        has_trust_ratio=tl.load(field + HAS_TRUST_RATIO * row_count, mask=is_listed, other=0) != 0,
        grad_scale=zeros + 1,
        coupled_weight_decay=zeros,
        trust_ratio=zeros + 1,
    )
    grad_norm = tl.where(needs & GRAD_SQ != 0, tensor.grad_norm, float("nan"))
    param_norm = tl.where(needs & PARAM_SQ != 0, tensor.param_norm, float("nan"))
    if TRUSTS:
        options = ()
        for i in tl.static_range(TRUST_WORDS):
            word = tl.load(group_at(table, group_count, group, TRUST + i))
            options = options + (word.to(tl.float64, bitcast=True),)
        left, tensor = apply_trust_ratio(
            TrustRatio(*options), hyper[LR], hyper[WEIGHT_DECAY], tl.sqrt(decayed_sq), tensor
        )
        values = ()
        for i in tl.static_range(HYPER_COUNT):
            if i == WEIGHT_DECAY:
                values = values + (left,)
            else:
                values = values + (hyper[i],)
        hyper = values
    store_measured(table, row, grad_norm, param_norm, tensor.trust_ratio, mask)

    # The rule, and the states that have one number a tensor.
    storages = tl.load(field + STORAGES * row_count, mask=is_listed, other=0)
    addresses = ()
    for i in tl.static_range(STATE_COUNT):
        address = tl.load(field + (ROW_STATE + i) * row_count, mask=is_listed, other=0)
        addresses = addresses + (tl.where(mask, address, 0),)
    values = ()
    for i in tl.static_range(STATE_COUNT):
        values = values + (load_number(addresses[i], (storages >> (8 * (FIRST_STATE + i))) & 255),)
    prepared = PREPARE(hyper, tensor, values)
    for i in tl.static_range(STATE_COUNT):
        store_number(addresses[i], (storages >> (8 * (FIRST_STATE + i))) & 255, prepared.state[i], mask)

    # The record.
    at = records + row.to(tl.int64) * RECORD
    scale = grad_scale_of(table)
    maximize = tl.load(group_at(table, group_count, group, MAXIMIZE)).to(tl.float64, bitcast=True)
    low, high = bounds_of(table, clipped, CLIP)
    if CLIP == CLIP_BY_VALUE:
        scaled = clipped & (prepared.grad_scale != 1)
        low = tl.where(scaled, read_number(table, CLIP_MIN) * prepared.grad_scale, low)
        high = tl.where(scaled, read_number(table, CLIP_MAX) * prepared.grad_scale, high)
    sign = tl.where(maximize != 0, -1, 1).to(tl.float64)
    tl.store(at, coefficient * (sign * scale) * prepared.grad_scale, mask=mask)
    tl.store(at + 1, low, mask=mask)
    tl.store(at + 2, high, mask=mask)
    tl.store(at + 3, prepared.coupled_weight_decay, mask=mask)
    for i in tl.static_range(SCALAR_COUNT):
        tl.store(at + TRANSFORM + i, prepared.scalars[i], mask=mask)
    if DRAWS:
        steps = zeros
        if STATE_COUNT > 0:  # the first of every rule's is the step, which counts as it is stored
            steps = prepared.state[0]
            is_float32 = (storages >> (8 * FIRST_STATE)) & 255 == FLOAT32
            steps = tl.where(is_float32, steps.to(tl.float32).to(tl.float64), steps)
        keys = keys_of(field, row_count, is_listed, steps, mask).to(tl.int64)
        tl.store(at + KEY, keys.to(tl.float64, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def grad_sq_kernel(table, group_count, row_count, sums, grad_sq):
    """For a caller that wants to know before the step goes on."""
    total, non_finite = sum_rows(table, group_count, row_count, sums, False)
    tl.store(grad_sq, total)
    address = tl.load(table + NON_FINITE_ADDRESS)
    found = (non_finite != 0).to(tl.float32)
    tl.store(address.to(tl.pointer_type(tl.float32)), found, mask=address != 0)


@triton.jit
def add_tiles(tile_sums, first, count):
    """The sums of so many tiles, of direction and of param: along lanes, which are added along a tree."""
    lanes = tl.arange(0, ADDED_TILES)
    of_direction = tl.zeros([ADDED_TILES], tl.float64)
    of_param = tl.zeros([ADDED_TILES], tl.float64)
    for begin in range(0, count, ADDED_TILES):
        tile = tile_sums + 2 * (first + begin + lanes).to(tl.int64)
        of_direction += tl.load(tile, mask=begin + lanes < count, other=0.0)
        of_param += tl.load(tile + 1, mask=begin + lanes < count, other=0.0)
    return tl.sum(of_direction, 0), tl.sum(of_param, 0)


@triton.jit
def pieces_kernel(pieces, tile_sums):
    """Pieces of rows with many tiles: `pieces` holds the first tile of each, their number, and where the sums go."""
    piece = pieces + 3 * tl.program_id(0)
    direction_sq, param_sq = add_tiles(tile_sums, tl.load(piece), tl.load(piece + 1))
    out = tile_sums + 2 * tl.load(piece + 2).to(tl.int64)
    tl.store(out, direction_sq)
    tl.store(out + 1, param_sq)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def direction_kernel(
    table,
    group_count,
    row_count,
    directions,  # [rows with a direction, 3]: row, the first of its tiles or pieces, their number
    tile_sums,
    sums,
    records,
    control,
    SCALE_DIRECTION: tl.constexpr,
    HYPER_COUNT: tl.constexpr,
    STEP_SIZE: tl.constexpr,  # its index among the scalars
    ADDS_UP: tl.constexpr,  # adds the sums of tiles; otherwise those of the row are read
    PREPARES: tl.constexpr,  # otherwise they are left with the row's
    TENSORS: tl.constexpr,
):
    """The second prepare of rules with a direction: their step size, from the norms of the first pass."""
    program = tl.program_id(0)
    row = tl.load(directions + 3 * program)
    first = tl.load(directions + 3 * program + 1)
    count = tl.load(directions + 3 * program + 2)
    field = row_at(table, group_count, row_count, row, 0)
    active = tl.load(field + ROW_ACTIVE * row_count)
    if (active != 0) & (tl.load(control) == 0):
        at = sums + row.to(tl.int64) * SUMS
        if ADDS_UP:
            direction_sq, param_sq = add_tiles(tile_sums, first, count)
        else:
            direction_sq = tl.load(at + SUM_DIRECTION_SQ)
            param_sq = tl.load(at + SUM_PARAM_SQ)
        if PREPARES:
            group = tl.load(field + ROW_GROUP * row_count)
            hyper = read_hypers(table, group_count, group, HYPER_COUNT, TENSORS)
            zero = direction_sq * 0
            tensor = TensorContext(
                lr_scale=tl.load(field + LR_SCALE * row_count).to(tl.float64, bitcast=True),
                weight_decay_scale=tl.load(field + WEIGHT_DECAY_SCALE * row_count).to(tl.float64, bitcast=True),
                grad_norm=zero,
                grad_max=zero,
                param_norm=tl.sqrt(param_sq),
                direction_norm=tl.sqrt(direction_sq),
                has_trust_ratio=tl.load(field + HAS_TRUST_RATIO * row_count) != 0,
                grad_scale=zero,
                coupled_weight_decay=zero,
                trust_ratio=zero,
            )
            step_size, trust_ratio = SCALE_DIRECTION(hyper, tensor)
            tl.store(records + row.to(tl.int64) * RECORD + TRANSFORM + STEP_SIZE, step_size)
            address = tl.load(table + MEASURED_ADDRESS)
            measured = address.to(tl.pointer_type(tl.float32)) + 3 * row.to(tl.int64)
            tl.store(measured + 1, tensor.param_norm.to(tl.float32), mask=address != 0)
            tl.store(measured + 2, trust_ratio.to(tl.float32), mask=address != 0)
        else:
            tl.store(at + SUM_DIRECTION_SQ, direction_sq)
            tl.store(at + SUM_PARAM_SQ, param_sq)
