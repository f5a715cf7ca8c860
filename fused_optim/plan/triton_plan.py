"""A plan some of whose rows are stepped by kernels that Python launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..options.clip import ClipOptions
from .plan import DeviceScalars, Exchange, Plan


class Phases(Protocol):
    """reduce, prepare and apply for the rows of one device; see kernels/phases.py."""

    words: memoryview
    groups_at: int

    def captured(self) -> bool: ...
    def reduce(self, step: Any) -> float: ...
    def run(self, step: Any, exchange: Any) -> None: ...
    def measured_rows(self) -> list[int]: ...
    def is_active(self) -> bool: ...


class Reader(Plan, Protocol):
    """A plan that reads all rows, and steps those that are not launched."""

    def write_table(self, device: int, words: memoryview) -> None: ...


class LaunchedRows(NamedTuple):
    """The rows of one device, by their indices in the plan."""

    device: torch.device
    rows: list[int]
    phases: Phases


class LaunchedPlan:
    """Reads through another plan, writes the tables of what that found, and launches.

    Args:
        reader: the compiled plan, or the one in Python; it has the same devices in the same order.
        launched: the rows of each device.
        step: makes what the phases take of a step.
    """

    def __init__(self, reader: Reader, launched: Sequence[LaunchedRows], step: Any) -> None:
        self._reader = reader
        self._launched = launched
        self._step = step
        self._reduced = False
        self._measured: list[int] = []  # rows of which the last run left norms on their device

    def refresh(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Sequence[tuple[int, str]] | None:
        self._reduced = False
        attention = self._reader.refresh(param_groups, state)
        for index, (_, _, phases) in enumerate(self._launched if attention is not None else ()):
            self._reader.write_table(index, phases.words[phases.groups_at :])
        return attention

    def reduce(
        self,
        grad_scale: float,
        threads: int,
        clip: ClipOptions,
        scalars: Sequence[DeviceScalars] = (),
        exchange: Exchange | None = None,
        finds_inf: bool = False,
    ) -> float:
        total = self._reader.reduce(grad_scale, threads, clip, (), exchange, finds_inf)
        for device, _, phases in self._launched:
            of_device = _of_device(scalars, device)
            exchanges = of_device[-1] != 0 and exchange is not None
            if phases.is_active() or exchanges:
                total += phases.reduce(self._step(grad_scale, clip, None, False, of_device[1:]))
            if exchanges and exchange is not None:
                total += exchange(of_device[0])
        self._reduced = True
        return total

    def non_finite(self) -> bool:
        return self._reader.non_finite()

    def run(
        self,
        grad_scale: float,
        threads: int,
        clip: ClipOptions,
        global_norm: float | None,
        scalars: Sequence[DeviceScalars] = (),
        exchange: Exchange | None = None,
    ) -> None:
        measured = []
        for device, rows, phases in self._launched:
            of_device = _of_device(scalars, device)
            index, exchanges = of_device[0], of_device[-1] != 0 and exchange is not None
            if phases.is_active() or exchanges:
                step = self._step(grad_scale, clip, global_norm, self._reduced, of_device[1:])
                phases.run(step, None if exchange is None else lambda index=index: exchange(index))
                measured += [rows[row] for row in phases.measured_rows() if of_device[5] != 0]
        self._measured = measured
        self._reader.run(grad_scale, threads, clip, global_norm, (), exchange)

    def captured(self) -> bool:
        return any(phases.captured() for _, _, phases in self._launched)

    def touched(self) -> list[Tensor]:
        return self._reader.touched()

    def release(self) -> None:
        self._reader.release()

    def norms(self) -> list[tuple[int, float, float, float]]:
        return [*self._reader.norms(), *((row, 0.0, 0.0, 0.0) for row in self._measured)]


def _of_device(scalars: Sequence[DeviceScalars], device: torch.device) -> DeviceScalars:
    return next(of_device for of_device in scalars if of_device[0] == (device.index or 0))
