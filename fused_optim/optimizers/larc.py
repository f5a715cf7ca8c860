"""LARC around any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..backends.choice import logger
from ..eager.parameter import squares_dtype
from ..norms import Norms
from ..optimizer import FusedOptimizer
from ..options.peers import refuse_peer_arguments
from ..options.scales import Exclude, ScaleColumn, excluded
from ..parameters import Place, parameters
from ..plan.shards import refuse_flattened
from ..rule.arithmetic import Number, where
from ..rule.hyperparameters import plain_number
from ..rule.trust_ratio import FLOOR, IN_RATIO, ONE, OUTSIDE, SKIP, TrustRatio
from ..tensors import is_flattened
from .lamb import LAMB
from .lars import LARS, refuse_clip
from .novograd import NovoGrad

# What each variant sets where the caller says nothing.
VARIANTS: dict[str | None, dict[str, Any]] = {
    None: {"eta": 0.002, "eps": 1e-7, "min_update": 0.0, "zero_norm": "one", "weight_decay_in_ratio": False},
    "openseq2seq": {
        "eta": 0.002,
        "eps": 1e-7,
        "min_update": 1e-7,
        "zero_norm": "floor",
        "weight_decay_in_ratio": False,
    },
    "apex": {"eta": 0.02, "eps": 1e-8, "min_update": 0.0, "zero_norm": "skip", "weight_decay_in_ratio": True},
}
ZERO_NORMS = {"one": ONE, "skip": SKIP, "floor": FLOOR}
AMP_ATTRIBUTES = ("grad_scale", "found_inf", "finds_inf")  # which GradScaler sets for one step


class LARC(torch.optim.Optimizer):
    r"""LARC: each tensor's gradient times a factor of its norms, before any optimizer sees it.

    .. math::

        f &= \eta\,\frac{\lVert \theta \rVert}{\lVert g \rVert + \epsilon}
            \quad\text{(scale)}, \qquad
            \min\Bigl(\frac{\eta\,\lVert \theta \rVert}{\gamma\,(\lVert g \rVert + \epsilon)},\; 1\Bigr)
            \quad\text{(clip)} \\
        g &\leftarrow \max(f, f_{\min})\, g

    Here :math:`\theta` is one tensor ``param`` (its master, where there is one), :math:`g` its gradient, after
    unscaling and clipping by value or norm, :math:`\gamma` its learning rate, ``lr`` times ``lr_scale``, and
    :math:`f_{\min}` ``min_update``. With ``clip`` SGD's step is that of the smaller of :math:`\gamma` and
    :math:`\eta\lVert\theta\rVert/\lVert g\rVert`; with ``scale`` the latter times :math:`\gamma`.

    Around an optimizer of this library the factor is computed and applied in the same launches, and no gradient is
    written. Around any other ``torch.optim.Optimizer`` each gradient is replaced by a scaled copy while that one steps,
    and put back, also when it raises; with weight_decay_in_ratio an excluded parameter's decay is then in its gradient.
    Hooks of the inner optimizer run before and after that, as if it stood alone.

    LARC is a ``torch.optim.Optimizer``. ``param_groups``, ``state``, ``defaults``, ``state_dict()`` and
    ``load_state_dict()`` are the inner optimizer's own, so that checkpoints do not see it; ``optimizer`` is the inner
    one. Learning-rate schedulers and GradScaler take it as it is.

    Variants set what the caller leaves at None:

    - None: eta 0.002, eps 1e-7, min_update 0, zero_norm ``"one"``, weight_decay_in_ratio False.
    - ``"openseq2seq"``: the same with min_update 1e-7 and zero_norm ``"floor"``: tensors that are zero stay frozen, and
      as there become NaN in a step whose learning rate is 0 (a warm-up from 0, torch.distributed.checkpoint's first
      step); ``zero_norm="one"`` avoids both.
    - ``"apex"``: eta 0.02, eps 1e-8, min_update 0, zero_norm ``"skip"``, weight_decay_in_ratio True.

    Args:
        optimizer: any ``torch.optim.Optimizer`` but LBFGS.
        eta: :math:`\eta > 0`. Default None: the variant's. It grows with the batch.
        mode: ``"clip"`` or ``"scale"``. Default ``"clip"``.
        eps: :math:`\epsilon \ge 0`. Default None: the variant's.
        min_update: :math:`f_{\min} \ge 0`. Default None: the variant's.
        zero_norm: what follows where a norm is zero: ``"one"``: a factor of 1; ``"skip"``: the same, and no weight
            decay; ``"floor"``: the equations as they stand, min_update for a parameter of zeros. Default None: the
            variant's.
        weight_decay_in_ratio: add ``weight_decay`` times the norm of the parameter to the denominator and
            ``weight_decay * param`` to the gradient, and let the optimizer decay nothing itself. Default None: the
            variant's.
        exclude: what is left alone, usually biases and norms: a callable ``(name, param) -> bool`` or a sequence of
            name patterns. Default None: nothing.
        variant: None, ``"openseq2seq"`` or ``"apex"``. Default None.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, or LBFGS, which evaluates the model within its step.
        ValueError: an option out of range; an optimizer that has a trust ratio already (LARS, LAMB, LARC) or clips by
            the global norm; NovoGrad with ``norm_type=0`` and ``weight_decay_in_ratio``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.LARC(fused_optim.SGD(model.parameters(), lr=0.1, momentum=0.9), eta=0.001)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_norms.trust_ratio.shape
        torch.Size([2])

    References:
        You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_,
        2017; NVIDIA's OpenSeq2Seq and apex.
    """

    @refuse_peer_arguments
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        eta: float | None = None,
        mode: str = "clip",
        *,
        eps: float | None = None,
        min_update: float | None = None,
        zero_norm: str | None = None,
        weight_decay_in_ratio: bool | None = None,
        exclude: Exclude | None = None,
        variant: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"LARC is put around a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LARC scales the gradients of a step once, and LBFGS asks for new ones in the middle of it")
        options = {"eta": eta, "eps": eps, "min_update": min_update, "zero_norm": zero_norm}
        trust = resolve(variant, mode, {**options, "weight_decay_in_ratio": weight_decay_in_ratio})
        check_inner(optimizer, trust)
        self.optimizer = optimizer
        self._trust = trust
        self._trusted = ScaleColumn("exclude", excluded(exclude))
        places = list(parameters(self.param_groups))
        self._trusted.resolve([place.named for place in places])
        for place in places:
            if is_flattened(place.param) and self._trusted.of(*place.named) != 0:
                refuse_flattened(place.name, "LARC")
        if isinstance(optimizer, FusedOptimizer):
            optimizer.attach_trust_ratio(trust, self._trusted)
        super().__setstate__({})  # the hooks; torch's __init__ would make groups and a state of its own

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def last_norms(self) -> Norms | None:
        """The norms of the last step, if the inner optimizer is one of this library; see its ``last_norms``."""
        return getattr(self.optimizer, "last_norms", None)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Another optimizer's kernels would take the scale out of the gradient after the factor has been computed.
        return isinstance(self.optimizer, FusedOptimizer) and self.optimizer._step_supports_amp_scaling

    @property
    def _step_finds_inf(self) -> bool:
        return isinstance(self.optimizer, FusedOptimizer) and self.optimizer._step_finds_inf

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inner optimizer's."""
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """The inner optimizer's, which then hands itself to the hook."""
        return self.optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """The inner optimizer's, which then hands itself to the hook."""
        return self.optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """The inner optimizer's, which then hands itself to the hook."""
        return self.optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """The inner optimizer's, which then hands itself to the hook."""
        return self.optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner optimizer's."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, scaled by its factor.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient under an optimizer of another library; whatever the inner one raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if isinstance(self.optimizer, FusedOptimizer):
            for name in AMP_ATTRIBUTES:  # which GradScaler has set for this step
                if name in self.__dict__:
                    setattr(self.optimizer, name, self.__dict__[name])
            try:
                self.optimizer.step()
            finally:
                for name in AMP_ATTRIBUTES:
                    self.optimizer.__dict__.pop(name, None)
        elif getattr(type(self.optimizer).step, "hooked", False):
            self._step_within_hooks()
        else:  # nothing of torch's around it, as around wrappers that are no optimizers by torch's constructor
            with self._scaled_grads():
                self.optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "_trust", "_trusted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})

    def __repr__(self) -> str:
        return f"LARC({self._trust}, {self.optimizer!r})"

    # Around optimizers of other libraries ------------------------------------------------------------------------

    def _step_within_hooks(self) -> None:
        """Step the inner optimizer, whose own hooks see and change what they would without LARC: gradients, decay, lr.

        Its last pre-hook scales, its first post-hook puts back.
        """
        inner, depth = self.optimizer, 0

        def scale(*_: Any) -> None:
            nonlocal depth
            if depth == 0:  # a step of a subclass that calls its parent's runs all hooks once more
                scaled.enter_context(self._scaled_grads())
            depth += 1

        def put_back(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                scaled.close()

        with ExitStack() as scaled:
            pre, post = inner.register_step_pre_hook(scale), inner.register_step_post_hook(put_back)
            inner._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # type: ignore[attr-defined]
            try:
                inner.step()
            finally:
                pre.remove()
                post.remove()

    @contextmanager
    def _scaled_grads(self) -> Iterator[None]:
        """Scaled copies in the place of all gradients, and no weight decay where it is inside the ratio."""
        inside = self._trust.weight_decay != OUTSIDE
        grads: list[tuple[Tensor, Tensor]] = []
        decays: list[tuple[dict[str, Any], Any]] = []
        scaled = [
            (place.param, place.param.grad, self._scaled(place, inside))
            for place in parameters(self.param_groups)
            if place.param.grad is not None
        ]
        try:
            for param, grad, copy in scaled:
                grads.append((param, grad))
                param.grad = copy
            for group in self.param_groups if inside else ():
                if "weight_decay" in group:
                    decays.append((group, group["weight_decay"]))
                    group["weight_decay"] = 0.0
            yield
        finally:
            for param, grad in grads:
                param.grad = grad
            for group, decay in decays:
                if group["weight_decay"] == 0:  # otherwise the step itself has set another one
                    group["weight_decay"] = decay

    @torch.no_grad()
    def _scaled(self, place: Place, inside: bool) -> Tensor:
        param, group, grad = place.param, place.group, place.param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(f"LARC does not support sparse gradients: {place.name} has one of layout {grad.layout}")
        lr, weight_decay = number(group["lr"]), number(group.get("weight_decay", 0.0))
        # With maximize the inner optimizer turns the sign of all that it sees, the decay in the gradient too.
        sign = -1.0 if group.get("maximize", False) else 1.0
        dtype = torch.promote_types(param.dtype, torch.float32)
        whole, result = param.to(dtype), grad.to(dtype)
        if self._trusted.of(place.own_name, place.name, param) == 0:
            return (result + sign * weight_decay * whole).to(grad.dtype) if inside else grad
        if is_flattened(param):
            refuse_flattened(place.name, "LARC")
        grad_norm, param_norm = (
            torch.linalg.vector_norm(tensor, dtype=squares_dtype(tensor)) for tensor in (result, whole)
        )
        factor, zero = self._trust.factor(lr, weight_decay, grad_norm, param_norm)
        result = torch.as_tensor(factor).to(dtype) * result
        if inside:
            decay = sign * weight_decay * factor
            if self._trust.zero_norm == SKIP:
                decay = where(zero, 0.0, decay)
            result = result + torch.as_tensor(decay).to(dtype) * whole
        return result.to(grad.dtype)


def number(value: float | Tensor) -> Number:
    """A hyperparameter, if a Tensor then one without dimensions: one of shape [1] would give its own to a gradient."""
    return value.reshape(()) if isinstance(value, Tensor) else plain_number(value)


def resolve(variant: str | None, mode: str, given: dict[str, Any]) -> TrustRatio:
    """The trust ratio that the arguments ask for.

    Raises:
        ValueError: the text names the argument.
    """
    if variant not in VARIANTS:
        raise ValueError(f"LARC's variant must be one of None, 'openseq2seq', 'apex', got {variant!r}")
    if mode not in ("clip", "scale"):
        raise ValueError(f"mode={mode!r} is not 'clip' or 'scale'")
    options = {**VARIANTS[variant], **{name: value for name, value in given.items() if value is not None}}
    if options["zero_norm"] not in ZERO_NORMS:
        raise ValueError(f"zero_norm={options['zero_norm']!r} is not 'one', 'skip' or 'floor'")
    if not (options["eta"] > 0 and math.isfinite(options["eta"])):
        raise ValueError(f"LARC's eta must be finite and greater than 0, got {options['eta']}")
    for name in ("eps", "min_update"):
        if not (options[name] >= 0 and math.isfinite(options[name])):
            raise ValueError(f"LARC's {name} must be finite and not negative, got {options[name]}")
    return TrustRatio(
        float(options["eta"]),
        float(options["eps"]),
        float(options["min_update"]),
        clip=mode == "clip",
        zero_norm=ZERO_NORMS[options["zero_norm"]],
        weight_decay=IN_RATIO if options["weight_decay_in_ratio"] else OUTSIDE,
    )


def check_inner(optimizer: torch.optim.Optimizer, trust: TrustRatio) -> None:
    """Refuse an optimizer that LARC cannot be around, and warn where it does nothing.

    Raises:
        ValueError: the text says why.
    """
    if isinstance(optimizer, (LARC, LARS, LAMB)):
        raise ValueError(f"LARC around {type(optimizer).__name__}: that has a trust ratio of its own")
    if isinstance(optimizer, FusedOptimizer):
        if optimizer.options.trust_ratio is not None:
            raise ValueError(f"LARC is around this {type(optimizer).__name__} already")
        normed = isinstance(optimizer, NovoGrad) and trust.weight_decay != OUTSIDE
        refuse_clip("LARC", optimizer.options.grad_clip, decay_in_norm=normed)
    if isinstance(optimizer, NovoGrad):
        groups = optimizer.param_groups
        if trust.weight_decay != OUTSIDE and any(group["norm_type"] == 0 for group in groups):
            raise ValueError(
                "LARC with weight_decay_in_ratio around NovoGrad with norm_type=0: the largest element of gradient and "
                "weight decay together is not measured; pass weight_decay_in_ratio=False"
            )
        if any(group["variant"] == "openseq2seq" or group["betas"][1] == 0 for group in groups):
            logger.warning(
                "LARC around NovoGrad with a dead average (variant 'openseq2seq', or beta2 = 0) does nothing: a "
                "gradient that is divided by its own norm has forgotten any factor"
            )
