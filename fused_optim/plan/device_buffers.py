"""Memory on a device that its kernels read and write beside the rows: norms, the loss scale, found_inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..row import NORMS, Row
from ..tensors import is_sharded
from .step import DeviceStep


class DeviceBuffers:
    """What the kernels of one device read and write at each step.

    Args:
        device: of the rows.
        rows: by their indices in the plan, in the order of the device's table.
        measures: the rule or a trust ratio asks for norms.
        exchanges: norms of rows are added up over processes.
    """

    def __init__(self, device: torch.device, rows: dict[int, Row], *, measures: bool, exchanges: bool) -> None:
        self.device = device
        self.rows = rows
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        # Of each row: the norm of its gradient, of its parameter, its trust ratio.
        self.measured = torch.full((len(rows), 3), math.nan, dtype=torch.float32, device=device) if measures else None
        self.exchanged = torch.zeros(len(rows), NORMS + 1, dtype=torch.float64, device=device) if exchanges else None
        self.found_inf: Tensor | None = None  # where the kernels of this step write it
        self.alive: list[Tensor] = []  # until the next step: the kernels read them later

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None, *, finds_inf: bool) -> DeviceStep:
        """Where the kernels of a step find all that. ``finds_inf``: found_inf is to be written, not read."""
        self.alive, self.found_inf = [], None
        scale_address, read = self._address_of(grad_scale), self._address_of(found_inf)
        written = 0
        if finds_inf and found_inf is not None:
            self.found_inf = found_inf.to(self.device)  # itself, where it is there
            written, read = self.found_inf.data_ptr(), 0
        return DeviceStep(
            device=self.device.index or 0,
            grad_scale=scale_address,
            found_inf=read,
            grad_norm=self.grad_norm.data_ptr(),
            non_finite=written,
            measured=0 if self.measured is None else self.measured.data_ptr(),
            exchanged=0 if self.exchanged is None else self.exchanged.data_ptr(),
        )

    def _address_of(self, value: Tensor | None) -> int:
        """Where a kernel finds a number, as float32; 0: there is none."""
        if value is None:
            return 0
        whole: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        value = whole.detach().to(device=self.device, dtype=torch.float32, non_blocking=True).resolve_neg()
        self.alive.append(value)
        return value.data_ptr()
