"""The hyperparameters of the groups, as the plan in Python reads them; the twin of ``csrc/plan/groups.cpp``."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rule.hyperparameters import is_number, is_sequence, shown
from ..rule.trust_ratio import TrustRatio
from .memory import memory_of


@dataclass(slots=True)
class ReadForTriton:
    """The rows that Triton steps, and how they are read."""

    devices: Sequence[Sequence[int]]  # the indices of each device's rows
    rules: Mapping[int, Any]  # of each group that has such rows, its rule as in kernels/rule.py
    needs_of: Callable[..., int]  # the norms of a trust ratio; kernels/rules/trust_ratio.py
    row_fields: Sequence[str]  # of the table; kernels/table.py
    group_fields: Sequence[str]
    defaults: dict[str, Any]  # as the compiled plan's, and
    structural: Sequence[str]  # those that follow
    trust_ratio: Callable[[dict[str, Any]], TrustRatio | None] | None
    check: Callable[[int, dict[str, Any]], None]


class GroupReader:
    """The hyperparameters of one group as the kernels take them.

    Args:
        index: of the group.
        device: where the group's rows are.
        read: how this plan reads.
    """

    def __init__(self, index: int, device: torch.device, read: ReadForTriton) -> None:
        self._index, self._device, self._read = index, device, read
        self._rule = read.rules[index]
        self.known: dict[str, Any] | None = None  # the group as it was read, if no value can change but by another
        self._structural: tuple[bool, ...] | None = None
        self.words: list[int] = []

    def read(self, group: dict[str, Any]) -> bool | None:
        """Whether anything has changed; None: the group calls for a new plan.

        Raises:
            KeyError, TypeError, ValueError: a hyperparameter is missing or is none; the text names group and key.
        """
        truths = tuple(bool(group.get(key)) for key in self._read.structural)
        if self._structural not in (None, truths):
            return None
        self._structural = truths
        self._read.check(self._index, group)
        defaults, trust_ratio = self._read.defaults, self._read.trust_ratio
        numbers: dict[str, float] = {}
        fields: dict[str, int] = {}
        constant = True
        for place, (name, field) in enumerate(zip(self._rule.hyper_type._fields, self._rule.hyper)):
            if field.key not in group and field.key not in defaults:
                if not field.optional:
                    raise KeyError(
                        f"param_groups[{self._index}] has no {field.key!r} and the optimizer no default for it"
                    )
                value: Any = None
            else:
                value = group.get(field.key, defaults.get(field.key))
                constant = constant and is_constant(value)
            numbers[name], address, dtype = self._number(field, value)
            fields |= {
                f"hyper{place}": bits(numbers[name]),
                f"hyper_address{place}": address,
                f"hyper_dtype{place}": dtype,
            }
        others = (value for key, value in group.items() if key not in ("params", "param_names"))
        constant = constant and all(map(is_constant, others))
        trust = None if trust_ratio is None else trust_ratio(group)
        rule_needs = self._rule.needs(numbers)
        fields["maximize"] = bits(float(bool(group.get("maximize", False))))
        fields["needs"] = rule_needs | self._read.needs_of(trust, rule_needs)
        if trust is not None:
            fields |= {name: bits(float(getattr(trust, name))) for name in TrustRatio._fields}
            fields["present"] = bits(1.0)
        words = [fields.get(name, 0) for name in self._read.group_fields]
        changed = words != self.words
        self.words = words
        self.known = without_params(group) if constant else None
        return changed

    def _number(self, field: Any, value: Any) -> tuple[float, int, int]:
        """A hyperparameter's number, or where its tensor on the device is and its dtype."""
        place = f"param_groups[{self._index}][{field.key!r}]"
        if field.choices:
            if value is None and field.optional:
                return 0.0, 0, 0
            if value not in field.choices:
                words = ", ".join(map(repr, field.choices))
                raise ValueError(f"{place} must be one of {words}, got {shown(value)}")
            return float(field.choices.index(value)), 0, 0
        if value is None and field.optional:
            return 0.0, 0, 0
        item = value
        length = sum(other.key == field.key for other in self._rule.hyper)
        if field.index >= 0 and is_sequence(value) and len(value) == length:
            item = value[field.index]
        elif field.index >= 0:
            item = None
        if not is_number(item):
            raise TypeError(f"{place} must hold numbers or one-element Tensors, got {shown(value)}")
        memory = memory_of(item)
        if memory is not None and memory.device.type != "cpu" and memory.device == self._device:
            return 0.0, memory.address, memory.dtype
        return float(item.detach() if isinstance(item, Tensor) else item), 0, 0


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    """The items of a group but its parameters, which a plan does not keep alive."""
    return {key: value for key, value in group.items() if key != "params"}


def is_constant(value: Any) -> bool:
    """Whether an object cannot change while it is the same."""
    return (
        value is None
        or type(value) in (float, int, str, bool)
        or (type(value) is tuple and all(map(is_constant, value)))
    )


def bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
