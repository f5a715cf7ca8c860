"""LARC and LARS: a factor of one tensor's gradient from its norms, composed with any rule before its `prepare`."""

from __future__ import annotations

from typing import NamedTuple

from .arithmetic import Condition, Number, divide, either, invert, where

# What the factor is where a norm is zero, and where weight decay stands; csrc/rules/trust_ratio.h has the same.
ONE, SKIP, FLOOR, RATIO_ONE = range(4)
OUTSIDE, IN_RATIO, IN_NORM = range(3)


class TrustRatio(NamedTuple):
    """The options of a group.

    ``clip``: divide by the learning rate, and at most 1. ``zero_norm``: `ONE`, the factor is 1; `SKIP`, it is 1 and the
    tensor is not decayed; `FLOOR`, nothing special, so ``min_update`` it is; `RATIO_ONE`, the ratio is 1 before it is
    clipped, for a NaN too. ``weight_decay``: `OUTSIDE`, left to the rule; `IN_RATIO`, in the gradient and its norm in
    the denominator; `IN_NORM`, in the gradient, whose norm is that of the sum. ``always``: False: only for tensors with
    weight decay.
    """

    coefficient: float
    eps: float
    min_update: float = 0.0
    clip: bool = False
    zero_norm: int = ONE
    weight_decay: int = OUTSIDE
    always: bool = True

    def factor(
        self, lr: Number, weight_decay: Number, grad_norm: Number, param_norm: Number
    ) -> tuple[Number, Condition]:
        """The factor, and whether a norm was zero.

        ``lr`` and ``weight_decay`` are the tensor's, scales included; ``grad_norm`` is that of the clipped gradient,
        with `IN_NORM` that of ``grad + weight_decay * param``.
        """
        decay_norm = weight_decay * param_norm if self.weight_decay == IN_RATIO else 0.0
        ratio = divide(self.coefficient * param_norm, grad_norm + decay_norm + self.eps)
        if self.zero_norm == RATIO_ONE:
            zero = either(invert(param_norm > 0), invert(grad_norm > 0))  # a NaN counts as zero
            ratio = where(zero, 1.0, ratio)
        else:
            zero = either(param_norm == 0, grad_norm == 0)
        if self.clip:
            ratio = divide(ratio, lr)
        ratio = where(ratio < self.min_update, self.min_update, ratio)
        if self.clip:
            ratio = where(ratio > 1, 1.0, ratio)
        if self.zero_norm in (ONE, SKIP):
            ratio = where(zero, 1.0, ratio)
        return ratio, zero
