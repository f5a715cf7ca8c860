"""LARC and LARS: a factor of one tensor's gradient from its norms, composed with any rule: the twin of
csrc/rules/trust_ratio.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import DECAYED_SQ, GRAD_SQ, PARAM_SQ, TensorContext

# What the factor is where a norm is zero, and where weight decay stands.
ZERO_NORM_ONE, ZERO_NORM_SKIP, ZERO_NORM_FLOOR, ZERO_NORM_RATIO_ONE = map(tl.constexpr, range(4))
DECAY_OUTSIDE, DECAY_IN_RATIO, DECAY_IN_NORM = map(tl.constexpr, range(3))


class TrustRatio(NamedTuple):
    """Options of a group."""

    coefficient: Any
    eps: Any
    min_update: Any
    clip: Any  # divide by the learning rate, and at most 1
    zero_norm: Any
    weight_decay: Any
    always: Any  # 0: only for tensors with weight decay
    present: Any  # 0: no trust ratio in this group


def needs_of(trust: Any, rule_needs: int) -> int:
    """The norms that a trust ratio, None or an object with these options, takes around a rule with these needs."""
    if trust is None:
        return 0
    inside = trust.weight_decay != DECAY_OUTSIDE.value
    of_sum = trust.weight_decay == DECAY_IN_NORM.value or (inside and rule_needs & GRAD_SQ.value)
    return PARAM_SQ.value | GRAD_SQ.value | (DECAYED_SQ.value if of_sum else 0)


@triton.jit
def trust_ratio(trust, lr, weight_decay, grad_norm, param_norm):
    decay_norm = tl.where(trust.weight_decay == DECAY_IN_RATIO, weight_decay * param_norm, 0)
    ratio = trust.coefficient * param_norm / (grad_norm + decay_norm + trust.eps)
    ratio_one = trust.zero_norm == ZERO_NORM_RATIO_ONE  # takes a NaN for a zero
    positive = (param_norm > 0) & (grad_norm > 0)
    zero = tl.where(ratio_one, positive == 0, (param_norm == 0) | (grad_norm == 0))
    ratio = tl.where(ratio_one & zero, 1, ratio)
    ratio = tl.where(trust.clip != 0, ratio / lr, ratio)
    ratio = tl.where(ratio < trust.min_update, trust.min_update, ratio)
    ratio = tl.where((trust.clip != 0) & (ratio > 1), 1, ratio)
    one = (trust.zero_norm == ZERO_NORM_ONE) | (trust.zero_norm == ZERO_NORM_SKIP)
    return tl.where(zero & one, 1, ratio)


@triton.jit
def apply_trust_ratio(trust, group_lr, weight_decay, decayed_norm, tensor):
    """The weight decay that is left to the rule, which is 0 where the decay is inside, and what `prepare` will see.
    decayed_norm: of grad + weight_decay * param."""
    decay = weight_decay * tensor.weight_decay_scale
    applies = (trust.present != 0) & tensor.has_trust_ratio & ((trust.always != 0) | (decay != 0))
    inside = trust.weight_decay != DECAY_OUTSIDE
    grad_norm = tl.where(trust.weight_decay == DECAY_IN_NORM, decayed_norm, tensor.grad_norm)
    ratio = trust_ratio(trust, group_lr * tensor.lr_scale, decay, grad_norm, tensor.param_norm)
    skip = (trust.zero_norm == ZERO_NORM_SKIP) & ((tensor.param_norm == 0) | (grad_norm == 0))
    seen_norm = tl.where(inside & (skip == 0), decayed_norm, tensor.grad_norm)
    coupled_weight_decay = tl.where(applies & inside, tl.where(skip, 0, decay * ratio), tensor.coupled_weight_decay)
    left = tl.where(applies & inside, 0, weight_decay)
    ratio = tl.where(applies, ratio, 1)
    seen = TensorContext(
        lr_scale=tensor.lr_scale,
        weight_decay_scale=tensor.weight_decay_scale,
        grad_norm=tl.where(applies, ratio * seen_norm, tensor.grad_norm),
        grad_max=tl.where(applies, ratio * tensor.grad_max, tensor.grad_max),
        param_norm=tensor.param_norm,
        direction_norm=tensor.direction_norm,
        has_trust_ratio=tensor.has_trust_ratio,
        grad_scale=ratio,
        coupled_weight_decay=coupled_weight_decay,
        trust_ratio=ratio,
    )
    return left, seen
