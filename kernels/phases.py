"""The host side of a step: what is launched, in which order.

`Phases` is one device's: what csrc/cuda/phases.cu is for the `cuda` backend.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..plan.step import DeviceStep, Step
from .apply import accumulate_kernel, apply_kernel, move_kernel
from .layout import Bucket, Layout, ints, layout_of
from .prepare import PREPARED, direction_kernel, grad_sq_kernel, pieces_kernel, prepare_kernel
from .reduce import SUMS, copy_kernel, reduce_kernel, total_kernel
from .refresh import DeviceTable, Table
from .rule import DECAYED_SQ, DIRECTION_SQ, FINITE, GRAD_SQ, MAX_HYPER, PARAM_SQ, Rule
from .table import FIRST_STATE, HYPER_ADDRESS, NEEDS, ROW_ACTIVE, ROW_GROUP, STORAGES, TRUST, TRUST_WORDS
from .transform import CLIP_BY_GLOBAL_NORM, CLIP_BY_NORM

# Threads of a program: each has the elements of a tile that 16 bytes of the narrowest column hold.
THREADS = 128
PREPARE_THREADS = 64
# Of the programs that add the sums of a row, which no other program of the row helps.
ADDING_THREADS = 512
# Registers of a thread, at most: six programs of 128 threads a multiprocessor; five where several norms are summed or
# states are codes.
REGISTERS = 80
MORE_REGISTERS = 96
DOUBLE_REGISTERS = 128  # beside states of codes, float64 numbers
PREPARE_REGISTERS = 168  # few programs, of double numbers
COPIED = 1024  # numbers that a program copies


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


def registers_of(bucket: Bucket) -> int:
    """Of a thread that updates elements, at most."""
    if not bucket.has_codes:
        return REGISTERS
    return DOUBLE_REGISTERS if bucket.compute == tl.float64 else MORE_REGISTERS


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
        self._reduced = False  # the sums are those of this step's gradients
        self._measured: list[int] = []
        self._rules = [rules()[name] for name in rule_names]
        self._numels = list(numels)
        self.table = DeviceTable(device, group_count, len(rule_names), capturable)
        self.words = self.table.words[self.table.groups_at :]  # what a plan writes: those of groups and rows
        self._storages = b""
        self._layout = Layout([], *(torch.empty(0, device="cpu") for _ in range(4)), {}, frozenset())
        with self.table.on_device():
            self._listed = {
                name: (rules()[name], ints(device, [row for row, other in enumerate(rule_names) if other == name]))
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
        return self.table.captured()

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
        with self.table.on_device():
            self._refresh(launched)
            layout, table = self._layout, self.table.live
            if launched.exchanged:
                layout.sums.zero_()
            self._launch_reduce(launched, layout, table)
            if launched.exchanged:
                self._copy_sums(layout, launched.exchanged, out=True)
            else:
                counts = (self.table.group_count, self.table.row_count)
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
        with self.table.on_device():
            if self.captured():
                layout, table = self._layout, self._table_for_replays(launched)
            else:
                self._refresh(launched)
                layout, table = self._layout, self.table.live
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
        active = self.table.row_field(ROW_ACTIVE.value)
        return launched.exchanged != 0 or bytes(active) != bytes(active.nbytes)

    def _active_rows_with_norms(self) -> list[int]:
        needs, groups = self._needs(), self.table.row_field(ROW_GROUP.value)
        return [
            row for row, active in enumerate(self.table.row_field(ROW_ACTIVE.value)) if active and needs[groups[row]]
        ]

    def _needs(self) -> list[int]:
        """The norms that each group needs."""
        return self.table.group_field(NEEDS.value).tolist()

    def _refresh(self, launched: LaunchedStep) -> None:
        """Bring the live table and the layout up to date."""
        table = self.table
        table.write_header(launched.step, launched.device)
        table.follow_stream((*self._layout.tensors(), *(listed for _, listed in self._listed.values())))
        storages = table.storages()
        if storages != self._storages:
            columns, groups = table.row_field(STORAGES.value), table.row_field(ROW_GROUP.value)
            self._layout = layout_of(self.device, self._rules, self._numels, columns, groups)
            self._storages = storages
        table.send()

    def _table_for_replays(self, launched: LaunchedStep) -> Table:
        layout = self._layout if self.table.storages() == self._storages else None
        return self.table.for_replays(launched.step, launched.device, layout)

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
        addresses = self.table.group_field(HYPER_ADDRESS.value, MAX_HYPER)
        return bytes(addresses) != bytes(addresses.nbytes)

    def _launch_reduce(self, launched: LaunchedStep, layout: Layout, table: Table) -> None:
        needs, tensors = self._needs(), self._has_tensors()
        for bucket in layout.buckets:
            norms = functools.reduce(int.__or__, (needs[group] for group in bucket.groups)) & ~DIRECTION_SQ.value
            norms |= (GRAD_SQ.value if launched.clips_by_norm else 0) | (FINITE.value if launched.finds_inf else 0)
            self._launch(
                reduce_kernel,
                len(bucket.chunks) if norms else 0,
                *(table.words, self.table.group_count, self.table.row_count, bucket.chunks, layout.sums),
                DTYPES=bucket.dtypes[: FIRST_STATE.value],
                COMPUTE=bucket.compute,
                NORMS=norms,
                WEIGHT_DECAY=bucket.rule.weight_decay_index,
                CLIP=launched.clip,
                FINDS_INF=launched.finds_inf,
                TENSORS=tensors,
                registers=MORE_REGISTERS if norms & (PARAM_SQ.value | DECAYED_SQ.value) else REGISTERS,
            )
        self._launch(
            total_kernel,
            len(layout.totals),
            *(table.words, self.table.group_count, self.table.row_count, layout.totals, layout.sums),
            threads=ADDING_THREADS,
        )

    def _launch_prepare(self, launched: LaunchedStep, layout: Layout, table: Table, reduces: bool) -> None:
        trust = self.table.group_field(TRUST.value, TRUST_WORDS.value)
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
                *(table.words, self.table.group_count, self.table.row_count, listed, len(listed)),
                *(layout.sums, table.records, table.control),
                PREPARE=rule.prepare,
                HYPER_COUNT=len(rule.hyper),
                WEIGHT_DECAY=rule.weight_decay_index,
                STATE_COUNT=rule.tensor_state_count,
                SCALAR_COUNT=rule.scalar_count,
                DRAWS=rule.name in layout.drawing,
                threads=PREPARE_THREADS,
                registers=PREPARE_REGISTERS,
                **constants,
            )

    def _launch_update(self, launched: LaunchedStep, layout: Layout, table: Table, reduces: bool) -> None:
        """Passes alternate direction: the end of the last one is still in the cache."""
        shared = (table.words, self.table.group_count, self.table.row_count)
        directed = [bucket for bucket in layout.buckets if bucket.rule.has_direction]
        for bucket in directed:
            self._launch(
                accumulate_kernel,
                len(bucket.tiles),
                *(*shared, bucket.tiles, table.records, table.control, bucket.tile_sums),
                ACCUMULATE=bucket.rule.accumulate,
                DIRECTION=bucket.rule.direction,
                READ=bucket.read_first,
                BACKWARDS=reduces,
                registers=registers_of(bucket),
                **bucket.constants,
            )
        if any(bucket.rule.keeps_direction for bucket in directed):
            assert launched.step.exchange is not None
            launched.step.exchange(launched.device.device)
        elif directed and launched.exchanged:
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
                    registers=registers_of(bucket),
                    **bucket.constants_of_move,
                )
            else:
                self._launch(
                    apply_kernel,
                    len(bucket.tiles),
                    *arguments,
                    UPDATE=bucket.rule.update,
                    BACKWARDS=reduces,
                    registers=registers_of(bucket),
                    **bucket.constants,
                )

    def _launch_directions(self, layout: Layout, table: Table, *, adds_up: bool, prepares: bool) -> None:
        if adds_up:
            self._launch(pieces_kernel, len(layout.pieces), layout.pieces, layout.tile_sums, threads=ADDING_THREADS)
        for name, directions in layout.directions.items():
            rule = rules()[name]
            self._launch(
                direction_kernel,
                len(directions),
                *(table.words, self.table.group_count, self.table.row_count, directions, layout.tile_sums),
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
        count = self.table.row_count * SUMS.value
        self._launch(copy_kernel, -(-count // COPIED), layout.sums, address, count, OUT=out, BLOCK=COPIED)
