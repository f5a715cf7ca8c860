"""How the CUDA backend cuts rows up for its blocks: csrc/cuda/layout.cpp, which needs no CUDA."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from fused_optim.bench.models import MODELS
from support.sources import ROOT

CHUNK, BY_WARP, MOST_PIECES, BLOCK = 32 * 1024, 4 * 1024, 4096, 8 * 1024  # csrc/cuda/layout.h

pytestmark = pytest.mark.requires("c++")


class Cut(NamedTuple):
    blocks: list[tuple[int, int, int, int]]  # row, first element, elements, where its sums go
    warps: list[tuple[int, int, int, int]]
    totals: list[tuple[int, int, int]]  # row, first sums, pieces
    directions: list[tuple[int, int, int]]  # row, first sum, sums
    bytes: int


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layout") / "layout_test"
    files = [str(ROOT / "tests" / "csrc" / "layout_test.cpp"), str(ROOT / "csrc" / "cuda" / "layout.cpp")]
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *options, *files, "-o", str(out)], check=True)
    return out


def cut(program: Path, numels: list[int]) -> Cut:
    command = [str(program), *map(str, numels)]
    lines = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    found: dict[str, list] = {"block": [], "warp": [], "total": [], "direction": [], "bytes": []}
    for line in lines:
        kind, *numbers = line.split()
        found[kind].append(tuple(map(int, numbers)))
    return Cut(found["block"], found["warp"], found["total"], found["direction"], found["bytes"][0][0])


NUMELS = (0, 1, BY_WARP, BY_WARP + 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, MOST_PIECES * CHUNK, MOST_PIECES * CHUNK + 1)


def test_every_element_is_summed_once(program: Path) -> None:
    numels = [*NUMELS, 525_336_576, (1 << 31) + 1025]
    found = cut(program, numels)
    ends = [0] * len(numels)
    outs = set()
    for row, begin, count, out in [*found.blocks, *found.warps]:
        assert begin == ends[row]
        assert begin % CHUNK == 0
        ends[row] = begin + count
        outs.add(out)
    assert ends == numels
    assert outs == {*range(len(numels)), *range(len(numels), len(numels) + sum(n for *_, n in found.totals))} - {
        row for row, *_ in found.totals
    }
    assert all(count <= BY_WARP for _, _, count, _ in found.warps)


def test_one_block_adds_few_pieces_and_sums_however_long_a_row_is(program: Path) -> None:
    """Of an embedding of a large language model: 16 rounds of memory or fewer for the 256 threads of a block."""
    vocabulary = 128_256 * 4096
    found = cut(program, [vocabulary, 1 << 33])
    for *_, count in found.totals:
        assert MOST_PIECES // 2 < count <= MOST_PIECES
    (of_embedding, _) = found.directions
    assert of_embedding[2] == vocabulary // BLOCK


def test_rows_share_a_block_and_no_sum(program: Path) -> None:
    numels = [5, 1024, 0, 3 * 1024 + 1, BLOCK, 2 * BLOCK + 1, 7]
    tiles = [-(-numel // 1024) for numel in numels]
    first, used = 0, 0
    for (row, at, count), tile_count in zip(cut(program, numels).directions, tiles, strict=True):
        assert at == used
        blocks = {tile // 8 for tile in range(first, first + tile_count)}
        assert count == len(blocks), row
        first, used = first + tile_count, used + count


def test_a_table_for_a_direction_takes_little_memory(program: Path) -> None:
    """Two numbers for each 8,192 elements, and a block's place; each captured graph has a table of its own."""
    assert cut(program, [1_000_000_000]).bytes < 3e6


@pytest.mark.parametrize("multiprocessors", [132], ids=["H100 and H200"])
def test_resnet_50_takes_whole_waves(multiprocessors: int, program: Path) -> None:
    """Three blocks a multiprocessor; blocks in order take the first place that is free, for as long as they read."""
    model = MODELS["resnet-50"]()
    found = cut(program, [math.prod(shape) for group in model.groups for shape in group.tensors.values()])
    places = [0] * (3 * multiprocessors)
    overhead = 4096  # the time of as many elements, about: what is read before them, and the sum of the threads
    lengths = [count for _, _, count, _ in found.blocks]
    lengths += [max(count for _, _, count, _ in found.warps[i : i + 8]) for i in range(0, len(found.warps), 8)]
    for length in lengths:
        place = places.index(min(places))
        places[place] += length + overhead
    assert sum(places) / (len(places) * max(places)) > 0.95
