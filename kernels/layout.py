"""Which rows are launched together, and where their sums go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .codec import takes_words
from .columns import TILE
from .prepare import ADDED_TILES, FEW_TILES, MOST_PIECES
from .reduce import CHUNK_TILES, MOST_CHUNKS, SUMS
from .rule import Rule
from .table import (
    BFLOAT16,
    COLUMNS,
    DRAWN_BFLOAT16,
    DRAWN_FLOAT16,
    DRAWS,
    FIRST_STATE,
    FLOAT16,
    FLOAT64,
    INT8,
    MASTER,
    NONE,
    PARAM,
    STOCHASTIC,
    UINT8,
)

DRAWN = {BFLOAT16.value: DRAWN_BFLOAT16.value, FLOAT16.value: DRAWN_FLOAT16.value}


class Bucket(NamedTuple):
    """Rows of one rule and the same storages: one launch a phase."""

    rule: Rule
    groups: frozenset[int]
    dtypes: tuple[int, ...]  # of param, grad, master, and the states that have a number an element
    compute: tl.dtype
    tiles: Tensor  # int32 [tiles, 2]: row, index of the tile in it
    chunks: Tensor  # int32 [chunks, 3]: row, first tile, where its sums go
    tile_sums: Tensor  # float64 [tiles, 2], a part of the layout's; empty for a rule that measures no direction

    @property
    def constants(self) -> dict[str, Any]:
        """What its element kernels are compiled for."""
        return {
            "COUNT": self.rule.scalar_count,
            "FIRST": self.rule.tensor_state_count,
            "DTYPES": self.dtypes,
            "COMPUTE": self.compute,
            "DRAWS": takes_words(self.dtypes),
        }

    @property
    def has_codes(self) -> bool:
        """Whether some state is codes of a byte."""
        return any(dtype in (INT8.value, UINT8.value) for dtype in self.dtypes[FIRST_STATE.value :])

    @property
    def read_first(self) -> tuple[int, ...]:
        """Of the dtypes, those of the columns that the first of two passes reads: all but that of a kept direction."""
        return self.dtypes[:-1] if self.rule.keeps_direction else self.dtypes

    @property
    def constants_of_move(self) -> dict[str, Any]:
        """What the second of two passes is compiled for: it reads a kept direction in the place of the states."""
        if not self.rule.keeps_direction:
            return self.constants
        states = FIRST_STATE.value
        dtypes = (*self.dtypes[:states], self.dtypes[-1])
        return {
            **self.constants,
            "FIRST": len(self.rule.states),
            "DTYPES": dtypes,
            "DRAWS": takes_words(dtypes),
        }


class Layout(NamedTuple):
    """The rows' buckets and where their sums go; other storages make another."""

    buckets: list[Bucket]
    totals: Tensor  # int32 [rows, 3]: row, first of its chunks' sums, number of chunks
    sums: Tensor  # float64 [rows and chunks, SUMS]
    tile_sums: Tensor  # float64 [tiles of rules that measure a direction, and pieces, 2]
    pieces: Tensor  # int32 [pieces, 3]: of rows with many such tiles, first tile's sum, number of tiles, own sum
    directions: dict[str, Tensor]  # of each such rule, int32 [rows, 3]: row, first of its tiles or pieces, their number
    drawing: frozenset[str]  # the rules some of whose rows take random words

    def tensors(self) -> list[Tensor]:
        of_buckets = [tensor for bucket in self.buckets for tensor in (bucket.tiles, bucket.chunks)]
        return [self.totals, self.sums, self.tile_sums, self.pieces, *self.directions.values(), *of_buckets]


def layout_of(
    device: torch.device, rules: Sequence[Rule], numels: Sequence[int], storages: Sequence[int], groups: Sequence[int]
) -> Layout:
    """The rows by rule and storages. A row that lacks something cannot be active, and is in no bucket.

    Args:
        device: where the layout's lists and sums are.
        rules: of each row, as are those that follow.
        numels: the number of elements.
        storages: the dtypes of its columns, eight bits each, and what random words are for.
        groups: the index of its group.
    """
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for row, (rule, word) in enumerate(zip(rules, storages)):
        dtypes = _storages_of(rule, word)
        states = dtypes[FIRST_STATE.value :]
        present = (*dtypes[: MASTER.value], *states)
        if (numels[row] or rule.measures_direction) and NONE.value not in present:
            found.setdefault((rule.name, dtypes), []).append(row)
    slots = len(rules)
    totals: list[tuple[int, int, int]] = []
    directions: dict[str, list[tuple[int, int, int]]] = {}
    summed = 0  # tiles of rules that measure a direction
    parts: list[tuple[Rule, tuple[int, ...], list[int], Tensor, Tensor, int]] = []
    for (name, dtypes), rows in found.items():
        rule = rules[rows[0]]
        tile_counts = [-(-numels[row] // TILE.value) for row in rows]
        per_chunk = [tiles_of_chunk(numels[row]) for row in rows]
        chunk_counts = [-(-count // each) for count, each in zip(tile_counts, per_chunk)]
        outs = []
        for row, count in zip(rows, chunk_counts):
            outs.append(row if count <= 1 else slots)
            if count > 1:
                totals.append((row, slots, count))
                slots += count
        tiles, chunks = _repeated(rows, tile_counts), _repeated(rows, chunk_counts)
        out = torch.tensor(outs, dtype=torch.int64, device="cpu")
        out = out.repeat_interleave(torch.tensor(chunk_counts, device="cpu"))
        length = torch.tensor(per_chunk, dtype=torch.int64, device="cpu").repeat_interleave(
            torch.tensor(chunk_counts, device="cpu")
        )
        chunks = torch.stack([chunks[:, 0], chunks[:, 1] * length, out + chunks[:, 1]], 1)
        parts.append((rule, dtypes, rows, tiles, chunks, summed))
        for row, count in zip(rows, tile_counts) if rule.measures_direction else ():
            directions.setdefault(name, []).append((row, summed, count))
            summed += count
    directions, pieces = _in_pieces(directions, summed)
    tile_sums = torch.zeros(summed + len(pieces), 2, dtype=torch.float64, device=device)
    buckets = [
        Bucket(
            rule,
            frozenset(groups[row] for row in rows),
            dtypes,
            tl.float64 if dtypes[PARAM.value] == FLOAT64.value else tl.float32,
            tiles.to(device=device, dtype=torch.int32),
            chunks.to(device=device, dtype=torch.int32),
            tile_sums[first:] if rule.measures_direction else tile_sums[:0],
        )
        for rule, dtypes, rows, tiles, chunks, first in parts
    ]
    return Layout(
        buckets,
        _triples(device, totals),
        torch.zeros(slots, SUMS.value, dtype=torch.float64, device=device),
        tile_sums,
        _triples(device, pieces),
        {name: _triples(device, of_rule) for name, of_rule in directions.items()},
        frozenset(rule.name for rule, word in zip(rules, storages) if word & DRAWS),
    )


def _in_pieces(
    directions: dict[str, list[tuple[int, int, int]]], tiles: int
) -> tuple[dict[str, list[tuple[int, int, int]]], list[tuple[int, int, int]]]:
    """The rows whose directions are measured, of which those with many tiles have pieces in their place, and these.

    The length of a piece follows from its row's number of tiles alone. ``tiles``: how many there are.
    """
    pieces: list[tuple[int, int, int]] = []

    def in_pieces(row: int, first: int, count: int) -> tuple[int, int, int]:
        if count <= FEW_TILES.value:
            return row, first, count
        length, before = max(-(-count // MOST_PIECES.value), ADDED_TILES.value), len(pieces)
        for begin in range(0, count, length):
            pieces.append((first + begin, min(length, count - begin), tiles + len(pieces)))
        return row, tiles + before, len(pieces) - before

    return {name: [in_pieces(*entry) for entry in entries] for name, entries in directions.items()}, pieces


def _storages_of(rule: Rule, word: int) -> tuple[int, ...]:
    """Those of a row's param, grad, master, and the states that have a number an element."""
    columns = [word >> (8 * column) & 255 for column in range(COLUMNS)]
    first, last = FIRST_STATE.value + rule.tensor_state_count, FIRST_STATE.value + len(rule.states)
    if word & STOCHASTIC:
        columns[first:last] = [DRAWN.get(dtype, dtype) for dtype in columns[first:last]]
        if columns[MASTER.value] == NONE.value:
            columns[PARAM.value] = DRAWN.get(columns[PARAM.value], columns[PARAM.value])
    # A direction that is kept stands behind the states.
    return (*columns[: FIRST_STATE.value], *columns[first : FIRST_STATE.value + rule.column_count])


def tiles_of_chunk(numel: int) -> int:
    """How many tiles of a row a program of the reduce phase sums: `chunk_tiles` in reduce.py."""
    return max(-(-numel // (MOST_CHUNKS.value * TILE.value)), CHUNK_TILES.value)


def ints(device: torch.device, values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _triples(device: torch.device, values: Sequence[tuple[int, int, int]]) -> Tensor:
    return ints(device, [number for entry in values for number in entry]).view(-1, 3)


def _repeated(rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[sum(counts), 2]: each row as often as its count, and which of them it is."""
    repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")  # whatever the default device is
    of_row = torch.tensor(rows, dtype=torch.int64, device="cpu")
    first = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    return torch.stack([of_row.repeat_interleave(repeats), torch.arange(len(first), device="cpu") - first], 1)
