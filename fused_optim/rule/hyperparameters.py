"""Checks of hyperparameters, with torch's exceptions and texts."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..tensors import is_plain

# The least and the greatest number that a hyperparameter may be, in a constructor and in a group. A decay rate is
# below 1.
LIMITS: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "momentum": (0.0, math.inf),
    "eps": (0.0, math.inf),
    "betas": (0.0, math.nextafter(1.0, 0.0)),
    "weight_decay": (0.0, math.inf),
}
# How torch names it in its texts.
NAMES = {
    "lr": "learning rate",
    "momentum": "momentum value",
    "eps": "epsilon value",
    "betas": "beta parameter at index {}",
    "weight_decay": "weight_decay value",
}


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
        TypeError: as `check_betas`.
        ValueError: torch.optim's text, which names the value; or as `check_betas`.
    """
    if betas is not None:
        check_betas(betas)
    check_limits("lr", [lr])
    check_limits("momentum", [momentum])
    check_limits("eps", [] if eps is None else [eps])
    check_limits("betas", () if betas is None else betas)
    check_limits("weight_decay", [weight_decay])


def check_betas(betas: Any) -> None:
    """Refuse decay rates that are not two.

    Raises:
        TypeError: no sequence.
        ValueError: of another length.
    """
    if not is_sequence(betas):
        raise TypeError(f"betas must be two numbers, got {shown(betas)}")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {shown(betas)}")


def check_limits(key: str, items: Iterable[Any], place: str = "") -> None:
    """Refuse numbers that a hyperparameter cannot be; an element that is on another device is not waited for.

    ``place``: of the hyperparameter, as a message begins with it.

    Raises:
        ValueError: torch.optim's text, which names the value.
    """
    if key not in LIMITS:
        return
    least, most = LIMITS[key]
    for index, item in enumerate(items):
        if isinstance(item, Tensor) and not (is_plain(type(item)) and item.device.type == "cpu"):
            continue
        # As a Python number: torch would round the limit to the item's dtype.
        if not least <= (item.item() if isinstance(item, Tensor) else item) <= most:
            raise ValueError(f"{place}Invalid {NAMES[key].format(index)}: {item}")


def check_group(
    index: int,
    group: dict[str, Any],
    defaults: dict[str, Any],
    choices: Iterable[tuple[str, tuple[str | None, ...]]],
    of: str = "",
) -> None:
    """Refuse the hyperparameters of a group that no backend can compute with.

    ``choices``: the words that a hyperparameter may be. ``of``: what the group is of, if not of the optimizer; as a
    message says it.

    Raises:
        TypeError: what is no number; the text names the group and the key.
        ValueError: a word that is not one of the hyperparameter's choices, or a number out of its limits.
    """
    group = {**defaults, **group}
    for key, words in choices:
        if key in group and group[key] not in words:
            listed = ", ".join(map(repr, words))
            raise ValueError(f"param_groups[{index}][{key!r}]{of} must be one of {listed}, got {shown(group[key])}")
    for key, default in defaults.items():
        if isinstance(default, (bool, str)) or default is None:
            continue
        value, wanted = group[key], len(default) if is_sequence(default) else 0
        items = list(value) if wanted and is_sequence(value) else [value]
        if len(items) != max(wanted, 1) or not all(map(is_number, items)):
            raise TypeError(
                f"param_groups[{index}][{key!r}]{of} must hold numbers or one-element Tensors, got {shown(value)}"
            )
        check_limits(key, items, f"param_groups[{index}][{key!r}]{of}: ")


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


def comparable(value: Any) -> Any:
    """A hyperparameter as a value that does not change and that ``==`` compares as a whole: arrays and tensors as the
    numbers in them, sequences as tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(comparable, value)) if is_sequence(value) else value


def plain_number(value: Any) -> Any:
    """A number of numpy's, or an array of it that has no dimension, as Python's."""
    return value.item() if getattr(value, "shape", None) == () and not isinstance(value, Tensor) else value
