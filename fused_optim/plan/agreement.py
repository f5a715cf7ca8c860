"""Before a step in which processes wait for each other's matrices: they agree that all of them take it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ..parameters import Place, parameters
from ..row import Row
from ..rule.contract import Rule
from ..tensors import dtensor_type, is_sharded
from .dealt import Dealt
from .shards import groups_of, refuse_different, signatures
from .teams import Mesh, teams_of, why_not_dealt

# One collective of so many numbers a step and mesh: who refuses, what the rows are, and what has gradients.
WORDS = 64
WHO, ROWS, NOT_ROWS, FIRST_ACTIVE = range(4)


class Agreement:
    """What the processes of each mesh say to each other before a step: one collective, for which the host waits.

    Args:
        rows: all rows of the plan.
        rules: by group.
        iterations: what is done to the matrices of a row, by its index.
        dealt: the matrices that are exchanged.
    """

    def __init__(
        self, rows: Sequence[Row], rules: Sequence[str], iterations: Sequence[Any], dealt: Sequence[Dealt]
    ) -> None:
        self._meshes: list[tuple[Any, Sequence[Any], list[str], int, list[Dealt]]] = []
        for mesh, lines in signatures(rows, rules, iterations).items():
            digest = int(hashlib.sha256("\n".join(lines).encode()).hexdigest()[:15], 16)
            of_mesh = [one for one in dealt if one.device_mesh == mesh]
            self._meshes.append((mesh, groups_of(mesh), lines, digest, of_mesh))

    def reach(self) -> None:
        """Agree on the step, and on the matrices that take part in it: those with a gradient in some process.

        Raises:
            RuntimeError: a process has refused the step, or has other rows; nothing has changed in any of them.
        """
        refusing, different = 0, None
        found: list[tuple[list[Dealt], list[int]]] = []
        for mesh, groups, lines, digest, dealt in self._meshes:
            active = [0] * (WORDS - FIRST_ACTIVE)
            for index, one in enumerate(dealt):
                active[index % len(active)] |= one.has_gradients()
            agreed = _largest(mesh, groups, [refusing, digest, -digest, *active])
            refusing = max(refusing, agreed[WHO])
            if not refusing and agreed[ROWS] != -agreed[NOT_ROWS]:
                different, refusing = (mesh, lines), torch.distributed.get_rank() + 1
            found.append((dealt, agreed[FIRST_ACTIVE:]))
        if different is not None:
            refuse_different(*different)
        if refusing:
            raise RuntimeError(
                f"rank {refusing - 1} has refused this step, whose error says why; the parameters here are parts of "
                "the same matrices, and nothing has changed in any process"
            )
        for dealt, active in found:
            for index, one in enumerate(dealt):
                one.activate(bool(active[index % len(active)]))


def refuse_everywhere(param_groups: Sequence[dict[str, Any]], defaults: dict[str, Any], rule: Rule) -> None:
    """Tell the processes that wait for an agreement, if there are any, that this one does not take the step."""
    if not rule.keys_of_directions or dtensor_type() is None:
        return
    places = list(parameters([{**defaults, **group} for group in param_groups]))
    sharded: list[Any] = [place.param for place in places if is_sharded(place.param)]
    if not any(_is_dealt(place, rule) for place in places):
        return
    for mesh in dict.fromkeys(param.device_mesh for param in sharded):
        _largest(mesh, groups_of(mesh), [torch.distributed.get_rank() + 1, *[0] * (WORDS - 1)])


def _is_dealt(place: Place, rule: Rule) -> bool:
    """Whether a parameter's matrices are exchanged; as far as can be told, where that is what was refused."""
    param: Any = place.param
    if not is_sharded(param) or 0 in param.shape:
        return False
    try:
        matrices = rule.matrices(place)
    except ValueError:
        return True
    mesh, placements = Mesh.of(param.device_mesh), param.placements
    if matrices is None or why_not_dealt(placements, mesh.sizes) is not None:
        return matrices is not None
    return not all(team.is_whole for team in teams_of(tuple(param.shape), matrices, mesh, placements))


def _largest(mesh: Any, groups: Sequence[Any], words: list[int]) -> list[int]:
    """The largest of each word over a mesh's processes."""
    found: list[int] = words
    for group in groups:
        # With gloo beside nccl, as torch sets them up, no device has to be waited for.
        on_host = torch.device("cpu") in getattr(group, "_device_types", ())
        table = torch.tensor(found, dtype=torch.int64, device="cpu" if on_host else mesh.device_type)
        torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX, group=group)
        found = table.tolist()
    return found
