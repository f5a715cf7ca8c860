"""The element update that SGD with momentum, LARS and every variant of NovoGrad share."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor


def update_momentum(param: Tensor, grad: Tensor, buffer: Tensor, s: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The new param and the new buffer."""
    buffer = s.buffer_decay * buffer + s.grad_weight * grad
    param = s.decay * param - s.step_size * buffer
    if isinstance(s.grad_step, Tensor) or s.grad_step != 0:
        param = param - s.grad_step * grad
    return param, buffer
