"""LAMB."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import ClipGradByGlobalNorm, GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Exclude, Scale
from ..options.texts import explains_options
from ..rule.arithmetic import Number, divide, one_minus_power, square_root, where
from ..rule.contract import TensorContext
from ..rule.hyperparameters import check_arguments

VARIANTS = ("timm", "apex", "paper")


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `accumulate` and `direction` read."""
    step = tensor.state["step"] = tensor.state["step"] + 1
    beta1, beta2 = group["betas"]
    corrected = group["bias_correction"]
    bias_correction1 = one_minus_power(beta1, step) if corrected else 1.0
    bias_correction2 = one_minus_power(beta2, step) if corrected else 1.0
    return SimpleNamespace(
        beta1=beta1,
        grad_weight=1 - beta1 if group["grad_averaging"] else 1.0,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        inverse_bias_correction1=1 / bias_correction1,
        inverse_sqrt_bias_correction2=1 / square_root(bias_correction2),
        eps=group["eps"],
        weight_decay=group["weight_decay"] * tensor.weight_decay_scale,
    )


def accumulate(grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> None:
    """Per element: the new states."""
    states["exp_avg"] = s.beta1 * states["exp_avg"] + s.grad_weight * grad
    states["exp_avg_sq"] = s.beta2 * states["exp_avg_sq"] + s.one_minus_beta2 * grad * grad


def direction(param: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the direction, from the states as they were rounded at the store."""
    denom = square_root(states["exp_avg_sq"]) * s.inverse_sqrt_bias_correction2 + s.eps
    adam = states["exp_avg"] * s.inverse_bias_correction1 / denom
    if isinstance(s.weight_decay, Tensor) or s.weight_decay != 0:
        adam = adam + s.weight_decay * param
    return adam


def scale_direction(group: dict[str, Any], tensor: TensorContext) -> Number:
    """Per tensor: the step's length."""
    adapts: Any = tensor.has_trust_ratio
    if adapts and not group["always_adapt"]:
        adapts = group["weight_decay"] * tensor.weight_decay_scale != 0
    ratio = divide(tensor.param_norm, tensor.direction_norm)
    ratio = where(tensor.param_norm > 0, where(tensor.direction_norm > 0, ratio, 1.0), 1.0)
    ratio = where(adapts, ratio, 1.0)
    if group["trust_clip"]:
        ratio = where(ratio > 1, 1.0, ratio)
    tensor.trust_ratio = ratio
    return group["lr"] * tensor.lr_scale * ratio


@explains_options
class LAMB(FusedOptimizer):
    r"""LAMB: Adam's direction, its length in proportion to the parameter's.

    .. math::

        g_t &\leftarrow g_t / \max(1, \lVert g_t \rVert_{\text{all}} / c) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda\,\theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \gamma\, r\, u_t,
            \qquad r = \lVert \theta_{t-1} \rVert / \lVert u_t \rVert

    Here :math:`\theta` is one tensor ``param``, :math:`m` ``exp_avg``, :math:`v` ``exp_avg_sq``, :math:`\gamma` ``lr``,
    :math:`\lambda` ``weight_decay``, :math:`\epsilon` ``eps``, :math:`c` ``max_grad_norm``, and :math:`t` ``step``,
    which counts the steps of that tensor alone. The trust ratio :math:`r` is 1 where one of its norms is zero or a NaN,
    for an excluded parameter, and, without ``always_adapt``, for one that has no weight decay. The direction is
    computed from the moments as they were rounded at the store.

    Variants: ``"timm"`` and ``"apex"`` (FusedLAMB, whose ``use_nvlamb`` is ``always_adapt``) are these equations;
    ``"paper"`` has no pre-normalisation and always adapts.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. Each has the states ``exp_avg`` and
        ``exp_avg_sq`` of its own shape and dtype, and ``step``, a 0-d float32 tensor on its device. The computation is
        in float32 (float64 for float64 parameters), and each result is rounded once when it is stored.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1e-3.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`. Default (0.9, 0.999).
        eps: added to the denominator, in the gradient's unit. Default 1e-6.
        weight_decay: :math:`\lambda \ge 0`. Default 0.01.
        variant: ``"timm"``, ``"apex"`` or ``"paper"``. Default ``"timm"``.
        bias_correction: divide the moments by :math:`1 - \beta^t`. Default True.
        grad_averaging: weigh the gradient by :math:`1 - \beta_1` in :math:`m`, otherwise by 1. Default True.
        max_grad_norm: :math:`c > 0`, the threshold of the global norm of all gradients; None: no pre-normalisation.
            Default 1.0; the variant ``"paper"`` takes None only, and has it.
        trust_clip: :math:`r` is at most 1.
        always_adapt: use :math:`r` without weight decay too.
        exclude: what has :math:`r = 1`: a callable ``(name, param) -> bool`` or a sequence of name patterns.
        grad_clip: :class:`ClipGradByNorm`, :class:`ClipGradByValue` or :class:`ClipGradByGlobalNorm`, which takes
            ``max_grad_norm=None``: one of them is enough. Default None.

    Raises:
        ValueError: ``lr``, ``betas``, ``eps`` or ``weight_decay`` out of range; an unknown variant; ``grad_clip``
            beside ``max_grad_norm``; an unknown ``backend``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.LAMB(model.parameters(), lr=1e-2)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']

    References:
        You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
        <https://arxiv.org/abs/1904.00962>`_, 2020; timm's Lamb and apex's FusedLAMB for the form.
    """

    choices = (("variant", tuple(VARIANTS)),)
    has_direction = True
    prepare = staticmethod(prepare)
    accumulate = staticmethod(accumulate)
    direction = staticmethod(direction)
    scale_direction = staticmethod(scale_direction)

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "timm",
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        exclude: Exclude | None = None,
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
        check_arguments(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if variant not in VARIANTS:
            raise ValueError(f"LAMB's variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        if variant == "paper":
            if max_grad_norm not in (None, 1.0):  # 1.0: the default
                raise ValueError(
                    f"max_grad_norm={max_grad_norm}: the variant 'paper' does not clip; take the variant 'apex', or "
                    f"grad_clip=ClipGradByGlobalNorm({max_grad_norm})"
                )
            max_grad_norm, always_adapt = None, True
        if max_grad_norm is not None and grad_clip is not None:
            raise ValueError("LAMB clips by max_grad_norm already; pass max_grad_norm=None beside grad_clip")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": False,
        }
        super().__init__(
            params,
            defaults,
            exclude=exclude,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip if max_grad_norm is None else ClipGradByGlobalNorm(max_grad_norm),
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )

    def rule(self, group: dict[str, Any]) -> str:
        return "lamb"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")
