"""One plan as the step uses it: rows, the native plan that reads and steps them, and what that needs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options.clip import NO_CLIP, ClipOptions
from ..row import Row
from ..rule.contract import Rule
from ..tensors import is_flattened, layout_of
from .agreement import Agreement
from .device_buffers import DeviceBuffers
from .directions import Directions, Settings
from .loss_scale import LossScale
from .plan import DEVICE_BACKENDS, Plan, why_not_native
from .shards import Shards
from .step import Step


def is_on_device(row: Row) -> bool:
    """Whether kernels step a row without anything waiting for them."""
    return row.native and row.backend in DEVICE_BACKENDS


class BuiltPlan:
    """The rows of an optimizer until its groups change.

    Args:
        rows: one a parameter, in the order of the groups.
        native: reads and steps them.
        shards: of each CUDA device and, at None, of the host: rows of which other processes have parts.
        measures: the rule or a trust ratio asks for norms.
        reduces: norms are needed before the first pass.
        same_rows: what the processes have found to be the same everywhere.
        directions: those that are made orthogonal between two passes.
        agreement: what the processes agree on before each step, where they exchange matrices.
        settings: what the groups said of directions when the plan was built.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        native: Plan,
        shards: Mapping[torch.device | None, Shards],
        *,
        measures: bool,
        reduces: bool,
        same_rows: str,
        directions: Directions | None,
        agreement: Agreement | None,
        settings: Settings | None,
    ) -> None:
        self.rows, self.native, self.shards, self.same_rows = rows, native, shards, same_rows
        self.measures, self.reduces, self.directions, self.agreement = measures, reduces, directions, agreement
        self._settings = settings
        self.flattened = any(is_flattened(row.param) for row in rows)
        self.buffers = [
            DeviceBuffers(device, of_device, measures=measures, exchanges=device in shards)
            for device, of_device in rows_on_devices(rows).items()
        ]
        self._step = Step(1.0, 1, NO_CLIP, False, (), None)
        # What only one CUDA device steps reads everything there, and nothing waits for it.
        self.waits = len(self.buffers) != 1 or len(self.buffers[0].rows) != len(rows)
        self.asks_first = self.waits or agreement is not None  # for found_inf, before anything else

    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any], defaults: dict[str, Any]
    ) -> Sequence[tuple[int, str]] | None:
        """Read everything again: the rows that cannot be stepped as they are, or None: the plan is another's."""
        found = self.native.refresh(param_groups, state)
        if found is not None and self._settings is not None and not self._settings.hold(param_groups):
            return None
        if not found:
            return found
        for index, kind in found:
            if kind == "param" and not self._is_current(self.rows[index], param_groups, defaults):
                return None
        return found

    def _is_current(self, row: Row, param_groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> bool:
        """Whether a parameter that the native plan does not take still is what the plan was built for."""
        group, param = {**defaults, **param_groups[row.group]}, row.param
        return (param.dtype, param.device, layout_of(param)) == (row.dtype, row.device, row.layout) and (
            row.refused == why_not_native(param, group, row.backend, row.matrices)
        )

    def new_step(self, scale: LossScale, clip: ClipOptions, *, waits: bool) -> Step:
        """A step of the rows that the refresh has accepted, in the place of the plan's last.

        ``waits``: the host waits for the devices' results within this step.
        """
        step = self._step
        step.grad_scale = 1.0 if scale.scale is None or not waits else 1.0 / float(scale.scale)
        step.threads = torch.get_num_threads()
        step.clip = clip
        step.finds_inf = scale.finds_inf
        if self.buffers:
            step.devices = [
                buffers.step(scale.scale, scale.found_inf, finds_inf=scale.finds_inf) for buffers in self.buffers
            ]
        step.exchange = None
        step.global_norm = 0.0 if waits else None
        return step

    def has_found_inf(self) -> bool:
        """Whether the last `reduce` has met an element that is infinite or NaN: waits for the devices."""
        on_devices = (buffers.found_inf for buffers in self.buffers)
        return self.native.non_finite() or any(found is not None and found.item() != 0 for found in on_devices)

    def check_capture(self, found: Sequence[tuple[int, str]], groups: Sequence[dict[str, Any]], rule: Rule) -> None:
        """Refuse a capture into a CUDA graph that could not be replayed.

        Raises:
            RuntimeError: a group is not capturable, or a parameter is not ready; the text names it and the remedy.
        """
        name = type(rule).__name__
        if self.shards or self.agreement is not None:
            what = "norms several processes add up" if self.agreement is None else "matrices several processes exchange"
            raise RuntimeError(
                f"{name}.step() is being captured into a CUDA graph, but its parameters are shards whose {what} at "
                "each step; step outside of the graph"
            )
        for index, group in enumerate(groups):
            if not group.get("capturable", False):
                raise RuntimeError(
                    f"{name}.step() is being captured into a CUDA graph, but param_groups[{index}]['capturable'] is "
                    f"False; make the optimizer with {name}(..., capturable=True)"
                )
        for index, _ in found:
            row = self.rows[index]
            raise RuntimeError(
                f"{name}.step() is being captured into a CUDA graph, but {row.name} is not ready: "
                f"{row.refused or 'its state or its gradient is not what the kernels read'}; take one step with a "
                "gradient for it before the capture, or leave it without a gradient"
            )

    def measured(self) -> Iterator[tuple[int, Tensor]]:
        """Of each row of which the last step has measured norms: its index, and they; see `norms.Norms`."""
        for index, *numbers in self.native.norms():
            buffers = next((buffers for buffers in self.buffers if index in buffers.rows), None)
            if buffers is None or buffers.measured is None:
                yield index, torch.tensor(numbers, dtype=torch.float32)
            else:
                yield index, buffers.measured[list(buffers.rows).index(index)]


def rows_on_devices(rows: Sequence[Row]) -> dict[torch.device, dict[int, Row]]:
    """The rows that kernels step, by device and by index, in the order of their tables there."""
    found: dict[torch.device, dict[int, Row]] = {}
    for index, row in enumerate(rows):
        if is_on_device(row):
            found.setdefault(row.param.device, {})[index] = row
    return found
