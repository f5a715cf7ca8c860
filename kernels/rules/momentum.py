"""The element update that SGD with momentum, LARS and every variant of NovoGrad share: the twin of
csrc/rules/momentum.h."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class MomentumScalars(NamedTuple):
    buffer_decay: Any
    grad_weight: Any
    decay: Any
    step_size: Any
    grad_step: Any  # Nesterov's: the part of the step that the gradient takes itself


@triton.jit
def update_momentum(param, grad, buffer, s):
    buffer = s.buffer_decay * buffer + s.grad_weight * grad
    param = s.decay * param - s.step_size * buffer
    param = tl.where(s.grad_step != 0, param - s.grad_step * grad, param)
    return param, buffer
