"""The loss scale of one step, as a GradScaler has set it on the optimizer: divided out, and infinities found."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LossScale:
    """What a GradScaler asks of a step.

    Args:
        optimizer: on which it has set ``grad_scale`` and ``found_inf`` for this step (torch's contract), and
            ``finds_inf`` (this library's: found_inf is then not read but written).
    """

    __slots__ = ("finds_inf", "found_inf", "scale")

    def __init__(self, optimizer: Any) -> None:
        attributes = optimizer.__dict__  # asking for one that is not there would cost a fifth of a small step
        self.scale: Tensor | None = attributes.get("grad_scale")
        self.found_inf: Tensor | None = attributes.get("found_inf")
        self.finds_inf: bool = self.found_inf is not None and optimizer.finds_inf

    def stops(self) -> bool:
        """Whether the scaler itself has found an infinity, or a scale of 0 has left no gradient: waits for a device."""
        if self.found_inf is not None and float(self.found_inf) != 0:
            return True
        if self.scale is None or float(self.scale) != 0:
            return False
        self.found()  # after many infinities: the gradients are zeros, and no multiple of them is right
        return True

    def found(self) -> None:
        """Tell the scaler of an infinity, if it has asked."""
        if self.finds_inf and self.found_inf is not None:
            self.found_inf.fill_(1.0)
