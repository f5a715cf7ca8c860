"""Where a tensor lies and how, and which rows write the same memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..row import DTYPES
from ..state.codec import GROUP
from ..tensors import describe_tensor, is_plain, is_same_order


class Memory(NamedTuple):
    """Where a tensor lies and how."""

    address: int
    device: torch.device
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def memory_of(tensor: Any) -> Memory | None:
    """None for what is no tensor in plain memory, or of a dtype that no rule computes with."""
    if not (isinstance(tensor, Tensor) and is_plain(type(tensor)) and tensor.dtype in DTYPES):
        return None
    facts = describe_tensor(tensor)
    return facts and Memory(facts[0], tensor.device, DTYPES[tensor.dtype], facts[5], facts[6])


def lies_as(memory: Memory, other: Memory) -> bool:
    """Whether two tensors have the same shape, and their elements in the same order."""
    return memory.shape == other.shape and is_same_order(memory.strides, other.strides, memory.shape)


def holds_whole_groups(memory: Memory) -> bool:
    """Whether a tensor's elements lie in their order, and each index of its first dimension holds whole groups of a
    state's codes."""
    row = math.prod(memory.shape[1:])
    in_order = [math.prod(memory.shape[place + 1 :]) for place in range(len(memory.shape))]
    return bool(memory.shape) and row % GROUP == 0 and is_same_order(memory.strides, tuple(in_order), memory.shape)


def overlapping(ranges: list[tuple[int, int, int]]) -> set[int]:
    """The rows of which two write the same memory; each range: first address, last, row."""
    ranges = sorted(ranges)
    found: set[int] = set()
    widest = 0  # the range that reaches furthest among those before
    for place in range(1, len(ranges)):
        if ranges[place][0] < ranges[widest][1]:
            found |= {ranges[place][2], ranges[widest][2]}
        if ranges[place][1] > ranges[widest][1]:
            widest = place
    return found
