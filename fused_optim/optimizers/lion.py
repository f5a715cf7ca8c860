"""Lion."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale
from ..options.texts import explains_options
from ..rule.contract import TensorContext
from ..rule.hyperparameters import check_arguments


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `update` reads."""
    beta1, beta2 = group["betas"]
    lr = group["lr"] * tensor.lr_scale
    weight_decay = group["weight_decay"] * tensor.weight_decay_scale
    return SimpleNamespace(
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        decay=1 - lr * weight_decay,
        step_size=lr,
    )


def update(param: Tensor, grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the new param; `states` receives the new states."""
    exp_avg = states["exp_avg"]
    direction = torch.sign(s.beta1 * exp_avg + s.one_minus_beta1 * grad)
    states["exp_avg"] = s.beta2 * exp_avg + s.one_minus_beta2 * grad
    return s.decay * param - s.step_size * direction


@explains_options
class Lion(FusedOptimizer):
    r"""Lion: the sign of an interpolated momentum.

    .. math::

        \theta_t &= (1 - \gamma\lambda)\,\theta_{t-1}
            - \gamma\,\operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1)\, g_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2)\, g_t

    Here :math:`\theta` is ``param``, :math:`g` its gradient, :math:`m` ``exp_avg``, :math:`\gamma` ``lr`` and
    :math:`\lambda` ``weight_decay``. The sign of 0 and of a NaN is 0. A parameter whose ``grad`` is None is left alone.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. Each has the state ``exp_avg`` of its own
        shape and dtype. The computation is in float32 (float64 for float64 parameters), and each result is rounded once
        when it is stored.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1e-4; the paper advises a
            third to a tenth of AdamW's.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`. Default (0.9, 0.99).
        weight_decay: :math:`\lambda \ge 0`; each step shrinks the parameter by :math:`1 - \gamma\lambda`. Default 0.

    Raises:
        ValueError: ``lr``, ``betas`` or ``weight_decay`` out of range; an unknown ``backend``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.Lion(model.parameters(), lr=1e-4)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg']

    References:
        Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023.
    """

    prepare = staticmethod(prepare)
    update = staticmethod(update)

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
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
        check_arguments(lr=lr, betas=betas, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": False,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )

    def rule(self, group: dict[str, Any]) -> str:
        return "lion"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()
