"""The apply phase: the update of each element.

A program updates one tile of a row. The columns of a row lie anywhere; where all of them are aligned to 16 bytes and
the tile is full, they are read and written in 16-byte accesses. A gradient that alone is not, as under DDP's bucket
views, is read narrow beside them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .storage import narrow, narrow_ties_away, pointer, remainder_of, widen, widen_master, widen_split
from .table import (
    FIRST_STATE,
    GRAD,
    MASTER,
    NONE,
    NUMEL,
    PARAM,
    REMAINDER,
    ROW_ACTIVE,
    ROW_GRAD,
    ROW_MASTER,
    ROW_PARAM,
    ROW_STATE,
    row_at,
)
from .transform import TRANSFORM, Transform, transform

# Elements that a program updates.
TILE = tl.constexpr(1024)
# Numbers of a record: the transform of a gradient, and a rule's scalars.
RECORD = tl.constexpr(24)


class Tile(NamedTuple):
    """A tile of a row: its first element, and how many elements there are from there on."""

    table: Any
    group_count: Any
    row_count: Any
    row: Any
    begin: Any
    left: Any


@triton.jit
def tile_of(table, group_count, row_count, row, index):
    begin = index.to(tl.int64) * TILE
    numel = tl.load(row_at(table, group_count, row_count, row, NUMEL))
    return Tile(table, group_count, row_count, row, begin, numel - begin)


@triton.jit
def index_of(BACKWARDS: tl.constexpr):
    """Which of the tiles is this program's."""
    index = tl.program_id(0)
    if BACKWARDS:
        index = tl.num_programs(0) - 1 - index
    return index


@triton.jit
def address_of(tile, field):
    return tl.load(row_at(tile.table, tile.group_count, tile.row_count, tile.row, field))


@triton.jit
def column(tile, field, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the tile's elements of a column are. Its first is aligned as the row's is."""
    at = pointer(address_of(tile, field), DTYPE) + tile.begin
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def is_aligned(tile, DTYPES: tl.constexpr):
    """Whether a row's gradient and parameter are, as the rule sees it, aligned to 16 bytes."""
    low = address_of(tile, ROW_GRAD) | address_of(tile, ROW_PARAM)
    if DTYPES[MASTER] != NONE:
        low = low | address_of(tile, ROW_MASTER)
    return low & 15 == 0


@triton.jit
def others_are_aligned(tile, DTYPES: tl.constexpr, FIRST: tl.constexpr):
    """Whether all columns of a row but its gradient are aligned to 16 bytes."""
    low = address_of(tile, ROW_PARAM)
    if DTYPES[MASTER] != NONE:
        low = low | address_of(tile, ROW_MASTER)
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        low = low | address_of(tile, ROW_STATE + FIRST + k)
    return low & 15 == 0


@triton.jit
def load_tile(at, i, left, WHOLE: tl.constexpr):
    """Elements as they are stored; 0 behind the last."""
    if WHOLE:
        return tl.load(at + i)
    else:
        return tl.load(at + i, mask=i < left, other=0)


@triton.jit
def store_tile(at, i, left, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at + i, value)
    else:
        tl.store(at + i, value, mask=i < left)


@triton.jit
def param_columns(tile, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """The parameter, and its master weight or what takes its place."""
    param_at = column(tile, ROW_PARAM, DTYPES[PARAM], ALIGNED)
    if DTYPES[MASTER] == NONE:
        return param_at, param_at
    else:
        return param_at, column(tile, ROW_MASTER, DTYPES[MASTER], ALIGNED)


@triton.jit
def load_param(columns, i, left, DTYPES: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr):
    """The parameter as a rule sees it: itself, or its master weight beside which it is a rounded copy."""
    param_at, master_at = columns
    if DTYPES[MASTER] == NONE:
        return widen(load_tile(param_at, i, left, WHOLE), DTYPES[PARAM], COMPUTE)
    elif DTYPES[MASTER] == REMAINDER:
        return widen_split(load_tile(param_at, i, left, WHOLE), load_tile(master_at, i, left, WHOLE))
    else:
        param, master = load_tile(param_at, i, left, WHOLE), load_tile(master_at, i, left, WHOLE)
        return widen_master(param, master, DTYPES[PARAM])


@triton.jit
def store_param(columns, i, left, value, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    param_at, master_at = columns
    if DTYPES[MASTER] == NONE:
        store_tile(param_at, i, left, narrow(value, DTYPES[PARAM]), WHOLE)
    else:
        param = narrow_ties_away(value, DTYPES[PARAM])
        store_tile(param_at, i, left, param, WHOLE)
        if DTYPES[MASTER] == REMAINDER:
            store_tile(master_at, i, left, remainder_of(value, param), WHOLE)
        else:
            store_tile(master_at, i, left, value, WHOLE)


@triton.jit
def load_states(tile, i, DTYPES: tl.constexpr, COMPUTE: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr):
    """The states in the rule's order; `FIRST` is the first that has a number an element."""
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        at = column(tile, ROW_STATE + FIRST + k, DTYPES[FIRST_STATE + k], WHOLE)
        values = values + (widen(load_tile(at, i, tile.left, WHOLE), DTYPES[FIRST_STATE + k], COMPUTE),)
    return values


@triton.jit
def store_states(tile, i, states, DTYPES: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr):
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        at = column(tile, ROW_STATE + FIRST + k, DTYPES[FIRST_STATE + k], WHOLE)
        store_tile(at, i, tile.left, narrow(states[k], DTYPES[FIRST_STATE + k]), WHOLE)


@triton.jit
def rounded_states(states, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """The states as they are read again after the store."""
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        stored = narrow(states[k], DTYPES[FIRST_STATE + k])
        values = values + (widen(stored, DTYPES[FIRST_STATE + k], COMPUTE),)
    return values


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
def load_grad(tile, i, DTYPES: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    at = column(tile, ROW_GRAD, DTYPES[GRAD], ALIGNED)
    return widen(load_tile(at, i, tile.left, WHOLE), DTYPES[GRAD], COMPUTE)


@triton.jit
def update_tile(
    tile,
    by,
    s,
    UPDATE: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    i = tl.arange(0, TILE)
    grad = load_grad(tile, i, DTYPES, COMPUTE, WHOLE, ALIGNED_GRAD)
    columns = param_columns(tile, DTYPES, WHOLE)
    param = load_param(columns, i, tile.left, DTYPES, COMPUTE, WHOLE)
    states = load_states(tile, i, DTYPES, COMPUTE, FIRST, WHOLE)
    param, states = UPDATE(param, transform(grad, param, by), states, s)
    store_param(columns, i, tile.left, param, DTYPES, WHOLE)
    store_states(tile, i, states, DTYPES, FIRST, WHOLE)


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
    BACKWARDS: tl.constexpr,  # the last tiles first: after reduce those are what is still in the second-level cache
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    tile = tile_of(table, group_count, row_count, row, tl.load(tiles + 2 * index + 1))
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    if (active != 0) & (tl.load(control) == 0):
        by, s = read_record(records, row, COMPUTE, COUNT)
        if others_are_aligned(tile, DTYPES, FIRST) & (tile.left >= TILE):
            if address_of(tile, ROW_GRAD) & 15 == 0:
                update_tile(tile, by, s, UPDATE, FIRST, DTYPES, COMPUTE, True, True)
            else:
                update_tile(tile, by, s, UPDATE, FIRST, DTYPES, COMPUTE, True, False)
        else:
            update_tile(tile, by, s, UPDATE, FIRST, DTYPES, COMPUTE, False, False)


@triton.jit
def accumulate_tile(
    tile,
    by,
    s,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    """The first pass of a rule with a direction: the states, and the sums of direction and param."""
    i = tl.arange(0, TILE)
    grad = load_grad(tile, i, DTYPES, COMPUTE, WHOLE, ALIGNED_GRAD)
    param = load_param(param_columns(tile, DTYPES, WHOLE), i, tile.left, DTYPES, COMPUTE, WHOLE)
    states = load_states(tile, i, DTYPES, COMPUTE, FIRST, WHOLE)
    states = ACCUMULATE(transform(grad, param, by), states, s)
    store_states(tile, i, states, DTYPES, FIRST, WHOLE)
    direction = DIRECTION(param, rounded_states(states, DTYPES, COMPUTE), s).to(tl.float64)
    wide = param.to(tl.float64)
    if not WHOLE:  # the direction of elements that do not exist may be 0 / 0
        direction = tl.where(i < tile.left, direction, 0.0)
    return tl.sum(direction * direction, 0), tl.sum(wide * wide, 0)


@triton.jit(do_not_specialize=["group_count", "row_count"])
def accumulate_kernel(
    table,
    group_count,
    row_count,
    tiles,
    records,
    control,
    tile_sums,  # [tiles, 2]: of direction and of param
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    tile = tile_of(table, group_count, row_count, row, tl.load(tiles + 2 * index + 1))
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    if (active != 0) & (tl.load(control) == 0):
        by, s = read_record(records, row, COMPUTE, COUNT)
        if others_are_aligned(tile, DTYPES, FIRST) & (tile.left >= TILE):
            if address_of(tile, ROW_GRAD) & 15 == 0:
                direction_sq, param_sq = accumulate_tile(
                    tile, by, s, ACCUMULATE, DIRECTION, FIRST, DTYPES, COMPUTE, True, True
                )
            else:
                direction_sq, param_sq = accumulate_tile(
                    tile, by, s, ACCUMULATE, DIRECTION, FIRST, DTYPES, COMPUTE, True, False
                )
        else:
            direction_sq, param_sq = accumulate_tile(
                tile, by, s, ACCUMULATE, DIRECTION, FIRST, DTYPES, COMPUTE, False, False
            )
        out = tile_sums + 2 * index
        tl.store(out, direction_sq)
        tl.store(out + 1, param_sq)


@triton.jit
def move_tile(
    tile,
    s,
    DIRECTION: tl.constexpr,
    STEP_SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The second pass: the param moves along the direction."""
    i = tl.arange(0, TILE)
    columns = param_columns(tile, DTYPES, WHOLE)
    param = load_param(columns, i, tile.left, DTYPES, COMPUTE, WHOLE)
    states = load_states(tile, i, DTYPES, COMPUTE, FIRST, WHOLE)
    param = param - s[STEP_SIZE] * DIRECTION(param, states, s)
    store_param(columns, i, tile.left, param, DTYPES, WHOLE)


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
    BACKWARDS: tl.constexpr,
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    tile = tile_of(table, group_count, row_count, row, tl.load(tiles + 2 * index + 1))
    active = tl.load(row_at(table, group_count, row_count, row, ROW_ACTIVE))
    if (active != 0) & (tl.load(control) == 0):
        _, s = read_record(records, row, COMPUTE, COUNT)
        if others_are_aligned(tile, DTYPES, FIRST) & (tile.left >= TILE):
            move_tile(tile, s, DIRECTION, STEP_SIZE, FIRST, DTYPES, COMPUTE, True)
        else:
            move_tile(tile, s, DIRECTION, STEP_SIZE, FIRST, DTYPES, COMPUTE, False)
