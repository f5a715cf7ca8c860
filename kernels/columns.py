"""A row's columns, tile by tile: read as they lie in memory, widened for a rule, rounded and written back."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .codec import GROUP, decode, encode, narrow_split8, narrow_stochastically, random_words, widen_split8
from .storage import narrow, narrow_ties_away, pointer, remainder_of, widen, widen_master, widen_split
from .table import (
    DRAWN_BFLOAT16,
    DRAWN_FLOAT16,
    FIRST_PLACE,
    FIRST_STATE,
    GRAD,
    INT8,
    MASTER,
    NONE,
    PARAM,
    REMAINDER,
    ROW_GRAD,
    ROW_MASTER,
    ROW_PARAM,
    ROW_SCALE,
    ROW_STATE,
    UINT8,
    row_at,
)

# Elements that a program updates.
TILE = tl.constexpr(1024)
# Of a tile that is not taken in 16-byte accesses, those that are at a time: each takes an address of its own.
PART = tl.constexpr(512)


class Columns(NamedTuple):
    """Where a row's columns are."""

    grad: Any
    param: Any
    master: Any  # the parameter's address where there is no master weight
    states: Any  # those with a number an element
    scales: Any  # of each of these; 0 where it is no codes
    first: Any  # the place in the whole tensor of the first element, if words are drawn


class Tile(NamedTuple):
    """A tile of a row: its first element, and how many elements there are from there on."""

    columns: Any
    begin: Any
    left: Any


class Elements(NamedTuple):
    """Some elements of a tile by their numbers, and the groups of codes in which they are."""

    i: Any
    groups: Any


@triton.jit
def read_columns(table, group_count, row_count, row, DTYPES: tl.constexpr, FIRST: tl.constexpr, DRAWS: tl.constexpr):
    grad = tl.load(row_at(table, group_count, row_count, row, ROW_GRAD))
    param = tl.load(row_at(table, group_count, row_count, row, ROW_PARAM))
    master = param
    if DTYPES[MASTER] != NONE:
        master = tl.load(row_at(table, group_count, row_count, row, ROW_MASTER))
    states, scales, first = (), (), 0
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        states = states + (tl.load(row_at(table, group_count, row_count, row, ROW_STATE + FIRST + k)),)
        if DTYPES[FIRST_STATE + k] == INT8 or DTYPES[FIRST_STATE + k] == UINT8:
            scales = scales + (tl.load(row_at(table, group_count, row_count, row, ROW_SCALE + FIRST + k)),)
        else:
            scales = scales + (0,)
    if DRAWS:
        first = tl.load(row_at(table, group_count, row_count, row, FIRST_PLACE))
    return Columns(grad, param, master, states, scales, first)


@triton.jit
def whole_tile():
    return Elements(tl.arange(0, TILE), tl.arange(0, TILE // GROUP))


@triton.jit
def part_from(begin):
    """Those of a part of a tile from one of its elements on."""
    return Elements(begin + tl.arange(0, PART), begin // GROUP + tl.arange(0, PART // GROUP))


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
def draw_words(tile, key, i, DRAWS: tl.constexpr):
    """A random word for each element of a tile, where some column is rounded by them."""
    if DRAWS:
        return random_words(key, tile.columns.first + tile.begin, i, TILE)
    else:
        return 0


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
    elif DTYPES[MASTER] == INT8:
        return widen_split8(param, master)
    else:
        return widen_master(param, master, DTYPES[PARAM])


@triton.jit
def store_param(columns, i, left, value, words, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    param_at, master_at = columns
    if DTYPES[MASTER] == NONE:
        store_tile(param_at, i, left, narrow_number(value, words, DTYPES[PARAM]), WHOLE)
    elif DTYPES[MASTER] == INT8:
        param, remainder = narrow_split8(value, words)
        store_tile(param_at, i, left, param, WHOLE)
        store_tile(master_at, i, left, remainder, WHOLE)
    else:
        param = narrow_ties_away(value, DTYPES[PARAM])
        store_tile(param_at, i, left, param, WHOLE)
        if DTYPES[MASTER] == REMAINDER:
            store_tile(master_at, i, left, remainder_of(value, param), WHOLE)
        else:
            store_tile(master_at, i, left, value, WHOLE)


@triton.jit
def narrow_number(value, words, DTYPE: tl.constexpr):
    """Numbers as they are stored: rounded once, to nearest or by random words."""
    if DTYPE == DRAWN_BFLOAT16 or DTYPE == DRAWN_FLOAT16:
        return narrow_stochastically(value.to(tl.float32), words, DTYPE)
    else:
        return narrow(value, DTYPE)


@triton.jit
def load_state(tile, k, these, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """A state as it is stored, and the exponents of its groups; 0 in their place where it is no codes."""
    stored = load_tile(column(tile.columns.states[k], tile.begin, DTYPE, WHOLE), these.i, tile.left, WHOLE)
    if DTYPE == INT8 or DTYPE == UINT8:
        at = pointer(tile.columns.scales[k], UINT8) + tile.begin // GROUP
        return stored, load_tile(at, these.groups, tile.left // GROUP, WHOLE)
    else:
        return stored, 0


@triton.jit
def widen_state(stored, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    numbers, exponents = stored
    if DTYPE == INT8 or DTYPE == UINT8:
        return decode(numbers, exponents, DTYPE).to(COMPUTE)
    else:
        return widen(numbers, DTYPE, COMPUTE)


@triton.jit
def narrow_state(value, words, DTYPE: tl.constexpr):
    """A state as it is to be stored, and the exponents of its groups."""
    if DTYPE == INT8 or DTYPE == UINT8:
        return encode(value.to(tl.float32), words, DTYPE)
    else:
        return narrow_number(value, words, DTYPE), 0


@triton.jit
def store_state(tile, k, these, stored, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    numbers, exponents = stored
    store_tile(column(tile.columns.states[k], tile.begin, DTYPE, WHOLE), these.i, tile.left, numbers, WHOLE)
    if DTYPE == INT8 or DTYPE == UINT8:
        at = pointer(tile.columns.scales[k], UINT8) + tile.begin // GROUP
        store_tile(at, these.groups, tile.left // GROUP, exponents, WHOLE)


@triton.jit
def load_states(tile, these, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    """The states in the rule's order, as they are stored."""
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        values = values + (load_state(tile, k, these, DTYPES[FIRST_STATE + k], WHOLE),)
    return values


@triton.jit
def widen_states(stored, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    values = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        values = values + (widen_state(stored[k], DTYPES[FIRST_STATE + k], COMPUTE),)
    return values


@triton.jit
def narrow_states(states, words, DTYPES: tl.constexpr):
    """The states as they are to be stored."""
    stored = ()
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        stored = stored + (narrow_state(states[k], words, DTYPES[FIRST_STATE + k]),)
    return stored


@triton.jit
def store_states(tile, these, stored, DTYPES: tl.constexpr, WHOLE: tl.constexpr):
    for k in tl.static_range(len(DTYPES) - FIRST_STATE):
        store_state(tile, k, these, stored[k], DTYPES[FIRST_STATE + k], WHOLE)


@triton.jit
def load_elements(tile, these, DTYPES: tl.constexpr, WHOLE: tl.constexpr, ALIGNED_GRAD: tl.constexpr):
    """Gradient, parameter, master weight and states as they are stored: all are asked for before any is used."""
    grad = load_tile(column(tile.columns.grad, tile.begin, DTYPES[GRAD], ALIGNED_GRAD), these.i, tile.left, WHOLE)
    param, master = load_param(param_columns(tile, DTYPES, WHOLE), these.i, tile.left, DTYPES, WHOLE)
    return grad, param, master, load_states(tile, these, DTYPES, WHOLE)


@triton.jit
def widen_elements(loaded, DTYPES: tl.constexpr, COMPUTE: tl.constexpr):
    """Gradient, parameter and states as a rule sees them."""
    grad, param, master, states = loaded
    grad = widen(grad, DTYPES[GRAD], COMPUTE)
    return grad, widen_param(param, master, DTYPES, COMPUTE), widen_states(states, DTYPES, COMPUTE)
