"""TritonPlan: the compiled or the Python plan reads all rows; Triton kernels step some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..tensors import lasting
from .plan import Plan
from .step import Step


class Phases(Protocol):
    """reduce, prepare and apply for the rows of one device: the twin of csrc/phases.h; see kernels/phases.py."""

    words: memoryview  # of groups and rows in its table

    def begin(self) -> None: ...
    def captured(self) -> bool: ...
    def reduce(self, step: Step) -> float: ...
    def apply(self, step: Step) -> None: ...
    def measured_rows(self) -> list[int]: ...


class Reader(Plan, Protocol):
    """A plan that reads all rows, and steps those that are not Triton's."""

    def write_table(self, device: int, words: memoryview) -> None: ...


class TritonRows(NamedTuple):
    """The rows of one device, by their indices in the plan."""

    device: torch.device
    rows: list[int]
    phases: Phases


class TritonPlan:
    """`reader` reads all rows; each device's table is written from what it found, and Triton kernels step its rows.

    Args:
        reader: the compiled plan, or the one in Python; it has the same devices in the same order.
        devices: the rows of each device.
    """

    def __init__(self, reader: Reader, devices: Sequence[TritonRows]) -> None:
        self._reader = reader
        self._devices = devices

    def refresh(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Sequence[tuple[int, str]] | None:
        unready = self._reader.refresh(param_groups, state)
        for index, (_, _, phases) in enumerate(self._devices if unready is not None else ()):
            self._reader.write_table(index, phases.words)
            phases.begin()
        return unready

    def reduce(self, step: Step) -> float:
        total = self._reader.reduce(step)
        with lasting():  # tables and sums, which the phases make when their layout has changed
            for _, _, phases in self._devices:
                total += phases.reduce(step)
        return total

    def non_finite(self) -> bool:
        return self._reader.non_finite()

    def apply(self, step: Step) -> None:
        with lasting():
            for _, _, phases in self._devices:
                phases.apply(step)
        self._reader.apply(step)

    def release(self) -> None:
        self._reader.release()

    def captured(self) -> bool:
        return any(phases.captured() for _, _, phases in self._devices)

    def written(self) -> list[Tensor]:
        return self._reader.written()

    def norms(self) -> list[tuple[int, float, float, float]]:
        on_devices = (rows[row] for _, rows, phases in self._devices for row in phases.measured_rows())
        return [*self._reader.norms(), *((row, 0.0, 0.0, 0.0) for row in on_devices)]
