"""The parameters of an optimizer, each with its place among the groups and its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """One parameter, where it stands."""

    group_index: int
    group: dict[str, Any]
    position: int  # in the group
    param: Tensor

    @property
    def own_name(self) -> str | None:
        """The parameter's name, where the group has names."""
        names = self.group.get("param_names")
        return names[self.position] if names and self.position < len(names) else None

    @property
    def named(self) -> tuple[str | None, str, Tensor]:
        """Its own name or None, how messages name it, and the parameter."""
        return self.own_name, self.name, self.param

    @property
    def name(self) -> str:
        """How messages name the parameter: by its name if the group has names, and by its place."""
        place = f"param_groups[{self.group_index}]['params'][{self.position}]"
        return place if self.own_name is None else f"{self.own_name!r} ({place})"


def parameters(groups: Sequence[dict[str, Any]], first: int = 0) -> Iterator[Place]:
    """The parameters of all groups from the ``first`` on, in their order."""
    for index in range(first, len(groups)):
        for position, param in enumerate(groups[index]["params"]):
            yield Place(index, groups[index], position, param)
