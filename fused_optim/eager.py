"""The witness: one parameter's step in plain torch operations.

It serves whatever the fused backends do not take (complex numbers, odd layouts, other devices,
``differentiable=True``) and is what their results are held to. It computes in float32, or in float64 for float64
parameters, rounds once at the store, and shares no code with the backends that it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import masters
from .arithmetic import Number, where
from .plan import is_plain
from .trust_ratio import IN_NORM, OUTSIDE, SKIP, TrustRatio


@dataclass
class TensorContext:
    """What `prepare` knows of one tensor, and what it may say to the mechanism."""

    state: dict[str, Number]  # the per-tensor states; prepare advances them
    lr_scale: float
    weight_decay_scale: float
    trusted: bool = True  # not excluded from trust ratios
    grad_norm: Number = 0.0  # of the gradient, clipped and times the trust ratio, where the rule asks for it
    grad_max: Number = 0.0  # its largest magnitude, likewise
    param_norm: Number = 0.0  # likewise; of the master, where there is one
    direction_norm: Number = 0.0  # for scale_direction
    grad_scale: Number = 1.0  # out: what `update` sees is this times the gradient,
    coupled_weight_decay: Number = 0.0  # out: plus this times the parameter
    trust_ratio: Number = 1.0  # out: for the log


class MeasuredNorms(NamedTuple):
    """The norms of one tensor as a user may read them; NaN where nobody asked for one."""

    grad_norm: Number
    param_norm: Number
    trust_ratio: Number


class Rule(Protocol):
    """The mathematics of one optimizer; the twin of a struct in ``csrc/rules``."""

    @property
    def has_direction(self) -> bool: ...

    def prepare(self, group: dict[str, Any], tensor: TensorContext) -> Any: ...

    def update(self, param: Tensor, grad: Tensor, states: dict[str, Tensor], s: Any) -> Tensor: ...

    def accumulate(self, grad: Tensor, states: dict[str, Tensor], s: Any) -> None: ...

    def direction(self, param: Tensor, states: dict[str, Tensor], s: Any) -> Tensor: ...

    def scale_direction(self, group: dict[str, Any], tensor: TensorContext) -> Number: ...

    def norms(self, group: dict[str, Any]) -> frozenset[str]: ...

    def trust_ratio(self, group: dict[str, Any]) -> TrustRatio | None: ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of ``dtype`` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squares_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a sum of squares neither overflows nor loses its smallest terms."""
    return torch.complex128 if tensor.is_complex() else torch.float64


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    return bool(torch.isfinite(tensor).all())


def _scalar(value: Any, device: torch.device, keep: bool) -> Any:
    """A hyperparameter as a float; as a 0-d float64 tensor where reading it would wait or cut a graph."""
    if isinstance(value, (tuple, list)):
        return tuple(_scalar(item, device, keep) for item in value)
    if not isinstance(value, Tensor):
        return value
    if keep or value.device.type != "cpu":
        return value.reshape(()).to(device=device, dtype=torch.float64)
    return value.item()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norm(tensor: Tensor, keep: bool, order: float = 2) -> Number:
    """A vector norm in float64, as a Python float or as a 0-d tensor."""
    wide = tensor.to(torch.float64)
    norm = torch.linalg.vector_norm(wide, order) if wide.numel() else wide.new_zeros(())
    return norm if keep else norm.item()


def apply_trust_ratio(
    trust: TrustRatio, group: dict[str, Any], tensor: TensorContext, grad_norm: Number, decayed_norm: Number
) -> None:
    """Apply the factor to what `prepare` will see; ``group`` is a copy, whose decay becomes 0 where it is inside.

    ``decayed_norm``: of ``grad + weight_decay * param``.
    """
    decay = group["weight_decay"] * tensor.weight_decay_scale
    judged = decayed_norm if trust.weight_decay == IN_NORM else grad_norm
    ratio, zero = trust.factor(group["lr"] * tensor.lr_scale, decay, judged, tensor.param_norm)
    coupled = decay * ratio
    seen = grad_norm if trust.weight_decay == OUTSIDE else decayed_norm
    if trust.weight_decay != OUTSIDE and trust.zero_norm == SKIP:
        coupled, seen = where(zero, 0.0, coupled), where(zero, grad_norm, seen)
    applies = True if trust.always else decay != 0
    ratio = where(applies, ratio, 1.0)
    tensor.trust_ratio = tensor.grad_scale = ratio
    tensor.grad_norm = where(applies, ratio * seen, grad_norm)
    tensor.grad_max = ratio * tensor.grad_max
    if trust.weight_decay != OUTSIDE:
        tensor.coupled_weight_decay = where(applies, coupled, 0.0)
        group["weight_decay"] = where(applies, 0.0, group["weight_decay"])


def _is_nonzero(value: Number) -> bool:
    return isinstance(value, Tensor) or value != 0


def step_eager(
    rule: Rule,
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Tensor],
    names: tuple[str, ...],
    number_names: tuple[str, ...],
    *,
    lr_scale: float,
    weight_decay_scale: float,
    trusted: bool,
    grad_scale: Number,
    bounds: tuple[float, float] | None,
    master: str | None,
) -> MeasuredNorms:
    """Update one parameter and its states in place from ``param.grad``.

    ``names``: the states of an element each; ``number_names``: those of one number. ``bounds``: what gradient elements
    are clamped to. ``master``: the state key of the master weight.
    """
    assert param.grad is not None
    differentiable = bool(group["differentiable"])
    on_device = param.device.type != "cpu" or not is_plain(type(param))
    keep = differentiable or on_device
    group = {key: _scalar(value, param.device, keep) for key, value in group.items() if key != "params"}
    dtype = compute_dtype(_real(param).dtype)
    # A clone where autograd records: it keeps what it saved safe from the stores below.
    wide = {name: _real(state[name]).to(dtype, copy=differentiable) for name in names}
    whole = (_real(param) if master is None else masters.read(param, state, master)).to(dtype, copy=differentiable)
    raw = _real(param.grad).to(dtype)
    scale = -grad_scale if group["maximize"] else grad_scale
    tensor = TensorContext(
        state={name: state[name].to(torch.float64) if keep else state[name].item() for name in number_names},
        lr_scale=lr_scale,
        weight_decay_scale=weight_decay_scale,
        trusted=trusted,
    )
    norms = rule.norms(group)
    trust = rule.trust_ratio(group)
    grad_norm: Number = math.nan
    if norms or trust is not None:
        grad = scale * raw if bounds is None else (scale * raw).clamp(*bounds)
        if "grad_norm" in norms or trust is not None:
            tensor.grad_norm = grad_norm = _norm(grad, keep)
        if "grad_max" in norms:
            tensor.grad_max = _norm(grad, keep, math.inf)
        if trust is not None:
            tensor.param_norm = _norm(whole, keep)
            decay = group["weight_decay"] * weight_decay_scale
            decayed_norm = _norm(grad + decay * whole if _is_nonzero(decay) else grad, keep)
            if trusted:
                apply_trust_ratio(trust, group, tensor, grad_norm, decayed_norm)
    s = rule.prepare(group, tensor)
    for name, value in tensor.state.items():
        state[name].copy_(value) if isinstance(value, Tensor) else state[name].fill_(value)
    for name, value in vars(s).items():
        if isinstance(value, Tensor):
            setattr(s, name, value.to(dtype))
    grad = _as(scale * tensor.grad_scale, dtype) * raw
    if bounds is not None:
        low, high = (torch.as_tensor(bound * tensor.grad_scale, dtype=dtype, device=grad.device) for bound in bounds)
        grad = grad.clamp(low, high)
    if _is_nonzero(tensor.coupled_weight_decay):
        grad = grad + _as(tensor.coupled_weight_decay, dtype) * whole
    if rule.has_direction:
        rule.accumulate(grad, wide, s)
        wide = {name: value.to(state[name].dtype).to(dtype) for name, value in wide.items()}  # as they are stored
        direction = rule.direction(whole, wide, s)
        tensor.param_norm, tensor.direction_norm = _norm(whole, keep), _norm(direction, keep)
        result = whole - _as(rule.scale_direction(group, tensor), dtype) * direction
    else:
        result = rule.update(whole, grad, wide, s)
    for name, value in wide.items():
        _real(state[name]).copy_(value)
    if master is None:
        _real(param).copy_(result)
    else:
        masters.write(param, state, master, result)
    param_norm = tensor.param_norm if trust is not None or rule.has_direction else math.nan
    return MeasuredNorms(grad_norm, param_norm, tensor.trust_ratio)


def _as(value: Number, dtype: torch.dtype) -> Number:
    """A number in the compute dtype."""
    return value.to(dtype) if isinstance(value, Tensor) else value
