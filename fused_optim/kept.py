"""What an optimizer keeps between steps, and its plan brought up to date with the groups."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .backends.choice import FallbackLog
from .norms import LastStep
from .options.options import Options
from .plan.agreement import refuse_everywhere
from .plan.built_plan import BuiltPlan
from .plan.plan import why_refused
from .plan.planner import build_plan
from .plan.readiness import make_ready
from .row import Row
from .rule.contract import Rule
from .tensors import lasting

# No rows, or no groups.
NOTHING: dict[int, Any] = {}


class Kept:
    """What an optimizer keeps between steps. It is made once and never replaced: wrappers that copy an optimizer's
    ``__dict__``, as Lightning's do, see the same.

    Its methods take the optimizer's ``param_groups``, ``defaults`` and ``state`` as they are now, and the optimizer
    itself as ``rule``.
    """

    def __init__(self, options: Options, name: str) -> None:
        self.options = options
        self.log = FallbackLog(name)
        self.plan: BuiltPlan | None = None
        self.last: LastStep | None = None
        self.same_rows = ""  # what the processes have found to be the same everywhere
        # What the replays of captured steps read and write, each thing once, by its identity: never freed before us.
        self.captures: dict[int, Any] = {}
        self.supports_scaling: bool | None = None  # what a user has set `_step_supports_amp_scaling` to
        self.loading: dict[str, Any] | None = None  # the checkpoint that is being loaded
        self.stepping = threading.Lock()
        self.built = False  # the constructor is done: groups come by `add_param_group` now

    def new_plan(self, groups: list[dict[str, Any]], defaults: dict[str, Any], rule: Rule) -> BuiltPlan:
        """A plan of the groups as they are now; what is refused here, other processes hear of."""
        try:
            return self._built_plan(groups, defaults, rule)
        except Exception:
            refuse_everywhere(groups, defaults, rule)
            raise

    def _built_plan(self, groups: list[dict[str, Any]], defaults: dict[str, Any], rule: Rule) -> BuiltPlan:
        with lasting():
            self.plan = build_plan(groups, defaults, rule, self.options, self.log, self.same_rows)
        self.same_rows = self.plan.same_rows
        return self.plan

    def _refreshed(
        self, groups: list[dict[str, Any]], defaults: dict[str, Any], state: dict[Tensor, Any], rule: Rule
    ) -> tuple[BuiltPlan, Sequence[tuple[int, str]]]:
        """The plan of the groups as they are now, and the rows that it cannot step as they are."""
        for _ in range(2):
            plan = self.plan or self._built_plan(groups, defaults, rule)
            found = plan.refresh(groups, state, defaults)
            if found is not None:
                return plan, found
            self.plan = None
        raise RuntimeError(
            "the param groups change while the plan is built from them, or are not a list of dicts whose 'params' are "
            "lists"
        )

    def keep_for_replays(self, plan: BuiltPlan) -> None:
        """A step is being captured into a graph, of whose end nobody tells us: what it reads and writes beside its
        table stays as long as the optimizer. More captures of one plan keep nothing more."""
        read = (tensor for buffers in plan.buffers for tensor in buffers.alive)
        self.captures |= {id(kept): kept for kept in (plan, *plan.native.written(), *read)}

    def ready(
        self, param_groups: list[dict[str, Any]], defaults: dict[str, Any], state: dict[Tensor, Any], rule: Rule
    ) -> tuple[BuiltPlan, dict[int, Row], dict[int, dict[str, Any]]]:
        """A refreshed plan; the rows that the eager path takes, by index, and their groups.

        Where processes exchange matrices, all of them take the step or none does.
        """
        try:
            plan, rows, groups = self._ready(param_groups, defaults, state, rule)
        except Exception:
            refuse_everywhere(param_groups, defaults, rule)
            raise
        if plan.agreement is not None:
            plan.agreement.reach()
        return plan, rows, groups

    def _ready(
        self, param_groups: list[dict[str, Any]], defaults: dict[str, Any], state: dict[Tensor, Any], rule: Rule
    ) -> tuple[BuiltPlan, dict[int, Row], dict[int, dict[str, Any]]]:
        plan = self.plan
        found = None if plan is None else plan.refresh(param_groups, state, defaults)
        if plan is None or found is None:  # no plan yet, or the groups are no longer this one's
            self.plan = None
            plan, found = self._refreshed(param_groups, defaults, state, rule)
        if plan.buffers and plan.native.captured():
            plan.check_capture(found, param_groups, rule)
        if not found:
            return plan, NOTHING, NOTHING
        rows = [plan.rows[index] for index, _ in found]
        groups = {row.group: {**defaults, **param_groups[row.group]} for row in rows}
        make_ready(rows, groups, state, rule, self.options, defaults, self.log)
        plan, found = self._refreshed(param_groups, defaults, state, rule)
        for index, kind in found:
            row = plan.rows[index]
            if row.backend != "eager":
                numbers = rule.tensor_state_names(groups[row.group])
                reason = row.refused or why_refused(row, kind, state.get(row.param, {}), numbers)
                self.log.serves(row.name, reason, kind=row.refused or kind)
        return plan, {index: plan.rows[index] for index, _ in found}, groups
