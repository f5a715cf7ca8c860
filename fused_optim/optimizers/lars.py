"""LARS."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..options.clip import ClipGradByGlobalNorm, ClipGradByNorm, GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Exclude, Scale
from ..options.texts import explains_options
from ..rule.hyperparameters import check_arguments, check_limits
from ..rule.trust_ratio import IN_NORM, IN_RATIO, ONE, RATIO_ONE, TrustRatio
from .sgd import MomentumOptimizer

VARIANTS = ("timm", "optax", "kozistr")


@explains_options
class LARS(MomentumOptimizer):
    r"""LARS: SGD with momentum, each tensor's gradient scaled by a trust ratio.

    .. math::

        r &= \eta\, \frac{\lVert \theta_{t-1} \rVert}{\lVert g_t \rVert + \lambda \lVert \theta_{t-1} \rVert + \epsilon}
        \\ b_t &= \mu\, b_{t-1} + r\,(g_t + \lambda\,\theta_{t-1}), \qquad \theta_t = \theta_{t-1} - \gamma\, b_t

    Here :math:`\theta` is one tensor ``param``, :math:`g` its gradient, :math:`b` ``momentum_buffer``, :math:`\gamma`
    ``lr``, :math:`\lambda` ``weight_decay``, :math:`\mu` ``momentum``, :math:`\eta` ``trust_coefficient`` and
    :math:`\epsilon` ``eps``.

    Variants:

    - ``"timm"``: the equations above; :math:`r = 1` where a norm is zero or a NaN, with the decay kept; without weight
      decay a tensor is stepped by plain SGD unless ``always_adapt``; ``trust_clip`` makes it LARC:
      :math:`\min(r / \gamma, 1)`.
    - ``"optax"``: :math:`r = \eta \lVert \theta \rVert / (\lVert g + \lambda\theta \rVert + \epsilon)`, 1 where a norm
      is zero, and the learning rate inside the momentum buffer.
    - ``"kozistr"``: pytorch_optimizer's: timm's ratio with eps 0, also without weight decay; tensors of at most one
      dimension are stepped by plain SGD without decay. Its first momentum is dampened and its ratio for a gradient of
      zeros is :math:`\eta/\lambda`; here the first is the gradient and the second 1, as in the other variants.

    Shapes and dtypes:
        As :class:`SGD`.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1.0, as timm's.
        momentum: :math:`\mu \ge 0`. Default 0.9.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        variant: one of the above. Default ``"timm"``.
        trust_coefficient: :math:`\eta > 0`. Default 0.001.
        eps: :math:`\epsilon \ge 0`. Default None: 1e-8 for ``"timm"``, 0 for the others.
        nesterov: look ahead; takes momentum and no dampening.
        dampening: as :class:`SGD`'s. Default 0.
        trust_clip, always_adapt: see ``"timm"``.
        exclude: what has no trust ratio, usually biases and norms: a callable ``(name, param) -> bool`` or a sequence
            of name patterns; for no decay too, see ``weight_decay_scale``.
        grad_clip: :class:`ClipGradByNorm` (not for ``"optax"``) or :class:`ClipGradByValue`; a global norm is refused,
            since the ratio undoes what it does, except ``math.inf``, which only measures. Default None.

    Raises:
        ValueError: ``lr``, ``momentum`` or ``weight_decay`` negative; ``trust_coefficient`` not finite and greater than
            0; an unknown variant; options that contradict each other; an unknown ``backend``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.LARS(model.named_parameters(), lr=0.1, weight_decay=1e-4, exclude=["bias"])
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_norms.names
        ('weight', 'bias')

    References:
        You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_,
        2017.
    """

    choices = (("variant", tuple(VARIANTS)),)

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        variant: str = "timm",
        trust_coefficient: float = 0.001,
        eps: float | None = None,
        nesterov: bool = False,
        dampening: float = 0,
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
        if variant not in VARIANTS:
            raise ValueError(f"LARS's variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        if variant != "timm" and (trust_clip or always_adapt):
            raise ValueError(f"trust_clip and always_adapt are options of the variant 'timm', not of {variant!r}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        refuse_clip("LARS", grad_clip, decay_in_norm=variant == "optax")
        eps = (1e-8 if variant == "timm" else 0.0) if eps is None else eps
        check_arguments(lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps)
        check_trust_coefficient(trust_coefficient)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "variant": variant,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
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
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )

    def trust_ratio(self, group: dict[str, Any]) -> TrustRatio | None:
        optax = group["variant"] == "optax"
        check_limits("eps", [group["eps"]])
        check_trust_coefficient(group["trust_coefficient"])
        return TrustRatio(
            float(group["trust_coefficient"]),
            float(group["eps"]),
            clip=bool(group["trust_clip"]),
            zero_norm=ONE if optax else RATIO_ONE,
            weight_decay=IN_NORM if optax else IN_RATIO,
            always=bool(group["always_adapt"]) or group["variant"] != "timm",
        )

    def exempt(self, group: dict[str, Any], param: Tensor) -> bool:
        return bool(group["variant"] == "kozistr" and param.ndim <= 1)


def check_trust_coefficient(trust_coefficient: float | Tensor) -> None:
    """Refuse what the constructor and a group may not hold.

    Raises:
        ValueError: it is not finite and greater than 0.
    """
    if not (trust_coefficient > 0 and math.isfinite(trust_coefficient)):
        raise ValueError(f"Invalid trust_coefficient value: {trust_coefficient}")


def refuse_clip(what: str, grad_clip: GradClip | None, *, decay_in_norm: bool) -> None:
    """Refuse a clip that a trust ratio undoes, or whose factor comes too late for it.

    Raises:
        ValueError: a global norm; a clip by norm where the ratio is that of gradient and decay together.
    """
    if grad_clip is not None and math.isinf(grad_clip.options.norm):
        return  # it measures and scales nothing, or clips by value
    if isinstance(grad_clip, ClipGradByGlobalNorm):
        raise ValueError(f"{what} and gradient norm clipping should not be used together: its ratio undoes the clip's")
    if isinstance(grad_clip, ClipGradByNorm) and decay_in_norm:
        raise ValueError(
            f"{what} takes the norm of gradient and weight decay together here, which ClipGradByNorm would have to "
            "know before; clip by value, or not at all"
        )
