"""SGD, without and with momentum: the twin of csrc/rules/sgd.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import HyperField, Prepared, Rule
from .momentum import MomentumScalars, update_momentum


class Hyper(NamedTuple):
    lr: Any
    weight_decay: Any


class State(NamedTuple):
    pass


class States(NamedTuple):
    pass


class Scalars(NamedTuple):
    step_size: Any


@triton.jit
def prepare(hyper, tensor, state):
    hyper = Hyper(*hyper)
    coupled_weight_decay = tensor.coupled_weight_decay + hyper.weight_decay * tensor.weight_decay_scale
    return Prepared(Scalars(hyper.lr * tensor.lr_scale), state, tensor.grad_scale, coupled_weight_decay)


@triton.jit
def update(param, grad, states, s):
    s = Scalars(*s)
    param = param - s.step_size * grad
    return param, states


class MomentumHyper(NamedTuple):
    lr: Any
    momentum: Any
    dampening: Any
    weight_decay: Any
    nesterov: Any
    variant: Any


class MomentumState(NamedTuple):
    step: Any


class MomentumStates(NamedTuple):
    momentum_buffer: Any


@triton.jit
def prepare_momentum(hyper, tensor, state):
    hyper, state = MomentumHyper(*hyper), MomentumState(*state)
    step = state.step + 1
    first = step == 1
    lr_in_buffer = hyper.variant == 1
    lr = hyper.lr * tensor.lr_scale
    coupled_weight_decay = tensor.coupled_weight_decay + hyper.weight_decay * tensor.weight_decay_scale
    grad_weight = tl.where(first, 1, 1 - hyper.dampening)
    step_size = tl.where(lr_in_buffer, 1, lr)
    nesterov = hyper.nesterov != 0
    scalars = MomentumScalars(
        buffer_decay=tl.where(first, 0, hyper.momentum),
        grad_weight=tl.where(lr_in_buffer, lr * grad_weight, grad_weight),
        decay=lr * 0 + 1,
        step_size=tl.where(nesterov, step_size * hyper.momentum, step_size),
        grad_step=tl.where(nesterov, lr, 0),
    )
    return Prepared(scalars, MomentumState(step), tensor.grad_scale, coupled_weight_decay)


@triton.jit
def update_with_momentum(param, grad, states, s):
    states, s = MomentumStates(*states), MomentumScalars(*s)
    param, momentum_buffer = update_momentum(param, grad, states.momentum_buffer, s)
    return param, MomentumStates(momentum_buffer)


RULES = (
    Rule(
        "sgd",
        (),
        (HyperField("lr"), HyperField("weight_decay")),
        Hyper,
        Scalars,
        prepare,
        update,
    ),
    Rule(
        "momentum",
        (("step", True), ("momentum_buffer", False)),
        (
            HyperField("lr"),
            HyperField("momentum"),
            HyperField("dampening"),
            HyperField("weight_decay"),
            HyperField("nesterov"),
            HyperField("variant", choices=("timm", "optax", "kozistr"), optional=True),
        ),
        MomentumHyper,
        MomentumScalars,
        prepare_momentum,
        update_with_momentum,
    ),
)
