"""LAMB: the twin of csrc/rules/lamb.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import DIRECTION_SQ, HyperField, Prepared, Rule, divide, one_minus_power, square_root


class Hyper(NamedTuple):
    lr: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any
    bias_correction: Any
    grad_averaging: Any
    trust_clip: Any
    always_adapt: Any


class State(NamedTuple):
    step: Any


class States(NamedTuple):
    exp_avg: Any
    exp_avg_sq: Any


class Scalars(NamedTuple):
    beta1: Any
    grad_weight: Any
    beta2: Any
    one_minus_beta2: Any
    inverse_bias_correction1: Any
    inverse_sqrt_bias_correction2: Any
    eps: Any
    weight_decay: Any
    step_size: Any


@triton.jit
def prepare(hyper, tensor, state):
    hyper, state = Hyper(*hyper), State(*state)
    step = state.step + 1
    corrected = hyper.bias_correction != 0
    bias_correction1 = tl.where(corrected, one_minus_power(hyper.beta1, step), 1)
    bias_correction2 = tl.where(corrected, one_minus_power(hyper.beta2, step), 1)
    scalars = Scalars(
        beta1=hyper.beta1,
        grad_weight=tl.where(hyper.grad_averaging != 0, 1 - hyper.beta1, 1),
        beta2=hyper.beta2,
        one_minus_beta2=1 - hyper.beta2,
        inverse_bias_correction1=1 / bias_correction1,
        inverse_sqrt_bias_correction2=1 / tl.sqrt(bias_correction2),
        eps=hyper.eps,
        weight_decay=hyper.weight_decay * tensor.weight_decay_scale,
        step_size=step * 0,
    )
    return Prepared(scalars, State(step), tensor.grad_scale, tensor.coupled_weight_decay)


@triton.jit
def accumulate(grad, states, s):
    states, s = States(*states), Scalars(*s)
    exp_avg = s.beta1 * states.exp_avg + s.grad_weight * grad
    exp_avg_sq = s.beta2 * states.exp_avg_sq + s.one_minus_beta2 * grad * grad
    return States(exp_avg, exp_avg_sq)


@triton.jit
def direction(param, states, s):
    states, s = States(*states), Scalars(*s)
    denom = square_root(states.exp_avg_sq) * s.inverse_sqrt_bias_correction2 + s.eps
    adam = divide(states.exp_avg * s.inverse_bias_correction1, denom)
    return tl.where(s.weight_decay != 0, adam + s.weight_decay * param, adam)


@triton.jit
def scale_direction(hyper, tensor):
    hyper = Hyper(*hyper)
    adapts = tensor.has_trust_ratio & (
        (hyper.always_adapt != 0) | (hyper.weight_decay * tensor.weight_decay_scale != 0)
    )
    nonzero = (tensor.param_norm > 0) & (tensor.direction_norm > 0)
    adapts = adapts & nonzero
    ratio = tl.where(adapts, tensor.param_norm / tl.where(adapts, tensor.direction_norm, 1), 1)
    ratio = tl.where((hyper.trust_clip != 0) & (ratio > 1), 1, ratio)
    return hyper.lr * tensor.lr_scale * ratio, ratio


RULES = (
    Rule(
        "lamb",
        (("step", True), ("exp_avg", False), ("exp_avg_sq", False)),
        (
            HyperField("lr"),
            HyperField("betas", 0),
            HyperField("betas", 1),
            HyperField("eps"),
            HyperField("weight_decay"),
            HyperField("bias_correction"),
            HyperField("grad_averaging"),
            HyperField("trust_clip"),
            HyperField("always_adapt"),
        ),
        Hyper,
        Scalars,
        prepare,
        accumulate=accumulate,
        direction=direction,
        scale_direction=scale_direction,
        needs=lambda hyper: DIRECTION_SQ.value,
    ),
)
