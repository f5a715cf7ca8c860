"""The parameters of an optimizer, each with its place among the groups and its name."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Place(NamedTuple):
    """One parameter, where it stands."""

    group_index: int
    group: dict[str, Any]
    position: int  # in the group
    param: Tensor

    @property
    def own_name(self) -> str | None:
        """The parameter's name, where the group has one for each."""
        names = self.group.get("param_names")
        return names[self.position] if names and len(names) == len(self.group["params"]) else None

    @property
    def named(self) -> tuple[str | None, str, Tensor]:
        """Its own name or None, how messages name it, and the parameter."""
        return self.own_name, self.name, self.param

    @property
    def name(self) -> str:
        """How messages name the parameter: by its name if the group has names, and by its place."""
        place = f"param_groups[{self.group_index}]['params'][{self.position}]"
        return place if self.own_name is None else f"{self.own_name!r} ({place})"


class ByParameter(Generic[Value]):
    """A value for each of some parameters, which it does not keep alive. Copied and pickled with those that live."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}  # by id: the hash of a Tensor is Python code

    def __setitem__(self, param: Tensor, value: Value) -> None:
        self._entries[id(param)] = weakref.ref(param), value

    def get(self, param: Tensor) -> Value | None:
        ref, value = self._entries.get(id(param), (None, None))
        return value if ref is not None and ref() is param else None

    def forget_the_dead(self) -> None:
        """Let go of the values of parameters that are no more."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0]() is not None}

    def __getstate__(self) -> dict[str, list[tuple[Tensor, Value]]]:
        living = ((ref(), value) for ref, value in self._entries.values())
        return {"living": [(param, value) for param, value in living if param is not None]}

    def __setstate__(self, state: dict[str, list[tuple[Tensor, Value]]]) -> None:
        self._entries = {id(param): (weakref.ref(param), value) for param, value in state["living"]}


def parameters(groups: Sequence[dict[str, Any]], first: int = 0) -> Iterator[Place]:
    """The parameters of all groups from the ``first`` on, in their order."""
    for index in range(first, len(groups)):
        for position, param in enumerate(groups[index]["params"]):
            yield Place(index, groups[index], position, param)
