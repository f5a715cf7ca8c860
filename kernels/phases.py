"""The host side: the table's refresh, and the launches of a step.

`Phases` is one device's: what csrc/cuda/phases.cu is for the `cuda` backend.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.step import DeviceStep, Step
from .apply import RECORD, TILE, accumulate_kernel, apply_kernel, move_kernel
from .prepare import PREPARED, direction_kernel, grad_sq_kernel, prepare_kernel
from .reduce import CHUNK_TILES, MOST_CHUNKS, SUMS, copy_kernel, reduce_kernel, total_kernel
from .rule import DECAYED_SQ, DIRECTION_SQ, FINITE, GRAD_SQ, MAX_HYPER, PARAM_SQ, Rule
from .table import (
    ADDRESSES,
    COLUMNS,
    FIRST_STATE,
    FLOAT64,
    GROUP,
    HEADER,
    HYPER_ADDRESS,
    MASTER,
    NEEDS,
    NONE,
    PARAM,
    ROW,
    ROW_ACTIVE,
    ROW_GROUP,
    STORAGES,
    TRUST,
    TRUST_WORDS,
    bits,
)
from .transform import CLIP_BY_GLOBAL_NORM, CLIP_BY_NORM

# Whether the kernels run in Python, on the CPU: triton decides it when they are defined.
INTERPRETED = not isinstance(apply_kernel, triton.runtime.JITFunction)
# Threads of a program: each has the elements of a tile that 16 bytes of the narrowest column hold.
THREADS = 128
PREPARE_THREADS = 64
# Of the programs that add the sums of a row, which no other program of the row helps.
ADDING_THREADS = 512
# Registers of a thread, at most: six programs of 128 threads a multiprocessor; five where several norms are summed.
REGISTERS = 80
SUM_REGISTERS = 96
PREPARE_REGISTERS = 168  # few programs, of double numbers
COPIED = 1024  # numbers that a program copies
# Tables that are kept ready for captures into CUDA graphs, during which none can be allocated.
SPARES = 2


@functools.cache
def rules() -> dict[str, Rule]:
    """All rules by name: those that the modules in rules/ list."""
    package = importlib.import_module(f"{__package__}.rules")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {rule.name: rule for module in modules for rule in getattr(module, "RULES", ())}


@functools.cache
def options(threads: int, registers: int) -> dict[str, Any]:
    """What a kernel is compiled with; the interpreter takes nothing."""
    if not isinstance(apply_kernel, triton.runtime.JITFunction):
        return {}
    target = triton.runtime.driver.active.get_current_target()
    limit = {"maxnreg": registers} if target.backend == "cuda" else {}
    # Contraction is off, as in the other backends: the same bits from the same scalars.
    return {"enable_fp_fusion": False, "num_warps": threads // target.warp_size, **limit}


class LaunchedStep(NamedTuple):
    """A step as the kernels of one device are launched for it."""

    step: Step
    device: DeviceStep
    reduced: bool  # `reduce` has seen these gradients already

    @property
    def finds_inf(self) -> bool:
        return self.device.non_finite != 0

    @property
    def exchanged(self) -> int:
        return self.device.exchanged

    @property
    def clip(self) -> int:
        return self.step.clip.kind

    @property
    def clips_by_norm(self) -> bool:
        return self.clip in (CLIP_BY_GLOBAL_NORM.value, CLIP_BY_NORM.value)


class Bucket(NamedTuple):
    """Rows of one rule and the same storages: one launch a phase."""

    rule: Rule
    groups: frozenset[int]
    dtypes: tuple[int, ...]  # of param, grad, master, and the states that have a number an element
    compute: tl.dtype
    tiles: Tensor  # int32 [tiles, 2]: row, index of the tile in it
    chunks: Tensor  # int32 [chunks, 3]: row, first tile, where its sums go
    tile_sums: Tensor  # float64 [tiles, 2], a part of the layout's; empty for a rule without a direction

    @property
    def constants(self) -> dict[str, Any]:
        """What its element kernels are compiled for."""
        return {
            "COUNT": self.rule.scalar_count,
            "FIRST": self.rule.tensor_state_count,
            "DTYPES": self.dtypes,
            "COMPUTE": self.compute,
        }


class Layout(NamedTuple):
    """The rows' buckets and where their sums go; other storages make another."""

    buckets: list[Bucket]
    totals: Tensor  # int32 [rows, 3]: row, first of its chunks' sums, number of chunks
    sums: Tensor  # float64 [rows and chunks, SUMS]
    tile_sums: Tensor  # float64 [tiles of rules with a direction, 2]
    directions: dict[str, Tensor]  # of each such rule, int32 [rows, 3]: row, first of its tiles' sums, number of tiles


NOT_READY = (
    "the triton backend is not ready for this capture into a CUDA graph; take one step with these gradients and states "
    "outside of a capture first"
)


class Table(NamedTuple):
    """What a step reads and writes beside the tensors of the optimizer."""

    words: Tensor  # int64
    records: Tensor  # float64 [rows, RECORD]
    control: Tensor  # int32 [1]: whether the step is skipped
    grad_sq: Tensor  # float64 [1]


class Replay(NamedTuple):
    """What the replays of a captured step read: nothing else ever writes it."""

    table: Table
    staging: Tensor  # pinned words, which each replay copies into the table


class Phases:
    """reduce, prepare and apply for the rows of one device.

    Args:
        device: where they are; the CPU if triton interprets the kernels.
        rule_names: the rule of each row.
        numels: the number of elements of each row.
        group_count: how many groups the optimizer has.
        capturable: whether steps may be captured into CUDA graphs.
    """

    def __init__(
        self, device: torch.device, rule_names: Sequence[str], numels: Sequence[int], group_count: int, capturable: bool
    ) -> None:
        self.device = device
        self.launches = 0  # of kernels, so far
        self.sent = 0  # words copied to the device, so far
        self._reduced = False  # the sums are those of this step's gradients
        self._measured: list[int] = []
        self._rules = [rules()[name] for name in rule_names]
        self._numels = list(numels)
        self._group_count, self._row_count = group_count, len(rule_names)
        self.groups_at = len(HEADER)
        self.rows_at = self.groups_at + len(GROUP) * group_count
        self._numbers = array("q", bytes(8 * (self.rows_at + len(ROW) * self._row_count)))
        self.words = memoryview(self._numbers)  # what the table should hold
        self._host = torch.frombuffer(self._numbers, dtype=torch.int64)
        # Compared and sent section by section: those that change together stand side by side.
        bounds = (0, self.groups_at, self.rows_at, self.rows_at + 2 * self._row_count, len(self._numbers))
        self._sections = list(itertools.pairwise(bounds))
        self._mirror = [b""] * len(self._sections)  # of what is on the device; empty: not known
        self._storages = b""
        self._layout = Layout([], *(torch.empty(0, device="cpu") for _ in range(3)), {})
        self._capturable = capturable
        self._spares: list[Replay] = []
        self._replays: list[tuple[Replay, Layout]] = []
        self._stream: torch.cuda.Stream | None = None  # of the last step
        if self.captured():  # which copies of numbers from the host would end
            raise RuntimeError(NOT_READY)
        with self._on_device():
            self._live = self._new_table()
            self._listed = {
                name: (rules()[name], self._ints([row for row, other in enumerate(rule_names) if other == name]))
                for name in dict.fromkeys(rule_names)
            }

    def begin(self) -> None:
        """The words of groups and rows are those of a new step."""
        self._reduced = False

    def measured_rows(self) -> list[int]:
        """The rows of which the last step left norms on the device."""
        return self._measured

    def captured(self) -> bool:
        """Whether torch's stream on this device is being captured into a graph."""
        if INTERPRETED:
            return False
        with self._on_device():
            return torch.cuda.is_current_stream_capturing()

    def reduce(self, step: Step) -> float:
        """The sum of squares over the gradients that take part in clipping; waits for the device.

        Where the step exchanges norms it waits for nothing, and returns what the exchange adds.
        """
        launched = self._launched(step)
        if not self._takes_part(launched):
            return 0.0
        if self.captured():
            raise RuntimeError(
                "a global norm over several devices, or over parameters that the eager path steps, cannot be captured: "
                "it is added on the host"
            )
        with self._on_device():
            self._refresh(launched)
            layout, table = self._layout, self._live
            if launched.exchanged:
                layout.sums.zero_()
            self._launch_reduce(launched, layout, table)
            if launched.exchanged:
                self._copy_sums(layout, launched.exchanged, out=True)
            else:
                counts = (self._group_count, self._row_count)
                self._launch(grad_sq_kernel, 1, table.words, *counts, layout.sums, table.grad_sq)
        self._reduced = True
        if not launched.exchanged:
            return table.grad_sq.item()
        assert step.exchange is not None
        return step.exchange(launched.device.device)

    def apply(self, step: Step) -> None:
        """The step of all active rows; waits for nothing.

        The exchange is called when the norms of directions are on their way to where processes exchange them.
        """
        launched = self._launched(step)
        self._measured = self._active_rows_with_norms() if launched.device.measured else []
        if not self._takes_part(launched):
            return
        with self._on_device():
            if self.captured():
                layout, table = self._layout, self._table_for_replays(launched)
            else:
                self._refresh(launched)
                layout, table = self._layout, self._live
            needs = self._needs()
            reduces = launched.clips_by_norm or launched.finds_inf or any(need & ~DIRECTION_SQ.value for need in needs)
            if reduces and not launched.reduced:
                self._launch_reduce(launched, layout, table)
            if launched.reduced and launched.exchanged:
                self._copy_sums(layout, launched.exchanged, out=False)
            self._launch_prepare(launched, layout, table, reduces)
            self._launch_update(launched, layout, table, reduces)

    def _launched(self, step: Step) -> LaunchedStep:
        index = self.device.index or 0
        return LaunchedStep(step, next(device for device in step.devices if device.device == index), self._reduced)

    def _takes_part(self, launched: LaunchedStep) -> bool:
        """Without an active row there is nothing to do, unless other processes wait for an exchange."""
        active = self._row_field(ROW_ACTIVE.value)
        return launched.exchanged != 0 or bytes(active) != bytes(active.nbytes)

    def _active_rows_with_norms(self) -> list[int]:
        needs, groups = self._needs(), self._row_field(ROW_GROUP.value)
        return [row for row, active in enumerate(self._row_field(ROW_ACTIVE.value)) if active and needs[groups[row]]]

    # The table ----------------------------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager[Any]:
        if INTERPRETED:
            return _quiet()
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _triples(self, values: Sequence[tuple[int, int, int]]) -> Tensor:
        return self._ints([number for entry in values for number in entry]).view(-1, 3)

    def _new_table(self) -> Table:
        return Table(
            torch.zeros(len(self._numbers), dtype=torch.int64, device=self.device),
            torch.zeros(self._row_count, RECORD.value, dtype=torch.float64, device=self.device),
            torch.zeros(1, dtype=torch.int32, device=self.device),
            torch.zeros(1, dtype=torch.float64, device=self.device),
        )

    def _needs(self) -> list[int]:
        """The norms that each group needs."""
        return self._group_field(NEEDS.value).tolist()

    def _group_field(self, field: int, count: int = 1) -> memoryview:
        begin = self.groups_at + field * self._group_count
        return self.words[begin : begin + count * self._group_count]

    def _row_field(self, field: int) -> memoryview:
        begin = self.rows_at + field * self._row_count
        return self.words[begin : begin + self._row_count]

    def _write_header(self, launched: LaunchedStep) -> None:
        step, clip = launched.step, launched.step.clip
        numbers = (step.grad_scale, clip.norm, clip.min, clip.max, step.global_norm or 0.0)
        addresses = (getattr(launched.device, name) for name in ADDRESSES)
        self._numbers[: self.groups_at] = array("q", (*map(bits, numbers), *addresses))

    def _refresh(self, launched: LaunchedStep) -> None:
        """Bring the live table up to date: one copy of the words between the first and the last that has changed."""
        self._write_header(launched)
        self._follow_stream()
        storages = bytes(self._row_field(STORAGES.value))
        if storages != self._storages:
            self._layout, self._storages = self._new_layout(), storages
        if self._capturable:
            while len(self._spares) < SPARES:
                staging = torch.empty(len(self._numbers), dtype=torch.int64, device="cpu", pin_memory=not INTERPRETED)
                self._spares.append(Replay(self._new_table(), staging))
        found = [bytes(self.words[begin:end]) for begin, end in self._sections]
        changed = [place for place, (new, old) in enumerate(zip(found, self._mirror)) if new != old]
        if not changed:
            return
        begin, end = self._sections[changed[0]][0], self._sections[changed[-1]][1]
        source = self._host[begin:end]
        self._mirror = [b""] * len(self._sections)  # until the words are on their way
        if not INTERPRETED:
            # Pinned memory of torch's, which it gives to nobody before the copy is done.
            source = torch.empty(end - begin, dtype=torch.int64, device="cpu", pin_memory=True).copy_(source)
        self._live.words[begin:end].copy_(source, non_blocking=True)
        self._mirror = found
        self.sent += end - begin

    def _follow_stream(self) -> None:
        """Wait for the last step where this one is on another stream."""
        if INTERPRETED:
            return
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            layout = self._layout
            of_buckets = [tensor for bucket in layout.buckets for tensor in (bucket.tiles, bucket.chunks)]
            of_layout = (layout.totals, layout.sums, layout.tile_sums, *layout.directions.values())
            for tensor in (*self._live, *of_layout, *of_buckets, *(listed for _, listed in self._listed.values())):
                tensor.record_stream(stream)
        self._stream = stream

    def _table_for_replays(self, launched: LaunchedStep) -> Table:
        """A table of this step for the replays of the graph that is being captured.

        A later step would change the live one under them. Each replay copies its words from pinned memory.

        Raises:
            RuntimeError: nothing is ready for a capture; the text says what to do.
        """
        if not self._spares or bytes(self._row_field(STORAGES.value)) != self._storages:
            self._capturable = True
            raise RuntimeError(NOT_READY)
        self._write_header(launched)
        replay = self._spares.pop()
        replay.staging.copy_(self._host)
        replay.table.words.copy_(replay.staging, non_blocking=True)
        self._replays.append((replay, self._layout))
        return replay.table

    # Buckets ------------------------------------------------------------------------------------------------------

    def _new_layout(self) -> Layout:
        """The rows by rule and storages. A row that lacks something cannot be active, and is in no bucket."""
        found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for row, (rule, word) in enumerate(zip(self._rules, self._row_field(STORAGES.value))):
            columns = [word >> (8 * column) & 255 for column in range(COLUMNS)]
            states = columns[FIRST_STATE.value + rule.tensor_state_count : FIRST_STATE.value + len(rule.states)]
            dtypes = (*columns[: FIRST_STATE.value], *states)
            present = (*dtypes[: MASTER.value], *states)
            if (self._numels[row] or rule.has_direction) and NONE.value not in present:
                found.setdefault((rule.name, dtypes), []).append(row)
        groups = self._row_field(ROW_GROUP.value)
        slots = self._row_count
        totals: list[tuple[int, int, int]] = []
        directions: dict[str, list[tuple[int, int, int]]] = {}
        summed = 0  # tiles of rules with a direction
        parts: list[tuple[Rule, tuple[int, ...], list[int], Tensor, Tensor, int]] = []
        for (name, dtypes), rows in found.items():
            rule = rules()[name]
            tile_counts = [-(-self._numels[row] // TILE.value) for row in rows]
            per_chunk = [tiles_of_chunk(self._numels[row]) for row in rows]
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
            for row, count in zip(rows, tile_counts) if rule.has_direction else ():
                directions.setdefault(name, []).append((row, summed, count))
                summed += count
        tile_sums = torch.zeros(summed, 2, dtype=torch.float64, device=self.device)
        buckets = [
            Bucket(
                rule,
                frozenset(groups[row] for row in rows),
                dtypes,
                tl.float64 if dtypes[PARAM.value] == FLOAT64.value else tl.float32,
                tiles.to(device=self.device, dtype=torch.int32),
                chunks.to(device=self.device, dtype=torch.int32),
                tile_sums[first:] if rule.has_direction else tile_sums[:0],
            )
            for rule, dtypes, rows, tiles, chunks, first in parts
        ]
        return Layout(
            buckets,
            self._triples(totals),
            torch.zeros(slots, SUMS.value, dtype=torch.float64, device=self.device),
            tile_sums,
            {name: self._triples(of_rule) for name, of_rule in directions.items()},
        )

    # Launches -----------------------------------------------------------------------------------------------------

    def _launch(
        self,
        kernel: Any,
        programs: int,
        *arguments: Any,
        threads: int = THREADS,
        registers: int = REGISTERS,
        **constants: Any,
    ) -> None:
        if programs == 0:
            return
        kernel[(programs,)](*arguments, **constants, **options(threads, registers))
        self.launches += 1

    def _has_tensors(self) -> bool:
        """Whether some hyperparameter is a tensor that the kernels read where it is."""
        addresses = self._group_field(HYPER_ADDRESS.value, MAX_HYPER)
        return bytes(addresses) != bytes(addresses.nbytes)

    def _launch_reduce(self, launched: LaunchedStep, layout: Layout, table: Table) -> None:
        needs, tensors = self._needs(), self._has_tensors()
        for bucket in layout.buckets:
            norms = functools.reduce(int.__or__, (needs[group] for group in bucket.groups)) & ~DIRECTION_SQ.value
            norms |= (GRAD_SQ.value if launched.clips_by_norm else 0) | (FINITE.value if launched.finds_inf else 0)
            self._launch(
                reduce_kernel,
                len(bucket.chunks) if norms else 0,
                *(table.words, self._group_count, self._row_count, bucket.chunks, layout.sums),
                DTYPES=bucket.dtypes[: FIRST_STATE.value],
                COMPUTE=bucket.compute,
                NORMS=norms,
                WEIGHT_DECAY=bucket.rule.weight_decay_index,
                CLIP=launched.clip,
                FINDS_INF=launched.finds_inf,
                TENSORS=tensors,
                registers=SUM_REGISTERS if norms & (PARAM_SQ.value | DECAYED_SQ.value) else REGISTERS,
            )
        self._launch(
            total_kernel,
            len(layout.totals),
            *(table.words, self._group_count, self._row_count, layout.totals, layout.sums),
            threads=ADDING_THREADS,
        )

    def _launch_prepare(self, launched: LaunchedStep, layout: Layout, table: Table, reduces: bool) -> None:
        trust = self._group_field(TRUST.value, TRUST_WORDS.value)
        constants = {
            "CLIP": launched.clip,
            "FINDS_INF": launched.finds_inf,
            "ADDS_NORM": launched.clips_by_norm and launched.step.global_norm is None,
            "EXCHANGED": launched.exchanged != 0,
            "MEASURES": reduces,
            "TRUSTS": bytes(trust) != bytes(trust.nbytes),
            "TENSORS": self._has_tensors(),
        }
        for rule, listed in self._listed.values():
            self._launch(
                prepare_kernel,
                -(-len(listed) // PREPARED.value),
                *(table.words, self._group_count, self._row_count, listed, len(listed)),
                *(layout.sums, table.records, table.control),
                PREPARE=rule.prepare,
                HYPER_COUNT=len(rule.hyper),
                WEIGHT_DECAY=rule.weight_decay_index,
                STATE_COUNT=rule.tensor_state_count,
                SCALAR_COUNT=rule.scalar_count,
                threads=PREPARE_THREADS,
                registers=PREPARE_REGISTERS,
                **constants,
            )

    def _launch_update(self, launched: LaunchedStep, layout: Layout, table: Table, reduces: bool) -> None:
        """Passes alternate direction: the end of the last one is still in the cache."""
        shared = (table.words, self._group_count, self._row_count)
        directed = [bucket for bucket in layout.buckets if bucket.rule.has_direction]
        for bucket in directed:
            self._launch(
                accumulate_kernel,
                len(bucket.tiles),
                *(*shared, bucket.tiles, table.records, table.control, bucket.tile_sums),
                ACCUMULATE=bucket.rule.accumulate,
                DIRECTION=bucket.rule.direction,
                BACKWARDS=reduces,
                **bucket.constants,
            )
        if directed and launched.exchanged:
            layout.sums.zero_()
            self._launch_directions(layout, table, adds_up=True, prepares=False)
            self._copy_sums(layout, launched.exchanged, out=True)
            exchange = launched.step.exchange
            if exchange is not None:
                exchange(launched.device.device)
            self._copy_sums(layout, launched.exchanged, out=False)
            self._launch_directions(layout, table, adds_up=False, prepares=True)
        else:
            self._launch_directions(layout, table, adds_up=True, prepares=True)
        for bucket in layout.buckets:
            arguments = (*shared, bucket.tiles, table.records, table.control)
            if bucket.rule.has_direction:
                self._launch(
                    move_kernel,
                    len(bucket.tiles),
                    *arguments,
                    DIRECTION=bucket.rule.direction,
                    STEP_SIZE=bucket.rule.step_size_index,
                    BACKWARDS=not reduces,
                    **bucket.constants,
                )
            else:
                self._launch(
                    apply_kernel,
                    len(bucket.tiles),
                    *arguments,
                    UPDATE=bucket.rule.update,
                    BACKWARDS=reduces,
                    **bucket.constants,
                )

    def _launch_directions(self, layout: Layout, table: Table, *, adds_up: bool, prepares: bool) -> None:
        for name, directions in layout.directions.items():
            rule = rules()[name]
            self._launch(
                direction_kernel,
                len(directions),
                *(table.words, self._group_count, self._row_count, directions, layout.tile_sums),
                *(layout.sums, table.records, table.control),
                SCALE_DIRECTION=rule.scale_direction,
                HYPER_COUNT=len(rule.hyper),
                STEP_SIZE=rule.step_size_index,
                ADDS_UP=adds_up,
                PREPARES=prepares,
                TENSORS=self._has_tensors(),
                threads=ADDING_THREADS,
            )

    def _copy_sums(self, layout: Layout, address: int, *, out: bool) -> None:
        """The rows' sums to where processes exchange them, or back."""
        count = self._row_count * SUMS.value
        self._launch(copy_kernel, -(-count // COPIED), layout.sums, address, count, OUT=out, BLOCK=COPIED)


def tiles_of_chunk(numel: int) -> int:
    """How many tiles of a row a program of the reduce phase sums: `chunk_tiles` in reduce.py."""
    return max(-(-numel // (MOST_CHUNKS.value * TILE.value)), CHUNK_TILES.value)


def _quiet() -> AbstractContextManager[Any]:
    """What overflows or is none of the numbers is no news to the caller of an interpreted kernel."""
    import numpy

    return numpy.errstate(all="ignore")


def _repeated(rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[sum(counts), 2]: each row as often as its count, and which of them it is."""
    repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")  # whatever the default device is
    of_row = torch.tensor(rows, dtype=torch.int64, device="cpu")
    first = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    return torch.stack([of_row.repeat_interleave(repeats), torch.arange(len(first), device="cpu") - first], 1)
