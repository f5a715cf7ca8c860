"""NovoGrad in its published variants: the twin of csrc/rules/novograd.h."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import GRAD_MAX, GRAD_SQ, HyperField, Prepared, Rule, maximum, one_minus_power
from .momentum import MomentumScalars, update_momentum


class Hyper(NamedTuple):
    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    variant: Any
    grad_averaging: Any
    bias_correction: Any
    init_zero: Any
    norm_type: Any
    reg_inside_moment: Any
    decoupled_decay: Any
    weight_decouple: Any
    fixed_decay: Any
    eps_root: Any


VARIANTS = ("paper", "openseq2seq", "apex", "timm", "kozistr", "optax", "tfa")
OPENSEQ2SEQ, APEX, KOZISTR, TFA = (
    tl.constexpr(VARIANTS.index(name)) for name in ("openseq2seq", "apex", "kozistr", "tfa")
)
HYPER = (
    HyperField("lr"),
    HyperField("betas", 0),
    HyperField("betas", 1),
    HyperField("eps"),
    HyperField("weight_decay"),
    HyperField("variant", choices=VARIANTS),
    HyperField("grad_averaging"),
    HyperField("bias_correction"),
    HyperField("init_zero"),
    HyperField("norm_type"),
    HyperField("reg_inside_moment"),
    HyperField("decoupled_decay"),
    HyperField("weight_decouple"),
    HyperField("fixed_decay"),
    HyperField("eps_root"),
)


class State(NamedTuple):
    step: Any
    exp_avg_sq: Any


class AmsgradState(NamedTuple):
    step: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any


class States(NamedTuple):
    exp_avg: Any


def needs(hyper: Mapping[str, float]) -> int:
    return GRAD_MAX.value if hyper["norm_type"] == 0 else GRAD_SQ.value


@triton.jit
def advance(hyper, tensor, state):
    """The new step, the second moment of the norm, and whether it is the first of its moments."""
    step = state.step + 1
    inf_norm = hyper.norm_type == 0
    grad_norm_sq = tl.where(inf_norm, tensor.grad_max, tensor.grad_norm * tensor.grad_norm)
    starts = (state.exp_avg_sq == 0) & (grad_norm_sq != 0)  # the first gradient that is not all zeros
    replace = (hyper.variant == OPENSEQ2SEQ) | (starts & (hyper.init_zero == 0))
    average = hyper.beta2 * state.exp_avg_sq + (1 - hyper.beta2) * grad_norm_sq
    exp_avg_sq = tl.where(replace, grad_norm_sq, average)
    return step, exp_avg_sq, (step == 1) | starts


@triton.jit
def finish(hyper, tensor, state, second_moment, first):
    step = state.step
    lr = hyper.lr * tensor.lr_scale
    weight_decay = hyper.weight_decay * tensor.weight_decay_scale
    apex = hyper.variant == APEX
    inf_norm = hyper.norm_type == 0

    # What the gradient is divided by.
    corrected = apex & (hyper.bias_correction != 0)
    bias_correction1 = tl.where(corrected, one_minus_power(hyper.beta1, step), 1)
    bias_correction2 = tl.where(corrected, tl.sqrt(one_minus_power(hyper.beta2, step)), 1)
    eps_inside = tl.where(hyper.variant == OPENSEQ2SEQ, hyper.eps, hyper.eps_root)
    eps_outside = tl.where(hyper.variant == OPENSEQ2SEQ, 0, hyper.eps)
    norm = tl.where(inf_norm, second_moment, tl.sqrt(second_moment + eps_inside))
    denom = norm / bias_correction2 + eps_outside

    # Where weight decay stands: on the parameter, or in the moment.
    decoupled = (hyper.decoupled_decay != 0) | (hyper.weight_decouple != 0)
    decay = tl.where(decoupled, tl.where(hyper.fixed_decay != 0, 1 - weight_decay, 1 - lr * weight_decay), 1)
    coupled = tl.where(decoupled, 0, weight_decay)
    divided_before = (hyper.variant != APEX) | (hyper.reg_inside_moment != 0)
    decay = tl.where(divided_before, decay, 1 - lr * weight_decay)
    coupled = tl.where(divided_before, coupled, 0)

    averaged = (hyper.grad_averaging != 0) & ~(first & ((hyper.variant == KOZISTR) | (hyper.variant == TFA)))
    grad_weight = tl.where(averaged, 1 - hyper.beta1, 1)
    lr_in_buffer = hyper.variant == TFA
    step_size = tl.where(lr_in_buffer, 1, lr / bias_correction1)
    shortened = (hyper.variant == KOZISTR) & (hyper.bias_correction != 0)
    step_size = tl.where(shortened, step_size * tl.sqrt(one_minus_power(hyper.beta2, step)), step_size)
    grad_scale = tl.where(divided_before, tensor.grad_scale / denom, tensor.grad_scale)
    coupled_weight_decay = tl.where(
        divided_before, tensor.coupled_weight_decay / denom + coupled, tensor.coupled_weight_decay
    )
    step_size = tl.where(divided_before, step_size, step_size / denom)

    scalars = MomentumScalars(
        buffer_decay=hyper.beta1,
        grad_weight=tl.where(lr_in_buffer, lr * grad_weight, grad_weight),
        decay=decay,
        step_size=step_size,
        grad_step=lr * 0,
    )
    return Prepared(scalars, state, grad_scale, coupled_weight_decay)


@triton.jit
def prepare(hyper, tensor, state):
    hyper, state = Hyper(*hyper), State(*state)
    step, exp_avg_sq, first = advance(hyper, tensor, state)
    return finish(hyper, tensor, State(step, exp_avg_sq), exp_avg_sq, first)


@triton.jit
def prepare_amsgrad(hyper, tensor, state):
    hyper, state = Hyper(*hyper), AmsgradState(*state)
    step, exp_avg_sq, first = advance(hyper, tensor, state)
    max_exp_avg_sq = maximum(state.max_exp_avg_sq, exp_avg_sq)
    return finish(hyper, tensor, AmsgradState(step, exp_avg_sq, max_exp_avg_sq), max_exp_avg_sq, first)


@triton.jit
def update(param, grad, states, s):
    states, s = States(*states), MomentumScalars(*s)
    param, exp_avg = update_momentum(param, grad, states.exp_avg, s)
    return param, States(exp_avg)


STATES = (("step", True), ("exp_avg_sq", True))
RULES = (
    Rule(
        "novograd",
        (*STATES, ("exp_avg", False)),
        HYPER,
        Hyper,
        MomentumScalars,
        prepare,
        update,
        needs=needs,
    ),
    Rule(
        "novograd_amsgrad",
        (*STATES, ("max_exp_avg_sq", True), ("exp_avg", False)),
        HYPER,
        Hyper,
        MomentumScalars,
        prepare_amsgrad,
        update,
        needs=needs,
    ),
)
