"""NovoGrad in its published variants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale
from ..options.texts import explains_options
from ..rule.arithmetic import divide, larger, one_minus_power, square_root, where
from ..rule.contract import TensorContext
from ..rule.hyperparameters import check_arguments
from .momentum import update_momentum


class Variant(NamedTuple):
    """What a variant sets where the caller says nothing, and the options that it knows."""

    betas: tuple[float, float]
    eps: float
    options: dict[str, Any]
    amsgrad: bool = False  # whether it knows amsgrad


VARIANTS = {
    "paper": Variant((0.95, 0.98), 1e-8, {"grad_averaging": False, "init_zero": False}, amsgrad=True),
    "openseq2seq": Variant((0.95, 0.98), 1e-8, {"grad_averaging": False}),
    "apex": Variant(
        (0.9, 0.999),
        1e-8,
        {
            "grad_averaging": True,
            "bias_correction": True,
            "init_zero": False,
            "norm_type": 2,
            "reg_inside_moment": False,
        },
    ),
    "timm": Variant((0.95, 0.98), 1e-8, {"grad_averaging": False, "decoupled_decay": False}, amsgrad=True),
    "kozistr": Variant(
        (0.95, 0.98),
        1e-8,
        {"grad_averaging": False, "bias_correction": False, "weight_decouple": False, "fixed_decay": False},
    ),
    "optax": Variant((0.9, 0.25), 1e-6, {"eps_root": 0.0}),
    "tfa": Variant((0.9, 0.999), 1e-7, {"grad_averaging": False}, amsgrad=True),
}
# What an option is in a variant that does not know it.
NEUTRAL: dict[str, Any] = {
    "grad_averaging": False,
    "bias_correction": False,
    "init_zero": False,
    "norm_type": 2,
    "reg_inside_moment": False,
    "decoupled_decay": False,
    "weight_decouple": False,
    "fixed_decay": False,
    "eps_root": 0.0,
}


def resolve(variant: str, betas: Any, eps: float | None, amsgrad: bool, options: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a variant.

    Raises:
        ValueError: an unknown variant, or an option that it does not know.
    """
    if variant not in VARIANTS:
        raise ValueError(f"NovoGrad's variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    known = VARIANTS[variant]
    if amsgrad and not known.amsgrad:
        raise ValueError(f"NovoGrad's variant {variant!r} has no amsgrad; 'paper', 'timm' and 'tfa' have")
    for name, value in options.items():
        if value is not None and name not in known.options:
            others = ", ".join(repr(other) for other in VARIANTS if name in VARIANTS[other].options)
            raise ValueError(f"{name}={value!r}: NovoGrad's variant {variant!r} has no such option; {others} has")
    given = {name: value for name, value in options.items() if value is not None}
    resolved = {**NEUTRAL, **known.options, **given}
    if resolved["norm_type"] not in (0, 2):
        raise ValueError(f"norm_type={resolved['norm_type']!r} is not 2 (the L2 norm) or 0 (the largest element)")
    if resolved["fixed_decay"] and not resolved["weight_decouple"]:
        raise ValueError("fixed_decay=True is about decoupled weight decay; it takes weight_decouple=True")
    return {
        "betas": known.betas if betas is None else betas,
        "eps": known.eps if eps is None else eps,
        "amsgrad": amsgrad,
        "variant": variant,
        **resolved,
    }


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the second moment of the gradient's norm, and the scalars that `update` reads."""
    variant = group["variant"]
    beta1, beta2 = group["betas"]
    step = tensor.state["step"] = tensor.state["step"] + 1
    lr = group["lr"] * tensor.lr_scale
    weight_decay = group["weight_decay"] * tensor.weight_decay_scale
    inf_norm = group["norm_type"] == 0

    # The second moment of the norm.
    grad_norm_sq = tensor.grad_max if inf_norm else tensor.grad_norm * tensor.grad_norm
    exp_avg_sq = tensor.state["exp_avg_sq"]
    starts = (exp_avg_sq == 0) & (grad_norm_sq != 0)  # the first gradient that is not all zeros
    replace = variant == "openseq2seq" or (not group["init_zero"] and starts)
    exp_avg_sq = where(replace, grad_norm_sq, beta2 * exp_avg_sq + (1 - beta2) * grad_norm_sq)
    tensor.state["exp_avg_sq"] = second_moment = exp_avg_sq
    if "max_exp_avg_sq" in tensor.state:
        second_moment = larger(tensor.state["max_exp_avg_sq"], exp_avg_sq)
        tensor.state["max_exp_avg_sq"] = second_moment

    # What the gradient is divided by.
    corrected = variant == "apex" and group["bias_correction"]
    bias_correction1 = one_minus_power(beta1, step) if corrected else 1.0
    bias_correction2 = square_root(one_minus_power(beta2, step)) if corrected else 1.0
    eps_inside = group["eps"] if variant == "openseq2seq" else group["eps_root"]
    eps_outside = 0.0 if variant == "openseq2seq" else group["eps"]
    norm = second_moment if inf_norm else square_root(second_moment + eps_inside)
    denom = norm / bias_correction2 + eps_outside

    # Where weight decay stands: on the parameter, or in the moment.
    divided_before = variant != "apex" or group["reg_inside_moment"]
    decay, coupled = 1.0, weight_decay
    if group["decoupled_decay"] or group["weight_decouple"] or not divided_before:
        decay, coupled = 1 - (weight_decay if group["fixed_decay"] else lr * weight_decay), 0.0

    first = (step == 1) | starts
    grad_weight = 1 - beta1 if group["grad_averaging"] else 1.0
    if variant in ("kozistr", "tfa"):
        grad_weight = where(first, 1.0, grad_weight)
    lr_in_buffer = variant == "tfa"
    step_size = 1.0 if lr_in_buffer else lr / bias_correction1
    if variant == "kozistr" and group["bias_correction"]:
        step_size = step_size * square_root(one_minus_power(beta2, step))
    if divided_before:
        tensor.grad_scale = divide(tensor.grad_scale, denom)
        tensor.coupled_weight_decay = divide(tensor.coupled_weight_decay, denom) + coupled
    else:
        step_size = divide(step_size, denom)
    return SimpleNamespace(
        buffer_decay=beta1,
        grad_weight=lr * grad_weight if lr_in_buffer else grad_weight,
        decay=decay,
        step_size=step_size,
        grad_step=0.0,
    )


def update(param: Tensor, grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the new param; `states` receives the new states."""
    param, states["exp_avg"] = update_momentum(param, grad, states["exp_avg"], s)
    return param


@explains_options
class NovoGrad(FusedOptimizer):
    r"""NovoGrad: momentum of gradients, each divided by the root of the second moment of its own norm.

    .. math::

        v_t &= \beta_2\, v_{t-1} + (1 - \beta_2)\,\lVert g_t \rVert^2, \qquad v_s = \lVert g_s \rVert^2 \\
        m_t &= \beta_1\, m_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda\,\theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \gamma\, m_t

    Here :math:`\theta` is one tensor ``param``, :math:`g` its gradient, :math:`m` ``exp_avg``, :math:`v` the number
    ``exp_avg_sq``, :math:`\gamma` ``lr``, :math:`\lambda` ``weight_decay``, :math:`\epsilon` ``eps``, and
    :math:`t = 1, 2, \dots` ``step``, which counts the steps of that tensor alone. At :math:`s`, the first step whose
    gradient is not all zeros, :math:`v` starts from that gradient; before, it is 0. Only timm's code does so: the other
    sources start at step 1 whatever the gradient, and where that is all zeros (LoRA's :math:`A` while :math:`B` is 0)
    their next update is :math:`1 / \sqrt{1 - \beta_2}` times as long.

    The other variants are what others have published under this name; each sets what the caller leaves at None:

    - ``"paper"``: the equations above. Options ``grad_averaging`` (:math:`g_t/(\dots) + \lambda\theta` times
      :math:`1 - \beta_1`), ``init_zero`` (:math:`v` is an average from the first step on), ``amsgrad`` (divide by the
      largest :math:`v` so far).
    - ``"openseq2seq"``: as OpenSeq2Seq ships it: its average is never stored, so that :math:`v_t = \lVert g_t \rVert^2`
      whatever :math:`\beta_2`, and :math:`\epsilon` stands inside the root.
    - ``"apex"``: betas (0.9, 0.999), ``grad_averaging``, ``bias_correction``; decay outside the moment and division
      after it, unless ``reg_inside_moment``; ``norm_type=0`` is the largest element instead of the L2 norm.
    - ``"timm"``: option ``decoupled_decay`` (:math:`\theta` times :math:`1 - \gamma\lambda`). torch_optimizer and
      apex's test reference do the same.
    - ``"kozistr"``: pytorch_optimizer's: the first step is not averaged, nor is step :math:`s`; options
      ``weight_decouple`` and, with it, ``fixed_decay`` (:math:`\theta` times :math:`1 - \lambda`),
      ``bias_correction`` (:math:`\gamma\sqrt{1 - \beta_2^t}`).
    - ``"optax"``: betas (0.9, 0.25), eps 1e-6, and ``eps_root`` inside the root.
    - ``"tfa"``: TensorFlow Addons': betas (0.9, 0.999), eps 1e-7, the learning rate inside the moment, the first step
      not averaged, nor is step :math:`s`. Both are the tensor's own here.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16, of any shape. Each has the states ``exp_avg`` of its own
        shape and dtype, and the 0-d tensors ``step`` (float32) and ``exp_avg_sq`` (float32, or float64 for float64
        parameters; also ``max_exp_avg_sq``) on its device. The computation is in float32 (float64 for float64
        parameters), norms are summed in float64, and each result is rounded once when it is stored: the second
        moment, a square, is infinite in float32 from a norm of 1.8e19 on, and such a tensor no longer follows its
        gradients.

    Advice of the source: switch other regularisation off when weight decay is on; with :class:`LARC`, eta grows with
    the batch. Jasper is trained with ``LARC(NovoGrad(...))``, betas (0.95, 0.98) and weight decay 1e-3; around the
    variant ``"openseq2seq"`` LARC does nothing, since a gradient that is divided by its own norm has forgotten any
    factor.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1e-3.
        betas: :math:`\beta_1, \beta_2 \in [0, 1)`. Default None: the variant's; (0.95, 0.98) for ``"paper"``.
        eps: added to the root, in the gradient's unit. Default None: the variant's; 1e-8 for ``"paper"``.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        variant: one of the above. Default ``"paper"``.
        grad_averaging, bias_correction, init_zero, norm_type, reg_inside_moment: options of the variants above.
            Default None: the variant's own.
        decoupled_decay, weight_decouple, fixed_decay, eps_root: likewise.
        amsgrad: divide by the root of the largest :math:`v_t` so far (``"paper"``, ``"timm"``, ``"tfa"``).

    Raises:
        ValueError: ``lr``, ``betas``, ``eps`` or ``weight_decay`` out of range; an unknown variant, or an option that
            the variant does not know; an unknown ``backend``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.NovoGrad(model.parameters(), lr=1e-2, weight_decay=1e-3)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']

    References:
        Ginsburg et al., `Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks
        <https://arxiv.org/abs/1905.11286>`_, 2019; NVIDIA's OpenSeq2Seq.
    """

    choices = (("variant", tuple(VARIANTS)),)
    structural_keys = ("amsgrad", "differentiable")
    late_states = ("max_exp_avg_sq",)
    prepare = staticmethod(prepare)
    update = staticmethod(update)

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0,
        *,
        variant: str = "paper",
        grad_averaging: bool | None = None,
        amsgrad: bool = False,
        bias_correction: bool | None = None,
        init_zero: bool | None = None,
        norm_type: int | None = None,
        reg_inside_moment: bool | None = None,
        decoupled_decay: bool | None = None,
        weight_decouple: bool | None = None,
        fixed_decay: bool | None = None,
        eps_root: float | None = None,
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
        arguments = locals()
        resolved = resolve(variant, betas, eps, amsgrad, {name: arguments[name] for name in NEUTRAL})
        check_arguments(lr=lr, betas=resolved["betas"], eps=resolved["eps"], weight_decay=weight_decay)
        fixed = {"maximize": maximize, "capturable": capturable, "differentiable": False}
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, **resolved, **fixed},
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
        return "novograd_amsgrad" if group["amsgrad"] else "novograd"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]

    def norms(self, group: dict[str, Any]) -> frozenset[str]:
        return frozenset({"grad_max" if group["norm_type"] == 0 else "grad_norm"})
