"""AdamWDL: AdamW with layer-wise learning rates and a decay mask by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..backends.choice import logger
from ..options.clip import GradClip
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale, ScaleColumn, ScaleProduct, column_of, plain_name
from ..options.texts import explains_options
from .adamw import DECAY_SCALINGS, AdamW


@dataclass(frozen=True)
class NamedParam:
    """What ``set_param_lr_fun`` is asked about: a parameter with the name that torch does not give it."""

    param: Tensor
    place: str
    own_name: str | None

    @property
    def name(self) -> str:
        if self.own_name is None:
            raise ValueError(
                f"set_param_lr_fun and layerwise_decay ask for names, but {self.place} has none; pass "
                "model.named_parameters() instead of model.parameters(), or give lr_scale a mapping keyed by Parameter"
            )
        return self.own_name

    @property
    def shape(self) -> torch.Size:
        return self.param.shape

    @property
    def ndim(self) -> int:
        return self.param.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.param.dtype


def layerwise_lr_decay(decay_rate: float, name_dict: Mapping[str, str] | None, n_layers: int, param: Any) -> float:
    r"""The ratio of one parameter's learning rate, from the name of its layer.

    .. math::

        r = \begin{cases}
            \alpha^{\,n - k} & \text{the name has encoder.layers.}k, \quad k = 0, 1, \dots \\
            \alpha^{\,n + 1} & \text{it has embedding} \\
            1 & \text{otherwise: pooler, classifier, decoder and the like}
        \end{cases}

    Here :math:`\alpha` is ``decay_rate`` and :math:`n` ``n_layers``. Layers are counted from 0, so the topmost of 12
    has :math:`\alpha^1`, one power more than in the prose of PaddleNLP ("the 24-th layer l, layer m gets
    l·α^(24-m)"): what its code computes counts here.

    Args:
        decay_rate: :math:`\alpha`.
        name_dict: from ``param.name`` to the name with the layer in it. None: the name itself.
        n_layers: :math:`n`. A layer beyond it has a ratio of 1 or more, and a warning in the log.
        param: anything with a ``name``.

    Returns:
        The ratio :math:`r`.

    Raises:
        KeyError: ``name_dict`` lacks the name.
        ValueError: the name has ``encoder.layers`` and no number after it.

    Example:
        >>> from types import SimpleNamespace
        >>> from fused_optim import layerwise_lr_decay
        >>> layerwise_lr_decay(0.5, None, 12, SimpleNamespace(name="encoder.layers.10.linear1.weight"))
        0.25
    """
    if name_dict is not None and param.name not in name_dict:
        raise KeyError(
            f"name_dict has no entry for the parameter {param.name!r}; its keys are the names of "
            "model.named_parameters(), for which name_dict=None stands as well"
        )
    name = param.name if name_dict is None else name_dict[param.name]
    if "encoder.layers" in name:
        _, _, rest = name.partition("encoder.layers.")
        number = re.match(r"\d+(?=\.|$)", rest)
        if number is None:
            raise ValueError(
                f"the parameter {param.name!r} has 'encoder.layers' in its name {name!r}, but no layer number after "
                "it; rename it in name_dict, or give a set_param_lr_fun of your own"
            )
        layer = int(number[0])
        if layer >= n_layers:
            logger.warning(
                "layerwise_lr_decay: %s is in layer %s, beyond n_layers=%s: its learning rate does not decay",
                param.name,
                layer,
                n_layers,
            )
        exponent = n_layers - layer
    elif "embedding" in name:
        exponent = n_layers + 1
    else:
        return 1.0
    try:
        return float(decay_rate) ** exponent
    except (OverflowError, ZeroDivisionError):
        return math.inf


LearningRateFunction = Callable[[float, Mapping[str, str], int, Any], float]


class LayerRatios(ScaleColumn):
    """The column of ratios that ``set_param_lr_fun`` gives, asked once for each parameter.

    Raises:
        TypeError, ValueError: an argument that cannot be used; the text names it.
    """

    def __init__(
        self,
        layerwise_decay: Any,
        n_layers: Any,
        function: Any,
        name_dict: Any,
    ) -> None:
        if not hasattr(layerwise_decay, "__float__"):  # a string has none
            raise TypeError(f"layerwise_decay must be a number, got {layerwise_decay!r}")
        self.rate: float = float(layerwise_decay)
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ValueError(f"layerwise_decay must be finite and not negative, got {self.rate}")
        if not isinstance(n_layers, Integral):
            raise TypeError(f"n_layers must be an int, got {n_layers!r}")
        if n_layers < 0:
            raise ValueError(f"n_layers must not be negative, got {n_layers}")
        if function is not None and not callable(function):
            raise TypeError(
                "set_param_lr_fun must be a callable (decay_rate, name_dict, n_layers, param) -> float or None, got "
                f"{function!r}"
            )
        if name_dict is not None and not isinstance(name_dict, Mapping):
            raise TypeError(f"name_dict must be a mapping from name to name or None, got {type(name_dict).__name__}")
        self.n_layers: int = int(n_layers)
        self.own_names: bool = name_dict is None
        # Names come without the wrappers' prefixes; a name_dict made from a wrapped model has them.
        self.name_dict: dict[str, str] = {plain_name(str(key)): name for key, name in (name_dict or {}).items()}
        without_effect = function is layerwise_lr_decay and self.rate == 1
        super().__init__("set_param_lr_fun", None if without_effect else function)

    def resolve(self, params: Sequence[tuple[str | None, str, Tensor]]) -> None:
        if self.own_names:
            self.name_dict = {plain: plain for plain in (plain_name(name) for name, _, _ in params if name is not None)}
        super().resolve(params)

    def _ask(self, name: str | None, place: str, param: Tensor) -> float:
        plain = None if name is None else plain_name(name)
        if self.own_names and plain is not None:
            self.name_dict[plain] = plain
        function = cast(LearningRateFunction, self.source)
        ratio = function(self.rate, self.name_dict, self.n_layers, NamedParam(param, place, plain))
        if ratio is None:
            raise TypeError(
                f"set_param_lr_fun returned None for {place}; it must return the ratio of its learning rate (a change "
                "of param.optimize_attr, as in PaddleNLP's example, has no effect)"
            )
        return self._checked(ratio, place)


def decay_mask(function: Callable[[str], bool] | None) -> ScaleColumn:
    """``apply_decay_param_fun`` as a column: 1 where it is true, 0 elsewhere."""
    if function is None:
        return ScaleColumn("apply_decay_param_fun", None)
    if not callable(function):
        raise TypeError(f"apply_decay_param_fun must be a callable (name) -> bool or None, got {function!r}")
    return ScaleColumn("apply_decay_param_fun", lambda name, param: float(bool(function(name))))


def check_decay_scaling(decay_scaling: Any, where: str) -> None:
    """Refuse another word than those of ``decay_scaling``.

    Raises:
        ValueError: the text lists the words.
    """
    if decay_scaling not in DECAY_SCALINGS:
        raise ValueError(f"{where} must be one of 'scaled', 'base', 'double', got {decay_scaling!r}")


@explains_options
class AdamWDL(AdamW):
    r"""AdamW with layer-wise learning rate decay and a decay mask, after PaddleNLP's AdamWDL.

    .. math::

        g_t &= \nabla f_t(\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        \theta_t &= (1 - \gamma r \lambda d)\,\theta_{t-1}
            - \frac{\gamma r}{1 - \beta_1^t} \, \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Here :math:`r` is the ratio that ``set_param_lr_fun`` gives the parameter (times its ``lr_scale``) and :math:`d` is
    1 or 0, as ``apply_decay_param_fun`` says (times its ``weight_decay_scale``); the other letters are those of
    :class:`AdamW`: :math:`\theta` ``param``, :math:`m` ``exp_avg``, :math:`v` ``exp_avg_sq``, :math:`\gamma` ``lr``,
    :math:`\lambda` ``weight_decay``, :math:`\epsilon` ``eps``, :math:`t` the parameter's own ``step``. With
    ``layerwise_decay=1.0`` and no mask it is :class:`AdamW`.

    The ratios are factors of a table, asked for once, when the optimizer is made: layers need no param groups, and
    all are updated at once. Weight decay takes one of three learning rates:

    ==================  ==========================================================  =================================
    ``decay_scaling``   factor of the parameter                                     as in
    ==================  ==========================================================  =================================
    ``"scaled"``        :math:`1 - \gamma r \lambda d`                              torch with param groups, Paddle's
                                                                                    ``AdamW(lr_ratio=...)``
    ``"base"``          :math:`1 - \gamma \lambda d`                                PaddleNLP 2.0 to 2.2
    ``"double"``        :math:`(1 - \gamma \lambda d)(1 - \gamma r \lambda d)`      PaddleNLP 2.4 to 2.8.1
    ==================  ==========================================================  =================================

    Shapes and dtypes:
        Those of :class:`AdamW`, and its states: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``.

    Args:
        params: ``model.named_parameters()``, or what :class:`AdamW` takes. Torch's parameters do not know their
            names: without names ``layerwise_decay`` must be 1.0, and no function may ask for one.
        lr: learning rate :math:`\gamma \ge 0`, change per step in the parameter's own unit; a number or a one-element
            Tensor. Default 1e-3. (Paddle: ``learning_rate``; a scheduler is made around the optimizer, as in torch.)
        betas: decay rates :math:`\beta_1, \beta_2 \in [0, 1)` of the averages, per step. Default (0.9, 0.999).
            (Paddle: ``beta1``, ``beta2``.)
        eps: added to the denominator, in the gradient's unit. Default 1e-8. (Paddle: ``epsilon``.)
        weight_decay: :math:`\lambda \ge 0`. Default 1e-2.
        amsgrad: divide by the root of the largest :math:`v_t` so far.
        layerwise_decay: decay rate :math:`\alpha \ge 0` that ``set_param_lr_fun`` is given; at 1.0, the default,
            `layerwise_lr_decay` is not asked.
        n_layers: number of layers, which ``set_param_lr_fun`` is given. Default 12.
        set_param_lr_fun: ``(decay_rate, name_dict, n_layers, param) -> ratio``, a finite number, 0 or more; ``param``
            has ``name``, ``shape``, ``ndim``, ``dtype`` and ``param``, the parameter itself. Default
            :func:`layerwise_lr_decay`; None: the ratio is 1.
        name_dict: from the names of ``named_parameters()`` to those by which ``set_param_lr_fun`` tells the layers.
            Default None: each name stands for itself. Names come without ``module.``, ``_orig_mod.`` and the like,
            which wrappers put before them.
        apply_decay_param_fun: ``(name) -> bool``: weight decay only where it is true; moments and steps do not
            depend on it. Default None: everywhere.
        decay_scaling: ``"scaled"``, ``"base"`` or ``"double"``: see above. Default ``"scaled"``. Kept in the groups
            unless it is ``"scaled"``.
        lazy_mode: take sparse gradients, and update only the rows that they list; see :class:`Adam`. Default False.
        multi_precision: Paddle's word for ``master_weights="float32"``; a ``master_weights`` given beside it counts.
        lr_scale, weight_decay_scale: factors per parameter, as :class:`AdamW` takes them. They multiply with the
            ratios of ``set_param_lr_fun`` and with the mask of ``apply_decay_param_fun``. Default None: 1.0.

    Paddle's ``name`` is a prefix of its variables' names, which torch's states do not have. Its auxiliary variables
    are the entries of ``optimizer.state``. Its static graph has no counterpart: ``torch.compile`` goes around the step.

    Raises:
        ValueError: a number out of range; a ratio that is negative or not finite; a name that is needed and missing;
            ``encoder.layers`` in a name with no layer number after it.
        TypeError: an argument of the wrong kind, or in Paddle's spelling; a ratio of None.
        KeyError: ``name_dict`` lacks the name of a parameter.
        RuntimeError: as :class:`AdamW`.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
        >>> optimizer = fused_optim.AdamWDL(
        ...     model.named_parameters(),
        ...     lr=1e-3,
        ...     layerwise_decay=0.8,
        ...     n_layers=2,
        ...     apply_decay_param_fun=lambda name: not any(word in name for word in ("bias", "norm")),
        ... )
        >>> model["encoder"](torch.ones(3, 1, 8)).sum().backward()
        >>> optimizer.step()

    References:
        Clark et al., `ELECTRA <https://arxiv.org/abs/2003.10555>`_, 2020 (layer-wise learning rate decay).
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
        `PaddleNLP's AdamWDL
        <https://github.com/PaddlePaddle/PaddleNLP/blob/v2.8.1/paddlenlp/ops/optimizer/adamwdl.py>`_.
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
        layerwise_decay: float | Tensor = 1.0,
        n_layers: int = 12,
        set_param_lr_fun: LearningRateFunction | None = layerwise_lr_decay,
        name_dict: Mapping[str, str] | None = None,
        apply_decay_param_fun: Callable[[str], bool] | None = None,
        decay_scaling: str = "scaled",
        lazy_mode: bool = False,
        multi_precision: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        lr_scale: Scale | None = None,
        weight_decay_scale: Scale | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        ratios = LayerRatios(layerwise_decay, n_layers, set_param_lr_fun, name_dict)
        mask = decay_mask(apply_decay_param_fun)
        check_decay_scaling(decay_scaling, "decay_scaling")
        # fmt: off
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            lazy_mode=lazy_mode, backend=backend,
            lr_scale=cast(Scale, ScaleProduct(column_of("lr_scale", lr_scale), ratios)),
            weight_decay_scale=cast(Scale, ScaleProduct(column_of("weight_decay_scale", weight_decay_scale), mask)),
            grad_clip=grad_clip,
            master_weights="float32" if multi_precision and master_weights is None else master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
        )
        # fmt: on
        if decay_scaling != "scaled":  # a key that torch does not have, for those alone who need it
            self.defaults["decay_scaling"] = decay_scaling
            for group in self.param_groups:
                group.setdefault("decay_scaling", decay_scaling)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # torch refuses what is none
            check_decay_scaling(param_group.get("decay_scaling", "scaled"), "the group's decay_scaling")
        super().add_param_group(param_group)
