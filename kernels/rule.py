"""The contract of a rule: the twin of csrc/rules/rule.h.

A module that holds rules lists them in `RULES`. `prepare` works on the numbers of many tensors at once, in float64;
`update` on elements in the compute type. Neither knows a dtype or a device. Structs are named tuples, so that fields
have names; the mechanism hands over their fields in order, and what C++ writes in place is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

# Norms that a rule or a clip may ask the reduce phase for.
GRAD_SQ, PARAM_SQ, GRAD_MAX = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
DECAYED_SQ = tl.constexpr(8)  # of grad + weight_decay * param
DIRECTION_SQ = tl.constexpr(16)  # measured by the first of two passes
FINITE = tl.constexpr(32)  # whether all elements of the gradient are


class HyperField(NamedTuple):
    """Where a hyperparameter stands in a param group."""

    key: str
    index: int = -1  # element of a pair such as betas; -1: the value itself
    choices: tuple[str, ...] = ()  # a string: its index among these
    optional: bool = False  # 0 where neither the group nor the optimizer has the key


class TensorContext(NamedTuple):
    """What `prepare` knows of a tensor."""

    lr_scale: Any
    weight_decay_scale: Any
    grad_norm: Any  # L2 norm of the gradient, clipped and times the trust ratio, if `needs` asks
    grad_max: Any  # its largest magnitude, likewise
    param_norm: Any  # L2 norm of the parameter (of the master, where there is one), likewise
    direction_norm: Any  # L2 norm of the direction; for scale_direction
    has_trust_ratio: Any  # not excluded from trust ratios
    grad_scale: Any  # what update sees is this times the gradient,
    coupled_weight_decay: Any  # plus this times the parameter
    trust_ratio: Any


class Prepared(NamedTuple):
    """What `prepare` returns."""

    scalars: Any
    state: Any  # the per-tensor states, advanced
    grad_scale: Any
    coupled_weight_decay: Any


class Rule(NamedTuple):
    """The mathematics of one optimizer.

    ``states``: the per-parameter states in column order, the per-tensor ones first: their names and whether they are
    that. ``hyper``: where the fields of ``hyper_type`` stand in a group; ``lr`` comes first. ``needs``: the norms that
    `prepare` reads. ``prepare(hyper, tensor, state)`` returns a `Prepared`. ``update(param, grad, states, scalars)``
    returns param and states.

    A rule whose step length depends on the norm of its own direction has instead ``accumulate(grad, states, scalars)``,
    ``direction(param, states, scalars)`` and ``scale_direction(hyper, tensor)``, which returns the scalars'
    ``step_size`` and the trust ratio. One whose direction ``Step.exchange`` changes between its passes has no
    ``scale_direction``: its ``accumulate`` returns the direction behind the states, and its ``direction`` receives it
    instead of them.
    """

    name: str
    states: tuple[tuple[str, bool], ...]
    hyper: tuple[HyperField, ...]
    hyper_type: Any  # a NamedTuple
    scalars_type: Any  # likewise
    prepare: Any
    update: Any = None
    accumulate: Any = None
    direction: Any = None
    scale_direction: Any = None
    needs: Callable[[Mapping[str, float]], int] = lambda hyper: 0

    @property
    def tensor_state_count(self) -> int:
        return sum(per_tensor for _, per_tensor in self.states)

    @property
    def scalar_count(self) -> int:
        return len(self.scalars_type._fields)

    @property
    def weight_decay_index(self) -> int:
        return self.hyper_type._fields.index("weight_decay")

    @property
    def step_size_index(self) -> int:
        return self.scalars_type._fields.index("step_size")

    @property
    def has_direction(self) -> bool:
        return self.direction is not None

    @property
    def keeps_direction(self) -> bool:
        return self.has_direction and self.scale_direction is None

    @property
    def measures_direction(self) -> bool:
        return self.scale_direction is not None

    @property
    def column_count(self) -> int:
        """Of the states, and of the direction that is kept."""
        return len(self.states) + self.keeps_direction


# Limits that the table is laid out for; csrc/rules/rule.h has the same.
MAX_HYPER = 15
MAX_STATES = 4


@triton.jit
def one_minus_power(base, exponent):
    """``1 - base ** exponent``. The subtraction would cancel when base is near 1; this form of expm1 (Kahan's) does
    not."""
    x = exponent * tl.log(base)
    power = tl.exp(x)
    less_one = power - 1
    ordinary = (power != 1) & (less_one != -1)
    ratio = x / tl.log(tl.where(ordinary, power, 2))
    expm1 = tl.where(ordinary, less_one * ratio, tl.where(power == 1, x, -1))
    return tl.where(base == 0, tl.where(exponent == 0, 0, 1), -expm1)


@triton.jit
def square_root(value):
    """As IEEE 754 rounds it; tl.sqrt alone would be an approximation in float32."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def divide(a, b):
    """As IEEE 754 rounds it; the operator alone would be an approximation in float32."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def maximum(a, b):
    """The larger of two, or NaN if either is."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def sign(value):
    """torch.sign: 0 for a NaN."""
    return tl.where(value > 0, 1, tl.where(value < 0, -1, 0)).to(value.dtype)
