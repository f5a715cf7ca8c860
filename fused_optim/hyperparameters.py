"""Checks of hyperparameters, with torch's exceptions and texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_arguments(
    *,
    lr: Any = 0.0,
    betas: Any = None,
    eps: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
) -> None:
    """Refuse hyperparameters out of range.

    Raises:
        ValueError: torch.optim's text, which names the value.
    """
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not momentum >= 0.0:
        raise ValueError(f"Invalid momentum value: {momentum}")
    if eps is not None and not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas or ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def is_sequence(value: Any) -> bool:
    """Whether a hyperparameter is a pair such as betas: a tuple, a list, or what a configuration has for one."""
    return isinstance(value, Iterable) and not isinstance(value, (str, Tensor)) and getattr(value, "ndim", 1) == 1
