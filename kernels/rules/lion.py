"""Lion: the twin of csrc/rules/lion.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it in the functions' globals

from ..rule import HyperField, Prepared, Rule, sign


class Hyper(NamedTuple):
    lr: Any
    beta1: Any
    beta2: Any
    weight_decay: Any


class State(NamedTuple):
    pass


class States(NamedTuple):
    exp_avg: Any


class Scalars(NamedTuple):
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    decay: Any
    step_size: Any


@triton.jit
def prepare(hyper, tensor, state):
    hyper = Hyper(*hyper)
    lr = hyper.lr * tensor.lr_scale
    weight_decay = hyper.weight_decay * tensor.weight_decay_scale
    scalars = Scalars(
        beta1=hyper.beta1,
        one_minus_beta1=1 - hyper.beta1,
        beta2=hyper.beta2,
        one_minus_beta2=1 - hyper.beta2,
        decay=1 - lr * weight_decay,
        step_size=lr,
    )
    return Prepared(scalars, state, tensor.grad_scale, tensor.coupled_weight_decay)


@triton.jit
def update(param, grad, states, s):
    states, s = States(*states), Scalars(*s)
    direction = sign(s.beta1 * states.exp_avg + s.one_minus_beta1 * grad)
    exp_avg = s.beta2 * states.exp_avg + s.one_minus_beta2 * grad
    param = s.decay * param - s.step_size * direction
    return param, States(exp_avg)


RULES = (
    Rule(
        "lion",
        (("exp_avg", False),),
        (HyperField("lr"), HyperField("betas", 0), HyperField("betas", 1), HyperField("weight_decay")),
        Hyper,
        Scalars,
        prepare,
        update,
    ),
)
