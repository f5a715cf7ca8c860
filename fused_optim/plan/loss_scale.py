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
        self.scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self.found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        self.finds_inf: bool = self.found_inf is not None and optimizer.finds_inf

    @classmethod
    def of(cls, optimizer: Any) -> LossScale:
        """That of an optimizer; one that asks nothing, always the same, where no scaler has set anything."""
        attributes = optimizer.__dict__
        return cls(optimizer) if "found_inf" in attributes or "grad_scale" in attributes else NO_SCALE

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


NO_SCALE = LossScale(None)
