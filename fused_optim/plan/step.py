"""What a step needs to know beside its rows: the twin of csrc/step.h, which reads it by the names of its attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..options.clip import ClipOptions

# Called before norms are used, to add up those of rows of which other processes have parts: with the norms of all rows,
# a writable buffer of float64 [rows, `NORMS`], or with the index of a device, for those of its rows. Returns the sum of
# squares over rows that it has set to 0, or what the device adds to that of `reduce`.
Exchange = Callable[[Any], float]


@dataclass(slots=True)
class DeviceStep:
    """A step's numbers on one device: addresses of float32 numbers there, where nothing else is said; 0: none."""

    device: int  # its index
    grad_scale: int = 0  # read: the loss scale; takes the place of `Step.grad_scale`
    found_inf: int = 0  # read: where it is not 0, nothing changes, the step counts included
    grad_norm: int = 0  # written: the gradients' global norm, if the clip asks for norms
    non_finite: int = 0  # written: 1 if some gradient is infinite or NaN, in which case nothing changes; otherwise 0
    measured: int = 0  # written: [rows, 3], grad norm, param norm and trust ratio of the device's rows
    exchanged: int = 0  # [rows, `NORMS` + 1] in float64: the norms that processes exchange


@dataclass(slots=True)
class Step:
    """One step of a plan."""

    grad_scale: float  # 1 / loss scale
    threads: int
    clip: ClipOptions
    finds_inf: bool  # look for gradient elements that are not finite
    devices: Sequence[DeviceStep]
    exchange: Exchange | None  # `apply` calls it only where the step length depends on the norm of a direction
    global_norm: float | None = None  # of all gradients; None: each device takes that of its own rows, without waiting
