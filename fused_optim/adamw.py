"""AdamW and Adam."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .eager import TensorContext, one_minus_power, square_root
from .optimizer import FusedOptimizer


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `update` reads."""
    step = tensor.step
    beta1, beta2 = group["betas"]
    lr = group["lr"] * tensor.lr_scale
    weight_decay = group["weight_decay"] * tensor.weight_decay_scale
    decoupled = group["decoupled_weight_decay"]
    bias_correction1 = one_minus_power(beta1, step)
    bias_correction2 = one_minus_power(beta2, step)
    return SimpleNamespace(
        weight_decay=0.0 if decoupled else weight_decay,
        decay=1 - lr * weight_decay if decoupled else 1.0,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        inverse_sqrt_bias_correction2=1 / square_root(bias_correction2),
        eps=group["eps"],
        step_size=lr / bias_correction1,
    )


def update(param: Tensor, grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the new param; `states` receives the new states."""
    exp_avg, exp_avg_sq = states["exp_avg"], states["exp_avg_sq"]
    if isinstance(s.weight_decay, Tensor) or s.weight_decay != 0:
        grad = grad + s.weight_decay * param
    param = param * s.decay
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    second_moment = exp_avg_sq
    if "max_exp_avg_sq" in states:
        second_moment = states["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], exp_avg_sq)
    denom = square_root(second_moment) * s.inverse_sqrt_bias_correction2 + s.eps
    param = param - s.step_size * exp_avg / denom
    states["exp_avg"], states["exp_avg_sq"] = exp_avg, exp_avg_sq
    return param


class Adam(FusedOptimizer):
    structural_keys = ("amsgrad", "differentiable")
    late_states = ("max_exp_avg_sq",)
    prepare = staticmethod(prepare)
    update = staticmethod(update)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        torch_optimizer = torch.optim.Adam(
            [torch.zeros(0)],
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, torch_optimizer.defaults, backend=backend, state_dtype=state_dtype)

    def rule(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adamw"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


class AdamW(Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            backend=backend,
            state_dtype=state_dtype,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever a checkpoint of Adam says
            group["decoupled_weight_decay"] = True
