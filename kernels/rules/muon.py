"""Muon: the twin of csrc/rules/muon.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import HyperField, Prepared, Rule


class Hyper(NamedTuple):
    lr: Any
    momentum: Any
    weight_decay: Any
    nesterov: Any


class States(NamedTuple):
    momentum_buffer: Any


class Direction(NamedTuple):
    direction: Any


class Scalars(NamedTuple):
    momentum: Any
    one_minus_momentum: Any
    nesterov: Any
    weight_decay: Any
    step_size: Any


@triton.jit
def prepare(hyper, tensor, state):
    hyper = Hyper(*hyper)
    scalars = Scalars(
        momentum=hyper.momentum,
        one_minus_momentum=1 - hyper.momentum,
        nesterov=tl.where(hyper.nesterov != 0, 1, 0),
        weight_decay=hyper.weight_decay * tensor.weight_decay_scale,
        step_size=hyper.lr * tensor.lr_scale,
    )
    return Prepared(scalars, state, tensor.grad_scale, tensor.coupled_weight_decay)


@triton.jit
def accumulate(grad, states, s):
    states, s = States(*states), Scalars(*s)
    momentum_buffer = s.momentum * states.momentum_buffer + s.one_minus_momentum * grad
    ahead = s.momentum * momentum_buffer + s.one_minus_momentum * grad
    return momentum_buffer, tl.where(s.nesterov != 0, ahead, momentum_buffer)


@triton.jit
def direction(param, kept, s):
    kept, s = Direction(*kept), Scalars(*s)
    return tl.where(s.weight_decay != 0, kept.direction + s.weight_decay * param, kept.direction)


RULES = (
    Rule(
        "muon",
        (("momentum_buffer", False),),
        (HyperField("lr"), HyperField("momentum"), HyperField("weight_decay"), HyperField("nesterov")),
        Hyper,
        Scalars,
        prepare,
        accumulate=accumulate,
        direction=direction,
    ),
)
