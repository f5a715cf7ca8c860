"""The apply phase: the update of each element.

A program updates one tile of a row. The columns of a row lie anywhere; where all of them are aligned to 16 bytes and
the tile is full, they are read and written in accesses as wide as a thread's elements, of 16 bytes at most. A gradient
that alone is not, as under DDP's bucket views, is read narrow beside them.

What a program reads it asks for three times: which row and tile are its own; all that the table says of the row; the
elements, of all columns. Nothing else waits for memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    PART,
    TILE,
    Tile,
    draw_words,
    has_wide_columns,
    has_wide_grad,
    load_elements,
    load_param,
    load_states,
    narrow_count,
    narrow_states,
    param_columns,
    part_from,
    read_columns,
    store_param,
    store_states,
    whole_tile,
    widen_elements,
    widen_param,
    widen_states,
)
from .table import NUMEL, ROW_ACTIVE, row_at
from .transform import TRANSFORM, Transform, transform

# Numbers of a record: the transform of a gradient, a rule's scalars and, at the end, the key of the random words.
RECORD = tl.constexpr(24)
KEY = tl.constexpr(RECORD.value - 1)


@triton.jit
def read_tile(
    table, group_count, row_count, row, index, control, DTYPES: tl.constexpr, FIRST: tl.constexpr, DRAWS: tl.constexpr
):
    """A row's tile; nothing of it is left where the step is skipped or the row has no gradient.

    That is no branch: the compiler would put the other reads behind it, where they begin when its condition has come.
    """
    columns = read_columns(table, group_count, row_count, row, DTYPES, FIRST, DRAWS)
    begin = index.to(tl.int64) * TILE
    left = tl.load(row_at(table, group_count, row_count, row, NUMEL)) - begin
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    return Tile(columns, begin, tl.where((active != 0) & (tl.load(control) == 0), left, 0))


@triton.jit
def index_of(BACKWARDS: tl.constexpr):
    """Which of the tiles is this program's."""
    index = tl.program_id(0)
    if BACKWARDS:
        index = tl.num_programs(0) - 1 - index
    return index


@triton.jit
def read_record(records, row, COMPUTE: tl.constexpr, COUNT: tl.constexpr):
    """The transform of a row's gradient and the rule's scalars, rounded once to the compute type."""
    at = records + row.to(tl.int64) * RECORD
    values = ()
    for k in tl.static_range(TRANSFORM):
        values = values + (tl.load(at + k).to(COMPUTE),)
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars = scalars + (tl.load(at + TRANSFORM + k).to(COMPUTE),)
    return Transform(*values), scalars


@triton.jit
def read_key(records, row, DRAWS: tl.constexpr):
    """What the random words of a row at this step are made from."""
    if DRAWS:
        return tl.load(records + row.to(tl.int64) * RECORD + KEY).to(tl.int64, bitcast=True).to(tl.uint32)
    else:
        return 0


@triton.jit
def update_tile(
    tile,
    these,
    by,
    s,
    key,
    UPDATE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    loaded = load_elements(tile, these, DTYPES, WHOLE, ALIGNED_GRAD)
    grad, param, states = widen_elements(loaded, DTYPES, COMPUTE)
    param, states = UPDATE(param, transform(grad, param, by), states, s)
    words = draw_words(tile, key, these.i, DRAWS)
    store_param(param_columns(tile, DTYPES, WHOLE), these.i, tile.left, param, words, DTYPES, WHOLE)
    store_states(tile, these, narrow_states(states, words, DTYPES), DTYPES, WHOLE)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def apply_kernel(
    table,
    group_count,
    row_count,
    tiles,  # [tiles, 2]: row, index of the tile in it
    records,
    control,
    UPDATE: tl.constexpr,
    COUNT: tl.constexpr,  # of scalars
    FIRST: tl.constexpr,  # state with a number an element
    DTYPES: tl.constexpr,  # of param, grad, master and those states
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,  # some of these are rounded by random words
    BACKWARDS: tl.constexpr,  # the last tiles first: after reduce those are what is still in the second-level cache
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST, DRAWS)
    by, s = read_record(records, row, COMPUTE, COUNT)
    key = read_key(records, row, DRAWS)
    if has_wide_columns(tile) & has_wide_grad(tile):
        update_tile(tile, whole_tile(), by, s, key, UPDATE, DTYPES, COMPUTE, DRAWS, True, True)
    elif has_wide_columns(tile):
        update_tile(tile, whole_tile(), by, s, key, UPDATE, DTYPES, COMPUTE, DRAWS, True, False)
    else:
        for part in range(0, narrow_count(tile), PART):
            update_tile(tile, part_from(part), by, s, key, UPDATE, DTYPES, COMPUTE, DRAWS, False, False)


@triton.jit
def accumulate_tile(
    tile,
    these,
    by,
    s,
    key,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    READ: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    """The first pass of a rule with a direction: the states, and the sums of direction and param, or the direction that
    is kept."""
    loaded = load_elements(tile, these, READ, WHOLE, ALIGNED_GRAD)
    grad, param, states = widen_elements(loaded, READ, COMPUTE)
    states = ACCUMULATE(transform(grad, param, by), states, s)
    stored = narrow_states(states, draw_words(tile, key, these.i, DRAWS), DTYPES)
    store_states(tile, these, stored, DTYPES, WHOLE)
    if len(READ) != len(DTYPES):
        return tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    else:  # the direction is that of the states as they are read again
        direction = DIRECTION(param, widen_states(stored, DTYPES, COMPUTE), s).to(tl.float64)
        wide = param.to(tl.float64)
        if not WHOLE:  # the direction of elements that do not exist may be 0 / 0
            direction = tl.where(these.i < tile.left, direction, 0.0)
        return tl.sum(direction * direction, 0), tl.sum(wide * wide, 0)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def accumulate_kernel(
    table,
    group_count,
    row_count,
    tiles,
    records,
    control,
    tile_sums,  # [tiles, 2]: of direction and of param; empty where the direction is kept
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    READ: tl.constexpr,  # as DTYPES, without that of a kept direction
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST, DRAWS)
    by, s = read_record(records, row, COMPUTE, COUNT)
    key = read_key(records, row, DRAWS)
    zero = tl.full([], 0.0, tl.float64)
    direction_sq, param_sq = zero, zero
    if has_wide_columns(tile) & has_wide_grad(tile):
        direction_sq, param_sq = accumulate_tile(
            tile, whole_tile(), by, s, key, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, DRAWS, True, True
        )
    elif has_wide_columns(tile):
        direction_sq, param_sq = accumulate_tile(
            tile, whole_tile(), by, s, key, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, DRAWS, True, False
        )
    else:
        for part in range(0, narrow_count(tile), PART):
            of_direction, of_param = accumulate_tile(
                tile, part_from(part), by, s, key, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, DRAWS, False, False
            )
            direction_sq += of_direction
            param_sq += of_param
    if len(READ) == len(DTYPES):
        tl.store(tile_sums + 2 * index, direction_sq)
        tl.store(tile_sums + 2 * index + 1, param_sq)


@triton.jit
def move_tile(
    tile,
    these,
    s,
    key,
    DIRECTION: tl.constexpr,
    STEP_SIZE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The second pass: the param moves along the direction, and is rounded by the words of the first."""
    columns = param_columns(tile, DTYPES, WHOLE)
    param, master = load_param(columns, these.i, tile.left, DTYPES, WHOLE)
    states = load_states(tile, these, DTYPES, WHOLE)
    param, states = widen_param(param, master, DTYPES, COMPUTE), widen_states(states, DTYPES, COMPUTE)
    param = param - s[STEP_SIZE] * DIRECTION(param, states, s)
    words = draw_words(tile, key, these.i, DRAWS)
    store_param(columns, these.i, tile.left, param, words, DTYPES, WHOLE)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def move_kernel(
    table,
    group_count,
    row_count,
    tiles,
    records,
    control,
    DIRECTION: tl.constexpr,
    STEP_SIZE: tl.constexpr,  # its index among the scalars
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DRAWS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST, DRAWS)
    _, s = read_record(records, row, COMPUTE, COUNT)
    key = read_key(records, row, DRAWS)
    if has_wide_columns(tile):
        move_tile(tile, whole_tile(), s, key, DIRECTION, STEP_SIZE, DTYPES, COMPUTE, DRAWS, True)
    else:
        for part in range(0, narrow_count(tile), PART):
            move_tile(tile, part_from(part), s, key, DIRECTION, STEP_SIZE, DTYPES, COMPUTE, DRAWS, False)
