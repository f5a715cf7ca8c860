"""The witness: one parameter's step in plain torch operations.

It serves whatever the fused backends do not take (complex numbers, odd layouts, other devices,
``differentiable=True``) and is what their results are held to. It computes in float32, or in float64 for float64
parameters, rounds once at the store, and shares no code with the backends that it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import masters
from .plan import is_plain

Number = float | Tensor


@dataclass
class TensorContext:
    """What `prepare` knows of one tensor. Numbers are Python floats, or 0-d tensors where those stay on a device."""

    step: Number
    lr_scale: float
    weight_decay_scale: float


class Rule(Protocol):
    """The mathematics of one optimizer; the twin of a struct in ``csrc/rules``."""

    def prepare(self, group: dict[str, Any], tensor: TensorContext) -> Any: ...

    def update(self, param: Tensor, grad: Tensor, states: dict[str, Tensor], s: Any) -> Tensor: ...


def one_minus_power(base: Number, exponent: Number) -> Number:
    """``1 - base ** exponent``, without the cancellation when ``base`` is near 1."""
    if isinstance(base, Tensor) or isinstance(exponent, Tensor):
        base = torch.as_tensor(base, dtype=torch.float64, device=getattr(exponent, "device", None))
        return -torch.expm1(exponent * torch.log(base))
    if base == 0:
        return 0.0 if exponent == 0 else 1.0
    return -math.expm1(exponent * math.log(base))


def square_root(value: Any) -> Any:
    """The square root as IEEE 754 rounds it, except that of float64 tensors, which may miss by one ulp.

    On the CPU torch takes MKL's, which misses by one ulp in 17 % of float32 and 1 % of float64 arguments. The float64
    root is more than exact enough to round right to float32.
    """
    if not isinstance(value, Tensor):
        return math.sqrt(value)
    if value.dtype == torch.float32 and value.device.type == "cpu":
        return value.to(torch.float64).sqrt().to(torch.float32)
    return value.sqrt()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of ``dtype`` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squares_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a sum of squares neither overflows nor loses its smallest terms."""
    return torch.complex128 if tensor.is_complex() else torch.float64


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


def step_eager(
    rule: Rule,
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Tensor],
    names: tuple[str, ...],
    *,
    lr_scale: float,
    weight_decay_scale: float,
    grad_scale: Number,
    bounds: tuple[float, float] | None,
    master: str | None,
) -> None:
    """Update one parameter and its states in place from ``param.grad``.

    ``names``: the states of an element each. ``bounds``: what gradient elements are clamped to. ``master``: the state
    key of the master weight.
    """
    assert param.grad is not None
    differentiable = bool(group["differentiable"])
    on_device = param.device.type != "cpu" or not is_plain(type(param))
    keep = differentiable or on_device
    group = {key: _scalar(value, param.device, keep) for key, value in group.items() if key != "params"}
    step = state["step"]
    step += 1
    tensor = TensorContext(
        step=step.to(torch.float64) if keep else step.item(),
        lr_scale=lr_scale,
        weight_decay_scale=weight_decay_scale,
    )
    s = rule.prepare(group, tensor)
    dtype = compute_dtype(_real(param).dtype)
    for name, value in vars(s).items():
        if isinstance(value, Tensor):
            setattr(s, name, value.to(dtype))
    # A clone where autograd records: it keeps what it saved safe from the stores below.
    wide = {name: _real(state[name]).to(dtype, copy=differentiable) for name in names}
    grad = (-grad_scale if group["maximize"] else grad_scale) * _real(param.grad).to(dtype)
    if bounds is not None:
        grad = grad.clamp(*bounds)
    whole = _real(param) if master is None else masters.read(param, state, master)
    result = rule.update(whole.to(dtype, copy=differentiable), grad, wide, s)
    for name, value in wide.items():
        _real(state[name]).copy_(value)
    if master is None:
        _real(param).copy_(result)
    else:
        masters.write(param, state, master, result)
