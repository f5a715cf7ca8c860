"""Checks of hyperparameters, with torch's exceptions and texts."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
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
    for index, beta in enumerate(() if betas is None else betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def is_sequence(value: Any) -> bool:
    """Whether a hyperparameter is a pair such as betas: a tuple, a list, what a configuration has for one, or a Tensor
    or an array of one dimension."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return False
    return not hasattr(value, "ndim") or (value.ndim == 1 and len(value) != 1)  # type: ignore[arg-type]


def is_number(value: Any) -> bool:
    """Whether a step count or a hyperparameter is a number, numpy's of no dimension included, or a one-element real
    Tensor."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(plain_number(value), Real)


def shown(value: Any) -> str:
    """A value as a message shows it: what it is, and of a tensor or an array not what it holds."""
    shape = getattr(value, "shape", None)
    if isinstance(value, Tensor) or shape:
        return f"a {type(value).__name__} of shape {tuple(shape or ())}"
    if isinstance(value, (tuple, list)):
        items = ", ".join(map(shown, value)) if len(value) <= 4 else f"{len(value)} items"
        return f"({items})" if isinstance(value, tuple) else f"[{items}]"
    return f"a {type(value).__name__}" if isinstance(value, Mapping) else reprlib.repr(value)


def plain_number(value: Any) -> Any:
    """A number of numpy's, or an array of it that has no dimension, as Python's."""
    return value.item() if getattr(value, "shape", None) == () and not isinstance(value, Tensor) else value
