"""The contract of a rule: what the class of an optimizer says of its mathematics; the twin of csrc/rules/rule.h.

`FusedOptimizer` is a `Rule`, and each optimizer's class fills it in. The mechanism asks through it and never names an
optimizer; what it is handed as ``rule`` is the optimizer, and it sees no more of that than this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..parameters import Place
from .arithmetic import Number
from .hyperparameters import check_group
from .orthogonal import Iteration, Matrices
from .trust_ratio import TrustRatio


@dataclass
class TensorContext:
    """What `prepare` knows of one tensor, and what it may say to the mechanism."""

    state: dict[str, Number]  # the per-tensor states; prepare advances them
    lr_scale: float
    weight_decay_scale: float
    has_trust_ratio: bool = True  # not excluded from trust ratios
    grad_norm: Number = 0.0  # of the gradient, clipped and times the trust ratio, where the rule asks for it
    grad_max: Number = 0.0  # its largest magnitude, likewise
    param_norm: Number = 0.0  # likewise; of the master, where there is one
    direction_norm: Number = 0.0  # for scale_direction
    grad_scale: Number = 1.0  # out: what `update` sees is this times the gradient,
    coupled_weight_decay: Number = 0.0  # out: plus this times the parameter
    trust_ratio: Number = 1.0  # out: for the log


class Rule:
    """The mathematics of one optimizer, and the names of its states."""

    # Group keys that choose the rule or the backend: a change of theirs calls for a new plan.
    structural_keys: ClassVar[tuple[str, ...]] = ("differentiable",)
    # Group keys that say what is done between the two passes of a step: another value calls for a new plan.
    keys_of_directions: ClassVar[tuple[str, ...]] = ()
    # Element states that may be missing in a state that has the others, and then start at zero.
    late_states: ClassVar[tuple[str, ...]] = ()
    # Element states whose first value the first step makes: None, as torch keeps them before it, is none yet.
    states_of_first_step: ClassVar[tuple[str, ...]] = ()
    # The words that a hyperparameter may be.
    choices: ClassVar[tuple[tuple[str, tuple[str | None, ...]], ...]] = ()
    # Whether there is a lazy_mode.
    takes_sparse: ClassVar[bool] = False
    # The step count of a state that has others but no "step".
    missing_step: ClassVar[float] = 0.0
    # (group, TensorContext) -> scalars: once a tensor, in double; advances the per-tensor states.
    prepare: ClassVar[Callable[..., Any]]
    # (param, grad, states, scalars) -> param: element by element; `states` receives the new states.
    update: ClassVar[Callable[..., Tensor]]
    # A rule whose step length depends on the norm of its own direction has these three instead of `update`.
    has_direction: ClassVar[bool] = False
    accumulate: ClassVar[Callable[..., None]]
    direction: ClassVar[Callable[..., Tensor]]
    scale_direction: ClassVar[Callable[..., Number]]

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the C++ rule that a group follows."""
        raise NotImplementedError

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states that have one number an element."""
        raise NotImplementedError

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states that have one number a tensor."""
        return ("step",)

    def norms(self, group: dict[str, Any]) -> frozenset[str]:
        """Which norms of the gradient `prepare` reads: ``"grad_norm"``, ``"grad_max"``."""
        return frozenset()

    def trust_ratio(self, group: dict[str, Any]) -> TrustRatio | None:
        """The trust ratio of a group, if it has one."""
        return None

    def matrices(self, place: Place) -> Matrices | None:
        """How a parameter, whose group has the optimizer's defaults in it, is matrices whose direction is made
        orthogonal between two passes; None: it is not, and has one pass.

        With matrices `accumulate` leaves the direction under ``"direction"`` among the states.

        Raises:
            ValueError: it should be and cannot; the text names it.
        """
        return None

    def iteration(self, group: dict[str, Any], matrices: Matrices, dtype: torch.dtype) -> Iteration:
        """What is done to the matrices of a parameter of ``dtype`` between the passes."""
        raise NotImplementedError

    def check_group(self, index: int, group: dict[str, Any], defaults: dict[str, Any], of: str = "") -> None:
        """Refuse the hyperparameters of a group that no backend can compute with; see `hyperparameters.check_group`."""
        check_group(index, group, defaults, self.choices, of)

    def exempt(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether a parameter has neither trust ratio nor weight decay, whatever the user said."""
        return False
