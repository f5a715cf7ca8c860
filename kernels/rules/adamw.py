"""Adam and AdamW, with and without AMSGrad: the twin of csrc/rules/adamw.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import HyperField, Prepared, Rule, divide, maximum, one_minus_power, square_root


class Hyper(NamedTuple):
    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    decoupled_weight_decay: Any
    decay_scaling: Any


HYPER = (
    HyperField("lr"),
    HyperField("betas", 0),
    HyperField("betas", 1),
    HyperField("eps"),
    HyperField("weight_decay"),
    HyperField("decoupled_weight_decay"),
    # Which learning rate decoupled weight decay takes: times lr_scale, without it, or once each.
    HyperField("decay_scaling", choices=("scaled", "base", "double"), optional=True),
)


class State(NamedTuple):
    step: Any


class States(NamedTuple):
    exp_avg: Any
    exp_avg_sq: Any


class AmsgradStates(NamedTuple):
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any


class Scalars(NamedTuple):
    decay: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    inverse_sqrt_bias_correction2: Any
    eps: Any
    step_size: Any


@triton.jit
def prepare(hyper, tensor, state):
    hyper, state = Hyper(*hyper), State(*state)
    step = state.step + 1
    lr = hyper.lr * tensor.lr_scale
    weight_decay = hyper.weight_decay * tensor.weight_decay_scale
    decoupled = hyper.decoupled_weight_decay != 0
    bias_correction1 = one_minus_power(hyper.beta1, step)
    bias_correction2 = one_minus_power(hyper.beta2, step)
    scaled_decay = tl.where(hyper.decay_scaling != 1, 1 - lr * weight_decay, 1)
    base_decay = tl.where(hyper.decay_scaling != 0, 1 - hyper.lr * weight_decay, 1)
    coupled_weight_decay = tensor.coupled_weight_decay + tl.where(decoupled, 0, weight_decay)
    scalars = Scalars(
        decay=tl.where(decoupled, scaled_decay * base_decay, 1),
        beta1=hyper.beta1,
        one_minus_beta1=1 - hyper.beta1,
        beta2=hyper.beta2,
        one_minus_beta2=1 - hyper.beta2,
        inverse_sqrt_bias_correction2=1 / tl.sqrt(bias_correction2),
        eps=hyper.eps,
        step_size=lr / bias_correction1,
    )
    return Prepared(scalars, State(step), tensor.grad_scale, coupled_weight_decay)


@triton.jit
def update(param, grad, states, s):
    states, s = States(*states), Scalars(*s)
    param = param * s.decay
    exp_avg = s.beta1 * states.exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * states.exp_avg_sq + s.one_minus_beta2 * grad * grad
    denom = square_root(exp_avg_sq) * s.inverse_sqrt_bias_correction2 + s.eps
    param = param - divide(s.step_size * exp_avg, denom)
    return param, States(exp_avg, exp_avg_sq)


@triton.jit
def update_amsgrad(param, grad, states, s):
    states, s = AmsgradStates(*states), Scalars(*s)
    param = param * s.decay
    exp_avg = s.beta1 * states.exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * states.exp_avg_sq + s.one_minus_beta2 * grad * grad
    max_exp_avg_sq = maximum(states.max_exp_avg_sq, exp_avg_sq)
    denom = square_root(max_exp_avg_sq) * s.inverse_sqrt_bias_correction2 + s.eps
    param = param - divide(s.step_size * exp_avg, denom)
    return param, AmsgradStates(exp_avg, exp_avg_sq, max_exp_avg_sq)


STATES = (("step", True), ("exp_avg", False), ("exp_avg_sq", False))
RULES = (
    Rule("adamw", STATES, HYPER, Hyper, Scalars, prepare, update),
    Rule(
        "amsgrad",
        (*STATES, ("max_exp_avg_sq", False)),
        HYPER,
        Hyper,
        Scalars,
        prepare,
        update_amsgrad,
    ),
)
