"""The apply phase: the update of each element.

A program updates one tile of a row. The columns of a row lie anywhere; where all of them are aligned to 16 bytes and
the tile is full, they are read and written in 16-byte accesses. A gradient that alone is not, as under DDP's bucket
views, is read narrow beside them.

What a program reads it asks for three times: which row and tile are its own; all that the table says of the row; the
elements, of all columns. Nothing else waits for memory.
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
# Of a tile that is not taken in 16-byte accesses, those that are at a time: each takes an address of its own.
PART = tl.constexpr(512)
# Numbers of a record: the transform of a gradient, and a rule's scalars.
RECORD = tl.constexpr(24)


class Columns(NamedTuple):
    """Where a row's columns are."""

    grad: Any
    param: Any
    master: Any  # the parameter's address where there is no master weight
    states: Any  # those with a number an element


class Tile(NamedTuple):
    """A tile of a row: its first element, and how many elements there are from there on."""

    columns: Any
    begin: Any
    left: Any


@triton.jit
def read_columns(table, group_count, row_count, row, DTYPES: tl.constexpr, FIRST: tl.constexpr):
    grad = tl.load(row_at(table, group_count, row_count, row, ROW_GRAD))
    param = tl.load(row_at(table, group_count, row_count, row, ROW_PARAM))
    master = param
    if DTYPES[MASTER] != NONE:
        master = tl.load(row_at(table, group_count, row_count, row, ROW_MASTER))
    states = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        states = states + (tl.load(row_at(table, group_count, row_count, row, ROW_STATE + FIRST + k)),)
    return Columns(grad, param, master, states)


@triton.jit
def read_tile(table, group_count, row_count, row, index, control, DTYPES: tl.constexpr, FIRST: tl.constexpr):
    """A row's tile; nothing of it is left where the step is skipped or the row has no gradient.

    That is no branch: the compiler would put the other reads behind it, where they begin when its condition has come.
    """
    columns = read_columns(table, group_count, row_count, row, DTYPES, FIRST)
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
def column(address, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tile's elements of a column are. Its first is aligned as the row's is."""
    at = pointer(address, DTYPE) + begin
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def has_wide_columns(tile):
    """Whether the tile is full, and all columns of its row but the gradient are aligned to 16 bytes."""
    low = tile.columns.param | tile.columns.master
    for k in tl.static_range(len(tile.columns.states)):
        low = low | tile.columns.states[k]
    return (low & 15 == 0) & (tile.left >= TILE)


@triton.jit
def has_wide_grad(tile):
    return tile.columns.grad & 15 == 0


@triton.jit
def narrow_count(tile):
    """How many elements of a tile there are."""
    return tl.minimum(tile.left, TILE).to(tl.int32)


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
    param_at = column(tile.columns.param, tile.begin, DTYPES[PARAM], ALIGNED)
    if DTYPES[MASTER] == NONE:
        return param_at, param_at
    else:
        return param_at, column(tile.columns.master, tile.begin, DTYPES[MASTER], ALIGNED)


@triton.jit
def load_param(columns, i, left, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    """The parameter and its master weight, as they are stored; twice the parameter where there is none."""
    param_at, master_at = columns
    param = load_tile(param_at, i, left, WHOLE)
    if DTYPES[MASTER] == NONE:
        return param, param
    else:
        return param, load_tile(master_at, i, left, WHOLE)


@triton.jit
def widen_param(param, master, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """The parameter as a rule sees it: itself, or its master weight beside which it is a rounded copy."""
    if DTYPES[MASTER] == NONE:
        return widen(param, DTYPES[PARAM], COMPUTE)
    elif DTYPES[MASTER] == REMAINDER:
        return widen_split(param, master)
    else:
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
def load_states(tile, i, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    """The states in the rule's order, as they are stored."""
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        at = column(tile.columns.states[k], tile.begin, DTYPES[FIRST_STATE + k], WHOLE)
        values = values + (load_tile(at, i, tile.left, WHOLE),)
    return values


@triton.jit
def widen_states(stored, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        values = values + (widen(stored[k], DTYPES[FIRST_STATE + k], COMPUTE),)
    return values


@triton.jit
def store_states(tile, i, states, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        at = column(tile.columns.states[k], tile.begin, DTYPES[FIRST_STATE + k], WHOLE)
        store_tile(at, i, tile.left, narrow(states[k], DTYPES[FIRST_STATE + k]), WHOLE)


@triton.jit
def rounded_states(states, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """The states as they are read again after the store."""
    stored = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        stored = stored + (narrow(states[k], DTYPES[FIRST_STATE + k]),)
    return widen_states(stored, DTYPES, COMPUTE)


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
def load_elements(tile, i, DTYPES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED_GRAD: tl.constexpr):
    """Gradient, parameter, master weight and states as they are stored: all are asked for before any is used."""
    grad = load_tile(column(tile.columns.grad, tile.begin, DTYPES[GRAD], ALIGNED_GRAD), i, tile.left, WHOLE)
    param, master = load_param(param_columns(tile, DTYPES, WHOLE), i, tile.left, DTYPES, WHOLE)
    return grad, param, master, load_states(tile, i, DTYPES, WHOLE)


@triton.jit
def widen_elements(loaded, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """Gradient, parameter and states as a rule sees them."""
    grad, param, master, states = loaded
    grad = widen(grad, DTYPES[GRAD], COMPUTE)
    return grad, widen_param(param, master, DTYPES, COMPUTE), widen_states(states, DTYPES, COMPUTE)


@triton.jit
def update_tile(
    tile,
    i,
    by,
    s,
    UPDATE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    loaded = load_elements(tile, i, DTYPES, WHOLE, ALIGNED_GRAD)
    grad, param, states = widen_elements(loaded, DTYPES, COMPUTE)
    param, states = UPDATE(param, transform(grad, param, by), states, s)
    store_param(param_columns(tile, DTYPES, WHOLE), i, tile.left, param, DTYPES, WHOLE)
    store_states(tile, i, states, DTYPES, WHOLE)


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
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST)
    by, s = read_record(records, row, COMPUTE, COUNT)
    if has_wide_columns(tile) & has_wide_grad(tile):
        update_tile(tile, tl.arange(0, TILE), by, s, UPDATE, DTYPES, COMPUTE, True, True)
    elif has_wide_columns(tile):
        update_tile(tile, tl.arange(0, TILE), by, s, UPDATE, DTYPES, COMPUTE, True, False)
    else:
        for part in range(0, narrow_count(tile), PART):
            update_tile(tile, part + tl.arange(0, PART), by, s, UPDATE, DTYPES, COMPUTE, False, False)


@triton.jit
def accumulate_tile(
    tile,
    i,
    by,
    s,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    READ: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED_GRAD: tl.constexpr,
):
    """The first pass of a rule with a direction: the states, and the sums of direction and param, or the direction that
    is kept."""
    loaded = load_elements(tile, i, READ, WHOLE, ALIGNED_GRAD)
    grad, param, states = widen_elements(loaded, READ, COMPUTE)
    states = ACCUMULATE(transform(grad, param, by), states, s)
    store_states(tile, i, states, DTYPES, WHOLE)
    if len(READ) != len(DTYPES):
        return tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    else:
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
    tile_sums,  # [tiles, 2]: of direction and of param; empty where the direction is kept
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    READ: tl.constexpr,  # as DTYPES, without that of a kept direction
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    index = index_of(BACKWARDS)
    row = tl.load(tiles + 2 * index)
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST)
    by, s = read_record(records, row, COMPUTE, COUNT)
    zero = tl.full([], 0.0, tl.float64)
    direction_sq, param_sq = zero, zero
    if has_wide_columns(tile) & has_wide_grad(tile):
        direction_sq, param_sq = accumulate_tile(
            tile, tl.arange(0, TILE), by, s, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, True, True
        )
    elif has_wide_columns(tile):
        direction_sq, param_sq = accumulate_tile(
            tile, tl.arange(0, TILE), by, s, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, True, False
        )
    else:
        for part in range(0, narrow_count(tile), PART):
            of_direction, of_param = accumulate_tile(
                tile, part + tl.arange(0, PART), by, s, ACCUMULATE, DIRECTION, READ, DTYPES, COMPUTE, False, False
            )
            direction_sq += of_direction
            param_sq += of_param
    if len(READ) == len(DTYPES):
        tl.store(tile_sums + 2 * index, direction_sq)
        tl.store(tile_sums + 2 * index + 1, param_sq)


@triton.jit
def move_tile(
    tile,
    i,
    s,
    DIRECTION: tl.constexpr,
    STEP_SIZE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The second pass: the param moves along the direction."""
    columns = param_columns(tile, DTYPES, WHOLE)
    param, master = load_param(columns, i, tile.left, DTYPES, WHOLE)
    states = load_states(tile, i, DTYPES, WHOLE)
    param, states = widen_param(param, master, DTYPES, COMPUTE), widen_states(states, DTYPES, COMPUTE)
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
    of_row = tl.load(tiles + 2 * index + 1)
    tile = read_tile(table, group_count, row_count, row, of_row, control, DTYPES, FIRST)
    _, s = read_record(records, row, COMPUTE, COUNT)
    if has_wide_columns(tile):
        move_tile(tile, tl.arange(0, TILE), s, DIRECTION, STEP_SIZE, DTYPES, COMPUTE, True)
    else:
        for part in range(0, narrow_count(tile), PART):
            move_tile(tile, part + tl.arange(0, PART), s, DIRECTION, STEP_SIZE, DTYPES, COMPUTE, False)
