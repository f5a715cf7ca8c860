"""Times optimizer steps, ours and a peer's in turn, so that a machine that drifts drifts for both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .cases import Case, elements_of
from .measure import quartiles


def seconds_of(step: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


OTHER_BYTES = 64 * 1024 * 1024  # touched before a cold step


def cold_seconds_of(step: Callable[[], Any], other: torch.Tensor) -> float:
    """Of one step after the caches have been used for other things."""
    other.add_(1.0)
    return seconds_of(step, 1)


def copy_seconds(elements: int) -> Callable[[], float]:
    """A copy of one float32 column, into memory that is there: 8 bytes an element."""
    source, target = torch.ones(elements), torch.ones(elements)
    return lambda: seconds_of(lambda: target.copy_(source), 1)


def time_half(case: Case, rounds: int, ours_first: bool) -> tuple[list[tuple[float, float, float]], str]:
    """Seconds of our step, of the peer's and of a copy, in turn, and our backend."""
    if ours_first:
        ours, theirs = case.ours(), case.theirs()
    else:
        theirs, ours = case.theirs(), case.ours()
    elements = elements_of(ours)
    # Blocks of steps, as timeit makes them: the figure is the step's own cost, not that of the caches between.
    repeats = max(1, 320_000 // elements)
    other = torch.ones(OTHER_BYTES // 4) if case.cold else None
    copy = None if case.bytes_per_element is None else copy_seconds(elements)
    both = (ours, theirs) if ours_first else (theirs, ours)
    measured = []
    torch.set_default_device(case.default_device)
    try:
        for optimizer in both:
            seconds_of(optimizer.step, 3)
        for _ in range(rounds):
            seconds = {
                id(optimizer): seconds_of(optimizer.step, repeats)
                if other is None
                else cold_seconds_of(optimizer.step, other)
                for optimizer in both
            }
            measured.append((seconds[id(ours)], seconds[id(theirs)], copy() if copy is not None else 0.0))
    finally:
        torch.set_default_device(None)
    return measured, getattr(ours, "optimizer", ours).backend


def time_case(case: Case, rounds: int) -> dict[str, Any]:
    """The medians of both step times, and the median and quartiles of the ratio pair by pair.

    Half of the pairs are of optimizers made in one order, half in the other: of two equal optimizers with many small
    tensors, the one made first was found a tenth slower, as the memory of a busy process falls. The ratio is the
    geometric mean of their medians. Where the memory is the limit, also how much of it the step uses: the bytes that it
    must move, at the pace of a copy between the same steps.

    Raises:
        Missing: the peer is not installed.
    """
    halves = []
    for ours_first in (True, False):
        gc.collect()
        half, backend = time_half(case, (rounds + 1) // 2, ours_first)
        halves.append(half)
    measured = halves[0] + halves[1]
    low, _, high = statistics.quantiles([theirs / mine for mine, theirs, _ in measured], n=4)
    middles = [statistics.median(theirs / mine for mine, theirs, _ in half) for half in halves]
    figures = {
        "case": case.name,
        "peer": case.peer,
        "backend": backend,
        "ours_us": statistics.median(mine for mine, _, _ in measured) * 1e6,
        "ours_quartiles_us": [us * 1e6 for us in quartiles([mine for mine, _, _ in measured])],
        "peer_us": statistics.median(theirs for _, theirs, _ in measured) * 1e6,
        "ratio": statistics.geometric_mean(middles),
        "ratio_quartiles": [low, high],
        "rounds": len(measured),
    }
    if case.bytes_per_element is not None:
        shares = [case.bytes_per_element / 8 * copied / mine for mine, _, copied in measured]
        figures["share_of_copy"] = statistics.median(shares)
    return figures
