"""AdamW and Adam."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam as TorchAdam  # at import: a user may put ours into torch.optim
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale
from ..options.texts import explains_options
from ..rule.arithmetic import one_minus_power, square_root
from ..rule.contract import TensorContext
from ..rule.hyperparameters import check_betas

# Which learning rate decoupled weight decay takes; csrc/rules/adamw.h has the same.
DECAY_SCALINGS = ("scaled", "base", "double")


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `update` reads."""
    step = tensor.state["step"] = tensor.state["step"] + 1
    beta1, beta2 = group["betas"]
    lr = group["lr"] * tensor.lr_scale
    weight_decay = group["weight_decay"] * tensor.weight_decay_scale
    decoupled = group["decoupled_weight_decay"]
    decay_scaling = group.get("decay_scaling", "scaled")
    scaled_decay = 1 - lr * weight_decay if decay_scaling != "base" else 1.0
    base_decay = 1 - group["lr"] * weight_decay if decay_scaling != "scaled" else 1.0
    bias_correction1 = one_minus_power(beta1, step)
    bias_correction2 = one_minus_power(beta2, step)
    if not decoupled:
        tensor.coupled_weight_decay = tensor.coupled_weight_decay + weight_decay
    return SimpleNamespace(
        decay=scaled_decay * base_decay if decoupled else 1.0,
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


@explains_options
class Adam(FusedOptimizer):
    r"""Adam; takes the place of ``torch.optim.Adam``.

    .. math::

        g_t &= \nabla f_t(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \frac{\gamma}{1 - \beta_1^t} \, \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Here :math:`\theta` is ``param``, :math:`g` its gradient, :math:`m` ``exp_avg``, :math:`v` ``exp_avg_sq``,
    :math:`\gamma` ``lr``, :math:`\lambda` ``weight_decay``, :math:`\epsilon` ``eps``, and :math:`t = 1, 2, \dots`
    ``step``, which counts the steps of that parameter alone.

    With ``amsgrad``, :math:`v_t` in the last line is replaced by :math:`\max(v_1, \dots, v_t)`, which is kept as
    ``max_exp_avg_sq``. With ``maximize`` the sign of :math:`g` is changed first. A parameter whose ``grad`` is None
    is left alone: no update, no decay, no step.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. Each has the states ``exp_avg``,
        ``exp_avg_sq`` (and ``max_exp_avg_sq``) of its own shape and dtype, and ``step``, a 0-d float32 tensor on its
        device. The computation is in float32 (float64 for float64 parameters), and each result is rounded once when
        it is stored. Complex parameters go through the eager path.

    Args:
        lr: learning rate :math:`\gamma \ge 0`, change per step in the parameter's own unit; a number or a one-element
            Tensor. Default 1e-3.
        betas: decay rates :math:`\beta_1, \beta_2 \in [0, 1)` of the averages, per step. Default (0.9, 0.999).
        eps: added to the denominator, in the gradient's unit. Default 1e-8.
        weight_decay: L2 penalty :math:`\lambda \ge 0`, added to the gradient. Default 0.
        amsgrad: divide by the root of the largest :math:`v_t` so far.
        decoupled_weight_decay: decay as :class:`AdamW` does. Default False; loading a checkpoint replaces it.
        lazy_mode: take sparse gradients, as ``nn.Embedding(..., sparse=True)`` makes them, and update the rows that
            they list and no other, decay included; rows that are listed twice are summed. The step count is the
            parameter's, as with dense gradients, which it leaves as they are. Clipping, scales, masters and GradScaler
            work as usual. Goes through the eager path, and cannot be captured into a CUDA graph. Default False.

    Raises:
        ValueError: ``lr``, ``betas``, ``eps`` or ``weight_decay`` out of range, with torch's texts; an unknown
            ``backend``, or one that takes none of the parameters; another ``state_dtype``.
        RuntimeError: ``foreach`` and ``fused`` both true, or ``differentiable`` with ``fused`` (torch's texts); a
            forced backend that cannot be used here.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.Adam(model.parameters(), lr=1e-2)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']

    References:
        Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
        Reddi, Kale and Kumar, `On the Convergence of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_, 2018
        (AMSGrad).
    """

    structural_keys = ("amsgrad", "differentiable")
    late_states = ("max_exp_avg_sq",)
    takes_sparse = True
    choices = (("decay_scaling", DECAY_SCALINGS),)
    prepare = staticmethod(prepare)
    update = staticmethod(update)

    @refuse_peer_arguments
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
        lazy_mode: bool = False,
        backend: str | None = None,
        lr_scale: Scale | None = None,
        weight_decay_scale: Scale | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        torch_optimizer = TorchAdam(
            *([torch.zeros(0)], lr, betas, eps, weight_decay, amsgrad),
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        check_betas(betas)  # after torch's own answers
        super().__init__(
            params,
            torch_optimizer.defaults,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
            lazy_mode=lazy_mode,
        )

    def rule(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adamw"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]


@explains_options
class AdamW(Adam):
    r"""Adam with decoupled weight decay; takes the place of ``torch.optim.AdamW``.

    .. math::

        g_t &= \nabla f_t(\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        \theta_t &= (1 - \gamma\lambda)\,\theta_{t-1}
            - \frac{\gamma}{1 - \beta_1^t} \, \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Here :math:`\theta` is ``param``, :math:`g` its gradient, :math:`m` ``exp_avg``, :math:`v` ``exp_avg_sq``,
    :math:`\gamma` ``lr``, :math:`\lambda` ``weight_decay``, :math:`\epsilon` ``eps``, and :math:`t = 1, 2, \dots`
    ``step``, which counts the steps of that parameter alone.

    With ``amsgrad``, :math:`v_t` in the last line is replaced by :math:`\max(v_1, \dots, v_t)`, which is kept as
    ``max_exp_avg_sq``. With ``maximize`` the sign of :math:`g` is changed first. A parameter whose ``grad`` is None
    is left alone: no update, no decay, no step.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. Each has the states ``exp_avg``,
        ``exp_avg_sq`` (and ``max_exp_avg_sq``) of its own shape and dtype, and ``step``, a 0-d float32 tensor on its
        device. The computation is in float32 (float64 for float64 parameters), and each result is rounded once when
        it is stored. Complex parameters go through the eager path.

    Args:
        lr: learning rate :math:`\gamma \ge 0`, change per step in the parameter's own unit; a number or a one-element
            Tensor. Default 1e-3.
        betas: decay rates :math:`\beta_1, \beta_2 \in [0, 1)` of the averages, per step. Default (0.9, 0.999).
        eps: added to the denominator, in the gradient's unit. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`; each step shrinks the parameter by the factor
            :math:`1 - \gamma\lambda`. Default 1e-2.
        amsgrad: divide by the root of the largest :math:`v_t` so far.
        lazy_mode: take sparse gradients, and update only the rows that they list; see :class:`Adam`. Default False.

    Raises:
        ValueError: ``lr``, ``betas``, ``eps`` or ``weight_decay`` out of range, with torch's texts; an unknown
            ``backend``, or one that takes none of the parameters; another ``state_dtype``.
        RuntimeError: ``foreach`` and ``fused`` both true, or ``differentiable`` with ``fused`` (torch's texts); a
            forced backend that cannot be used here.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["step"]
        tensor(1.)

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
        Reddi, Kale and Kumar, `On the Convergence of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_, 2018
        (AMSGrad).
    """

    @refuse_peer_arguments
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
        lazy_mode: bool = False,
        backend: str | None = None,
        lr_scale: Scale | None = None,
        weight_decay_scale: Scale | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
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
            lazy_mode=lazy_mode,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever a checkpoint of Adam says
            group["decoupled_weight_decay"] = True
