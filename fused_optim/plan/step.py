"""What a plan is told of one step. C++ reads the attributes by these names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..options.clip import ClipOptions

# Called before norms are used, to add up those of rows of which other processes have parts: with the norms of all rows,
# float64 of shape [rows, `NORMS`], or with the index of a CUDA device, for those of its rows. Returns the sum of
# squares over rows that it has set to 0, or what the device adds to that of `reduce`.
Exchange = Callable[[Any], float]


@dataclass(slots=True)
class DeviceStep:
    """The numbers of a step on one device: addresses there; 0: there is none."""

    device: int  # its index
    grad_scale: int = 0  # the loss scale, by which gradients are divided
    found_inf: int = 0  # where it is not 0, nothing is stepped
    grad_norm: int = 0  # the global norm goes here
    non_finite: int = 0  # 1 goes here where a gradient element is infinite or NaN
    measured: int = 0  # norms of the device's rows, float32 of shape [rows, 3]
    exchanged: int = 0  # norms that processes exchange, float64 of shape [rows, `NORMS` + 1]


@dataclass(slots=True)
class Step:
    """One step, the same for all rows."""

    grad_scale: float  # 1 / loss scale, for the rows of the host
    threads: int
    clip: ClipOptions
    finds_inf: bool  # look for gradient elements that are not finite
    devices: Sequence[DeviceStep]
    exchange: Exchange | None
    global_norm: float | None = None  # of all gradients; None: a device clips by that of its own
