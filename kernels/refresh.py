"""The table of rows on a device: the words that it should hold, and their way there."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..plan.step import DeviceStep, Step
from .apply import RECORD, apply_kernel
from .layout import Layout
from .table import ADDRESSES, GROUP, HEADER, ROW, STORAGES, bits

# Whether the kernels run in Python, on the CPU: triton decides it when they are defined.
INTERPRETED = not isinstance(apply_kernel, triton.runtime.JITFunction)
# Tables that are kept ready for captures into CUDA graphs, during which none can be allocated.
SPARES = 2
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


class DeviceTable:
    """The live table of one device's rows, and those of captured steps.

    Args:
        device: where it is; the CPU if triton interprets the kernels.
        group_count: how many groups the optimizer has.
        row_count: how many rows the device has.
        capturable: whether steps may be captured into CUDA graphs.
    """

    def __init__(self, device: torch.device, group_count: int, row_count: int, capturable: bool) -> None:
        self.device = device
        self.sent = 0  # words copied to the device, so far
        self.group_count, self.row_count = group_count, row_count
        self.groups_at = len(HEADER)
        self.rows_at = self.groups_at + len(GROUP) * group_count
        self._numbers = array("q", bytes(8 * (self.rows_at + len(ROW) * row_count)))
        self.words = memoryview(self._numbers)  # what the table should hold
        self._host = torch.frombuffer(self._numbers, dtype=torch.int64)
        # Compared and sent section by section: those that change together stand side by side.
        bounds = (0, self.groups_at, self.rows_at, self.rows_at + 2 * row_count, len(self._numbers))
        self._sections = list(itertools.pairwise(bounds))
        self._mirror = [b""] * len(self._sections)  # of what is on the device; empty: not known
        self._capturable = capturable
        self._spares: list[Replay] = []
        self._replays: list[tuple[Replay, Layout]] = []
        self._stream: torch.cuda.Stream | None = None  # of the last step
        if self.captured():  # which copies of numbers from the host would end
            raise RuntimeError(NOT_READY)
        with self.on_device():
            self.live = self._new_table()

    def captured(self) -> bool:
        """Whether torch's stream on this device is being captured into a graph."""
        if INTERPRETED:
            return False
        with self.on_device():
            return torch.cuda.is_current_stream_capturing()

    def on_device(self) -> AbstractContextManager[Any]:
        if INTERPRETED:
            return _quiet()
        if torch.cuda.current_device() == self.device.index:
            return nullcontext()
        return torch.cuda.device(self.device)

    def _new_table(self) -> Table:
        return Table(
            torch.zeros(len(self._numbers), dtype=torch.int64, device=self.device),
            torch.zeros(self.row_count, RECORD.value, dtype=torch.float64, device=self.device),
            torch.zeros(1, dtype=torch.int32, device=self.device),
            torch.zeros(1, dtype=torch.float64, device=self.device),
        )

    def group_field(self, field: int, count: int = 1) -> memoryview:
        begin = self.groups_at + field * self.group_count
        return self.words[begin : begin + count * self.group_count]

    def row_field(self, field: int) -> memoryview:
        begin = self.rows_at + field * self.row_count
        return self.words[begin : begin + self.row_count]

    def storages(self) -> bytes:
        """The packed dtypes of all rows."""
        return bytes(self.row_field(STORAGES.value))

    def write_header(self, step: Step, device: DeviceStep) -> None:
        clip = step.clip
        numbers = (step.grad_scale, clip.norm, clip.min, clip.max, step.global_norm or 0.0)
        addresses = (getattr(device, name) for name in ADDRESSES)
        self._numbers[: self.groups_at] = array("q", (*map(bits, numbers), *addresses))

    def send(self) -> None:
        """Bring the live table up to date: one copy of the words between the first and the last that has changed."""
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
        self.live.words[begin:end].copy_(source, non_blocking=True)
        self._mirror = found
        self.sent += end - begin

    def follow_stream(self, tensors: Iterable[Tensor]) -> None:
        """Wait for the last step where this one is on another stream.

        Args:
            tensors: what the kernels read beside the table.
        """
        if INTERPRETED:
            return
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            for tensor in (*self.live, *tensors):
                tensor.record_stream(stream)
        self._stream = stream

    def for_replays(self, step: Step, device: DeviceStep, layout: Layout | None) -> Table:
        """A table of this step for the replays of the graph that is being captured.

        A later step would change the live one under them. Each replay copies its words from pinned memory.

        Args:
            step: the step that is captured, and
            device: what it says of this device.
            layout: of the rows; None: it is not that of their storages any more.

        Raises:
            RuntimeError: nothing is ready for a capture; the text says what to do.
        """
        if not self._spares or layout is None:
            self._capturable = True
            raise RuntimeError(NOT_READY)
        self.write_header(step, device)
        replay = self._spares.pop()
        replay.staging.copy_(self._host)
        replay.table.words.copy_(replay.staging, non_blocking=True)
        self._replays.append((replay, layout))
        return replay.table


def _quiet() -> AbstractContextManager[Any]:
    """No warnings of numpy's about overflows and NaN, which an interpreted kernel's arithmetic would give."""
    import numpy

    return numpy.errstate(all="ignore")
