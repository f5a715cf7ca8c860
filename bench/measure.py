"""Measures the contenders of a case in turn, so that a machine that drifts drifts for all of them.

The contenders of a case are made, warmed up, and stepped in blocks, one block each a round, in an order that moves on
by one a round. Half of the rounds are of optimizers made in one order, half in the other: the one made first was found
a tenth slower. A ratio is taken within a round. What does not fit into memory together is measured in batches, each of
them beside our own.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .accuracy import max_error
from .contenders import Contender
from .footprint import bytes_of_step, footprint, state_bytes
from .machine import cache_bytes, free_bytes
from .material import make_material
from .optimizers import Recipe
from .shapes import Model

WARM_UP = 3  # steps
BLOCK_SECONDS = 0.01  # what a block of steps lasts at least, within the next limit
LONGEST_BLOCK = 100  # steps
LONGEST_SLEEP = 0.2  # seconds
CYCLES_PER_SECOND = 2e9  # of a GPU, or fewer: then it sleeps longer
MOST_COPIES = 32
NOISY = 0.15  # the quartiles' distance, relative to the median, from which on a figure is called noisy
COPY_BYTES = 1 << 30  # read and written by the copy that a step is held to, at most


class Setting(NamedTuple):
    """What all contenders of a case share."""

    recipe: Recipe
    model: Model
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "parameters": self.model.numel,
            "tensors": self.model.tensors,
            "groups": len(self.model.groups),
            "optimizer": self.recipe.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    @property
    def title(self) -> str:
        return f"{self.recipe.name}, {self.model.name}, {self.key['dtype']}, {self.device.type}"


class Times(NamedTuple):
    """Seconds of one step: until its result is there, of the calling thread alone, and on the device; and of all
    processors, which other work beside does not lengthen."""

    wall: float
    host: float | None
    device: float | None
    processor: float | None = None


@dataclass
class Entry:
    """A contender and what became of it."""

    contender: Contender
    status: str = "measured"
    reason: str = ""
    halves: list[list[Times]] = field(default_factory=list)
    beside: list[list[Times]] = field(default_factory=list)  # the reference's, in the same rounds
    figures: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        self.status, self.reason = ("skipped", f"out of memory: {first_line(error)}")
        if not is_out_of_memory(error):
            self.status, self.reason = "failed", f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def blocks_of(seconds: float) -> int:
    """How many steps of so many seconds make a block: the figure is the step's own cost, not that of a single call."""
    return max(1, min(LONGEST_BLOCK, round(BLOCK_SECONDS / max(seconds, 1e-9))))


class Runner:
    """A contender made and warm, in as many copies as its inputs rotate through."""

    def __init__(self, contender: Contender, setting: Setting, copies: int) -> None:
        model = contender.model(setting.model)
        self.device = setting.device
        self.materials = [make_material(model, setting.dtype, setting.device) for _ in range(copies)]
        self.steppers = [contender.make(material) for material in self.materials]
        self.turn = 0
        for stepper in self.steppers:
            for _ in range(WARM_UP):
                stepper.step()
        self.synchronize()
        self.repeats = blocks_of(self.block(1).wall)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self) -> None:
        self.steppers[self.turn].step()
        self.turn = (self.turn + 1) % len(self.steppers)

    def block(self, repeats: int) -> Times:
        if self.device.type != "cuda":
            start, before = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                self.step()
            processor = time.process_time() - before
            return Times((time.perf_counter() - start) / repeats, None, None, processor / repeats)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            self.step()
        host = time.perf_counter() - start
        self.synchronize()
        wall = time.perf_counter() - start
        return Times(wall / repeats, host / repeats, self.device_seconds(repeats, host) / repeats)

    def device_seconds(self, repeats: int, host: float) -> float:
        """What the device alone takes for a block: it sleeps until the host has launched it, as far as the queue of
        launches reaches. An idle device would wait between small kernels for the host, and that would be measured."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(1.5 * host, LONGEST_SLEEP) * CYCLES_PER_SECOND))
        first.record()
        for _ in range(repeats):
            self.step()
        last.record()
        self.synchronize()
        return first.elapsed_time(last) / 1e3

    def is_finite(self) -> bool:
        return all(bool(param.isfinite().all()) for material in self.materials for param in material.flat)


class Copy:
    """A copy that reads and writes as many bytes as a step, at most `COPY_BYTES`: the pace to hold it to."""

    def __init__(self, moved: int, device: torch.device) -> None:
        self.bytes = max(2, min(moved, COPY_BYTES)) // 2 * 2
        self.source = torch.ones(self.bytes // 2, dtype=torch.uint8, device=device)
        self.target = torch.ones_like(self.source)
        self.runner = Runner.__new__(Runner)
        self.runner.device, self.runner.turn, self.runner.steppers = device, 0, [self]
        self.repeats = blocks_of(self.runner.block(WARM_UP).wall)

    def step(self) -> None:
        self.target.copy_(self.source)

    def bytes_per_second(self) -> float:
        times = self.runner.block(self.repeats)
        return self.bytes / (times.wall if times.device is None else times.device)


def bytes_needed(setting: Setting, copies: int) -> int:
    """What a contender takes at most of the memory: parameter, gradient, two states and two temporaries."""
    return 6 * setting.model.numel * setting.dtype.itemsize * copies


def measure_setting(
    setting: Setting,
    contenders: list[Contender],
    rounds: int,
    rotate: bool = False,
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """The rows of a case, one a contender; the first contender is the one that the others are compared with."""
    entries = [Entry(contender) for contender in contenders]
    moved = 7 * setting.model.numel * setting.dtype.itemsize
    copies = 1
    if rotate:
        copies = min(MOST_COPIES, max(1, math.ceil(3 * cache_bytes(setting.device) / max(1, moved))))
    free, needed = free_bytes(setting.device), bytes_needed(setting, copies)
    together = len(entries) if free is None else int(0.9 * free) // max(1, needed)
    if together < 1:
        for entry in entries:
            entry.status = "skipped"
            entry.reason = f"out of memory: needs about {needed / 1e9:,.1f} GB, {(free or 0) / 1e9:,.1f} GB are free"
        yield from (row_of(setting, entry, copies, entries[0]) for entry in entries)
        return
    paces: list[float] = []
    size = max(1, together - 1)
    batches = [entries[start : start + size] for start in range(1, len(entries), size)] or [[]]
    if together == 1:  # not even two beside each other: each alone, and the ratios are not interleaved
        batches = [[entry] for entry in entries]
    for batch in batches:
        group = batch if together == 1 else [entries[0], *batch]
        for order in (group, group[::-1]):
            gc.collect()
            alive = [entry for entry in order if entry.status == "measured"]
            measure_half(alive, entries[0], setting, rounds, copies, paces, tick)
    for entry in entries:
        if entry.status == "measured" and entry.halves:
            tick(f"{entry.contender.name}: memory and accuracy")
            describe(entry, setting)
        row = row_of(setting, entry, copies, entries[0])
        if paces and "bytes_moved" in row:
            row["copy_bytes_per_second"] = statistics.median(paces)
            row["share_of_copy"] = row["bytes_moved"] / (row["step_us"] / 1e6) / row["copy_bytes_per_second"]
        yield row


def measure_half(
    entries: list[Entry],
    reference: Entry,
    setting: Setting,
    rounds: int,
    copies: int,
    paces: list[float],
    tick: Callable[[str], None],
) -> None:
    """Half of the rounds, of optimizers made in the order of the entries, of which the reference is one."""
    runners: list[tuple[Entry, Runner]] = []
    for entry in entries:
        tick(f"{entry.contender.name}: warming up")
        try:
            runners.append((entry, Runner(entry.contender, setting, copies)))
        except Exception as error:  # a peer may raise anything; the others go on
            entry.fail(error)
            release(setting.device)
    copy = None
    if runners:
        try:
            moved = bytes_of_step(runners[0][1].materials[0], state_bytes(runners[0][1].steppers[0]))
            copy = Copy(moved, setting.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    times: dict[int, list[Times]] = {id(entry): [] for entry, _ in runners}
    for turn in range((rounds + 1) // 2):
        tick(f"round {turn + 1} of {(rounds + 1) // 2}")
        start = turn % max(1, len(runners))
        for entry, runner in [*runners[start:], *runners[:start]]:
            try:
                times[id(entry)].append(runner.block(runner.repeats))
            except Exception as error:
                entry.fail(error)
        runners = [pair for pair in runners if pair[0].status == "measured"]
        if copy is not None:
            paces.append(copy.bytes_per_second())
    for entry, runner in runners:
        if not runner.is_finite():
            entry.status, entry.reason = "diverged", "its parameters are not finite after the steps"
        entry.halves.append(times[id(entry)])
        entry.beside.append(times.get(id(reference), []))
    del runners, copy
    release(setting.device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(entry: Entry, setting: Setting) -> None:
    """What is found out once, beside the clock: bytes, launches, host time of a twin, accuracy."""
    contender = entry.contender
    try:
        material = make_material(contender.model(setting.model), setting.dtype, setting.device)
        stepper = contender.make(material)
        for _ in range(WARM_UP):
            stepper.step()
        entry.figures |= footprint(setting.recipe, stepper, material)
        del material, stepper
        if setting.device.type != "cuda" and not contender.compiles:
            entry.figures["host_us"] = twin_seconds(contender, setting) * 1e6
        entry.figures["max_error"] = max_error(setting.recipe, contender, setting.dtype, setting.device)
    except Exception as error:
        entry.reason = f"not all could be found out: {type(error).__name__}: {first_line(error)}"
    release(setting.device)


def twin_seconds(contender: Contender, setting: Setting) -> float:
    """The host's share on a CPU: a step of the same tensors and groups with two elements each."""
    runner = Runner(contender, setting._replace(model=setting.model.twin()), 1)
    return statistics.median(runner.block(runner.repeats).wall for _ in range(5))


def row_of_pairs(case: str, peer: str, backend: str, seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The figures of a named case from what ours and the peer took in each round."""
    ratios = [theirs / ours for ours, theirs in seconds]
    return {
        "case": case,
        "peer": peer,
        "backend": backend,
        "ours_us": statistics.median(ours for ours, _ in seconds) * 1e6,
        "peer_us": statistics.median(theirs for _, theirs in seconds) * 1e6,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "rounds": len(seconds),
    }


def quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def row_of(setting: Setting, entry: Entry, copies: int, reference: Entry) -> dict[str, Any]:
    """What the result file holds of a contender."""
    contender = entry.contender
    row: dict[str, Any] = {
        **setting.key,
        "contender": contender.name,
        "library": contender.library,
        "ours": contender.ours,
        "status": entry.status,
        "reason": entry.reason,
        "note": contender.note,
        "rotated_copies": copies,
    }
    times = [sample for half in entry.halves for sample in half]
    if not times:
        return row
    walls = [sample.wall for sample in times]
    spread = quartiles(walls)
    row |= {
        "rounds": len(times),
        "wall_us": statistics.median(walls) * 1e6,
        "wall_quartiles_us": [value * 1e6 for value in spread],
        "noisy": (spread[1] - spread[0]) / statistics.median(walls) > NOISY,
        **entry.figures,
    }
    row["step_us"] = row["wall_us"]
    hosts = [sample.host for sample in times if sample.host is not None]
    devices = [sample.device for sample in times if sample.device is not None]
    processors = [sample.processor for sample in times if sample.processor is not None]
    if processors:
        row["processor_us"] = statistics.median(processors) * 1e6
        row["processor_quartiles_us"] = [value * 1e6 for value in quartiles(processors)]
    if hosts:
        row["host_us"] = statistics.median(hosts) * 1e6
    if devices:
        row["step_us"] = row["device_us"] = statistics.median(devices) * 1e6
        row["device_quartiles_us"] = [value * 1e6 for value in quartiles(devices)]
    if "host_us" in row:
        row["host_us_per_tensor"] = row["host_us"] / max(1, setting.model.tensors)
    if reference.contender.ours and contender.name != reference.contender.name:
        row |= ratios("wall", entry, "ours_times_as_fast")
        if processors:
            row |= ratios("processor", entry, "ours_times_as_fast_on_processor")
        if devices:
            row |= ratios("device", entry, "ours_times_as_fast_on_device")
    return row


def ratios(clock: str, entry: Entry, name: str) -> dict[str, Any]:
    """How many times as fast ours is: the geometric mean of the halves' medians, and the quartiles over all rounds."""
    halves = [
        [getattr(theirs, clock) / getattr(mine, clock) for theirs, mine in zip(half, beside)]
        for half, beside in zip(entry.halves, entry.beside)
    ]
    halves = [half for half in halves if half]
    if not halves:
        return {}
    middle = statistics.geometric_mean([statistics.median(half) for half in halves])
    return {name: middle, f"{name}_quartiles": quartiles([ratio for half in halves for ratio in half])}
