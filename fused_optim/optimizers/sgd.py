"""SGD, without and with momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD as TorchSGD  # at import: a user may put ours into torch.optim
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale
from ..options.texts import explains_options
from ..rule.arithmetic import where
from ..rule.contract import TensorContext
from .momentum import update_momentum


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `update` reads."""
    lr = group["lr"] * tensor.lr_scale
    tensor.coupled_weight_decay = tensor.coupled_weight_decay + group["weight_decay"] * tensor.weight_decay_scale
    if "step" not in tensor.state:
        return SimpleNamespace(step_size=lr)
    step = tensor.state["step"] = tensor.state["step"] + 1
    first = step == 1
    lr_in_buffer = group.get("variant") == "optax"
    grad_weight = where(first, 1.0, 1 - group["dampening"])
    step_size = 1.0 if lr_in_buffer else lr
    nesterov = group["nesterov"]
    return SimpleNamespace(
        buffer_decay=where(first, 0.0, group["momentum"]),
        grad_weight=lr * grad_weight if lr_in_buffer else grad_weight,
        decay=1.0,
        step_size=step_size * group["momentum"] if nesterov else step_size,
        grad_step=lr if nesterov else 0.0,
    )


def update(param: Tensor, grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the new param; `states` receives the new states."""
    if "momentum_buffer" not in states:
        return param - s.step_size * grad
    param, states["momentum_buffer"] = update_momentum(param, grad, states["momentum_buffer"], s)
    return param


class MomentumOptimizer(FusedOptimizer):
    """What SGD and LARS share: their rule and its states."""

    structural_keys = ("momentum", "differentiable")
    states_of_first_step = ("momentum_buffer",)
    missing_step = 1.0  # torch's SGD keeps none: a buffer that is there has had its first step
    prepare = staticmethod(prepare)
    update = staticmethod(update)

    def rule(self, group: dict[str, Any]) -> str:
        return "momentum" if group["momentum"] != 0 else "sgd"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step",) if group["momentum"] != 0 else ()


@explains_options
class SGD(MomentumOptimizer):
    r"""SGD with momentum; takes the place of ``torch.optim.SGD``.

    .. math::

        g_t &= \nabla f_t(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        b_1 &= g_1, \qquad b_t = \mu\, b_{t-1} + (1 - \tau)\, g_t \\
        \theta_t &= \theta_{t-1} - \gamma\, b_t
            \quad\text{or, with nesterov,}\quad \theta_{t-1} - \gamma\,(g_t + \mu\, b_t)

    Here :math:`\theta` is ``param``, :math:`b` ``momentum_buffer``, :math:`\gamma` ``lr``, :math:`\lambda`
    ``weight_decay``, :math:`\mu` ``momentum``, :math:`\tau` ``dampening``, and :math:`t = 1, 2, \dots` ``step``, which
    counts the steps of that parameter alone. Without momentum there is no state, and :math:`b_t = g_t`. With
    ``maximize`` the sign of the gradient is changed first. A parameter whose ``grad`` is None is left alone.

    Each parameter's first momentum is its own first gradient, undampened, however late it comes (torch's fused
    implementation asks the first parameter of a group only).

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. With momentum each has the states
        ``momentum_buffer`` of its own shape and dtype, and ``step``, a 0-d float32 tensor on its device, which
        ``torch.optim.SGD`` neither has nor minds (``torch.distributed.checkpoint`` does, which compares keys: between
        the two it takes ``allow_partial_load=True``). The computation is in float32 (float64 for float64 parameters),
        and each result is rounded once when it is stored.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1e-3.
        momentum: :math:`\mu \ge 0`. Default 0.
        dampening: :math:`\tau`. Default 0.
        weight_decay: L2 penalty :math:`\lambda \ge 0`, added to the gradient. Default 0.
        nesterov: look ahead; takes momentum and no dampening.

    Raises:
        ValueError: ``lr``, ``momentum`` or ``weight_decay`` negative, ``nesterov`` without momentum or with dampening,
            with torch's texts; an unknown ``backend``.
        RuntimeError: ``foreach`` and ``fused`` both true, or ``differentiable`` with ``fused`` (torch's texts).

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step']

    References:
        Sutskever et al., `On the importance of initialization and momentum in deep learning
        <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013; torch.optim.SGD for the form.
    """

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        backend: str | None = None,
        lr_scale: Scale | None = None,
        weight_decay_scale: Scale | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        torch_optimizer = TorchSGD(
            [torch.zeros(0)],
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        defaults = torch_optimizer.defaults
        super().__init__(
            params,
            {**defaults, "capturable": True} if capturable else defaults,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )
