"""The eager path: one parameter's step in plain torch operations.

It serves whatever the fused backends do not take (complex numbers, odd layouts, other devices,
``differentiable=True``) and is what their results are held to. It computes in float32, or in float64 for float64
parameters, rounds once at the store, and shares no code with the backends that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options.options import NARROW
from ..rule.arithmetic import Number, where
from ..rule.contract import Rule, TensorContext
from ..rule.hyperparameters import is_sequence, plain_number
from ..rule.orthogonal import Matrices, kept_dtype, orthogonalize_
from ..rule.trust_ratio import IN_NORM, OUTSIDE, SKIP, TrustRatio
from ..state import codec, formats, masters
from ..tensors import is_dense, is_plain, plain_float


class Randomness(NamedTuple):
    """Where the random words of one row's step come from; see `Row`."""

    seed: int
    place: int
    first: int
    counts: bool
    stochastic: bool
    listed: Tensor | None = None  # the rows along dimension 0 that are stepped, where it is not all of them


class Words:
    """The random words of a step of one row: a 32-bit word for each element, by its place in the whole tensor."""

    def __init__(self, randomness: Randomness, step: Number, device: torch.device) -> None:
        self._randomness = randomness
        self._key = codec.random_key(randomness.seed, step, randomness.place, device)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The words of a tensor's elements, which are counted in the order in which they lie in memory."""
        words = self._known.get(tensor.stride())
        if words is None:
            words = self._known[tensor.stride()] = codec.random_words(self._places(tensor), self._key)
        return words

    def round(self, value: Tensor, stored: Tensor) -> Tensor:
        """Numbers as they are to be stored, where they are rounded by random words and not by the store itself."""
        if not self._randomness.stochastic or stored.dtype not in NARROW:
            return value
        return codec.round_stochastically(value.to(torch.float32), stored.dtype, self.of(stored))

    def _places(self, tensor: Tensor) -> Tensor:
        first, listed = self._randomness.first, self._randomness.listed
        if listed is not None:
            row = math.prod(tensor.shape[1:])
            in_row = torch.arange(row, device=tensor.device)
            return (first + listed.unsqueeze(1) * row + in_row).view(tensor.shape)
        places = torch.arange(first, first + tensor.numel(), device=tensor.device)
        return places.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else places.view(tensor.shape)


class MeasuredNorms(NamedTuple):
    """The norms of one tensor as a user may read them; NaN where nobody asked for one."""

    grad_norm: Number
    param_norm: Number
    trust_ratio: Number


class TensorNorms(NamedTuple):
    """What a step needs to know of one tensor as a whole; as `Norms` in csrc/prepare.h, whose sums are squares."""

    grad_norm: Number = 0.0  # of the gradient after its sign, the loss scale and clipping by value
    grad_max: Number = 0.0
    param_norm: Number = 0.0
    decayed_norm: Number = 0.0  # of grad + weight_decay * param
    direction_norm: Number = 0.0

    def sums(self) -> list[float]:
        """What adds up over parts of a tensor; the maximum stays what it is."""
        numbers = dict(zip(self._fields, map(plain_float, self)))
        return [number if name == "grad_max" else number * number for name, number in numbers.items()]

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> TensorNorms:
        return cls(*(total if name == "grad_max" else math.sqrt(total) for name, total in zip(cls._fields, sums)))


# Yields the norms of what it was given and takes those of the whole, and the clip's coefficient: before its `prepare`
# and, where the rule has a direction, before its last pass.
EagerStep = Generator[TensorNorms, tuple[TensorNorms, float], MeasuredNorms | None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of ``dtype`` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squares_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a sum of squares neither overflows nor loses its smallest terms."""
    return torch.complex128 if tensor.is_complex() else torch.float64


def _scalar(value: Any, device: torch.device, keep: bool) -> Any:
    """A hyperparameter as a float; as a 0-d float64 tensor where reading it would wait or cut a graph."""
    if is_sequence(value):
        return tuple(_scalar(item, device, keep) for item in value)
    if not isinstance(value, Tensor):
        return plain_number(value)  # numpy's would take part in torch's operations as an array
    if keep or value.device.type != "cpu":
        return value.reshape(()).to(device=device, dtype=torch.float64)
    return value.item()


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _load(state: dict[str, Tensor], name: str, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """A state as numbers of the compute dtype."""
    if formats.is_code(state[name]):
        return codec.decode(state[name], state[formats.scale_key(name)]).to(dtype)
    return _real(state[name]).to(dtype, copy=copy)


def _rounded(state: dict[str, Tensor], values: dict[str, Tensor], words: Words | None) -> dict[str, Tensor]:
    """New states as they are stored, codes with their scales."""
    stored: dict[str, Tensor] = {}
    for name, value in values.items():
        before = state[name]
        if formats.is_code(before):
            assert words is not None
            encoded = codec.encode(value.to(torch.float32), before.dtype, words.of(before))
            stored[name], stored[formats.scale_key(name)] = encoded
        else:
            stored[name] = (value if words is None else words.round(value, before)).to(_real(before).dtype)
    return stored


def _store(tensor: Tensor, value: Tensor) -> None:
    """Write numbers of `_real` back: not through `_real` itself, which has resolved a conjugation by a copy."""
    tensor.copy_(torch.view_as_complex(value.contiguous()) if tensor.is_complex() else value)


def _norm(tensor: Tensor, keep: bool, order: float = 2) -> Number:
    """A vector norm in float64, as a Python float or as a 0-d tensor; 0 of a tensor without numbers."""
    wide = tensor.to(torch.float64)
    norm = torch.linalg.vector_norm(wide, order) if wide.numel() else wide.new_zeros(())
    return norm if keep else plain_float(norm)


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
    grad: Tensor,
    state: dict[str, Tensor],
    names: tuple[str, ...],
    number_names: tuple[str, ...],
    *,
    lr_scale: float,
    weight_decay_scale: float,
    has_trust_ratio: bool,
    grad_scale: Number,
    clips: bool,
    bounds: tuple[float, float] | None,
    master: str | None,
    matrices: Matrices | None,
    exchanged: Tensor | None,
    randomness: Randomness | None,
) -> EagerStep:
    """Update one parameter and its states in place.

    ``names``: the states of an element each; ``number_names``: those of one number. ``clips``: by a norm. ``bounds``:
    what gradient elements are clamped to. ``master``: the state key of the master weight. ``matrices``: those that the
    parameter is, if its direction is made orthogonal; ``exchanged``: where the direction then lies while other
    processes make it so.
    ``randomness``: None where nothing rounds by random words.
    Between two phases nothing of the size of the parameter is kept, but for a rule with a direction.
    """
    differentiable = bool(group.get("differentiable"))
    iteration = None if matrices is None else rule.iteration(group, matrices, param.dtype)
    on_device = param.device.type != "cpu" or not is_plain(type(param))
    keep = differentiable or on_device
    group = {key: _scalar(value, param.device, keep) for key, value in group.items() if key != "params"}
    dtype = compute_dtype(_real(param).dtype)
    scale = -grad_scale if group.get("maximize") else grad_scale
    trust = rule.trust_ratio(group)
    norms = TensorNorms()
    asked = rule.norms(group)
    measures = trust is not None or bool(asked)
    if measures or clips:
        measured = _real(grad).to(dtype) * scale
        if bounds is not None:
            measured = measured.clamp(*bounds)
        if trust is not None or clips or "grad_norm" in asked:
            norms = norms._replace(grad_norm=_norm(measured, keep))
        if "grad_max" in asked:
            norms = norms._replace(grad_max=_norm(measured, keep, math.inf))
        if trust is not None:
            whole = (_real(param) if master is None else masters.read(param, state, master)).to(dtype)
            decay = group["weight_decay"] * weight_decay_scale
            decayed = measured + decay * whole if _is_nonzero(decay) else measured
            norms = norms._replace(param_norm=_norm(whole, keep), decayed_norm=_norm(decayed, keep))
            del whole, decayed
        del measured
    norms, coefficient = yield norms
    # A clone where autograd records: it keeps what it saved safe from the stores below.
    wide = {name: _load(state, name, dtype, copy=differentiable) for name in names}
    whole = (_real(param) if master is None else masters.read(param, state, master)).to(dtype, copy=differentiable)
    tensor = TensorContext(
        state={n: state[n].reshape(()).to(torch.float64) if keep else float(state[n]) for n in number_names},
        lr_scale=lr_scale,
        weight_decay_scale=weight_decay_scale,
        has_trust_ratio=has_trust_ratio,
        grad_norm=coefficient * norms.grad_norm,
        grad_max=coefficient * norms.grad_max,
        param_norm=norms.param_norm,
    )
    grad_norm = tensor.grad_norm if trust is not None or clips or "grad_norm" in asked else math.nan
    if trust is not None and has_trust_ratio:
        apply_trust_ratio(trust, group, tensor, tensor.grad_norm, norms.decayed_norm)
    s = rule.prepare(group, tensor)
    for name, value in tensor.state.items():
        # Not fill_, which refuses what the dtype rounds to infinity.
        state[name].copy_(
            value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        )
    words: Words | None = None
    if randomness is not None:
        if randomness.counts:
            state["step"].add_(1)
        words = Words(randomness, state["step"].reshape(()) if keep else float(state["step"]), param.device)
    for name, value in vars(s).items():
        if isinstance(value, Tensor):
            setattr(s, name, value.to(dtype))
    grad = _as(coefficient * scale * tensor.grad_scale, dtype) * _real(grad).to(dtype)
    if bounds is not None:
        low, high = (torch.as_tensor(bound * tensor.grad_scale, dtype=dtype, device=grad.device) for bound in bounds)
        grad = grad.clamp(low, high)
    if _is_nonzero(tensor.coupled_weight_decay):
        grad = grad + _as(tensor.coupled_weight_decay, dtype) * whole
    if rule.has_direction:
        rule.accumulate(grad, wide, s)
        stored = _rounded(state, wide, words)
        wide = {name: _load(stored, name, dtype) for name in wide}
        direction = rule.direction(whole, wide, s)
        norms, _ = yield TensorNorms(param_norm=_norm(whole, keep), direction_norm=_norm(direction, keep))
        tensor.param_norm, tensor.direction_norm = norms.param_norm, norms.direction_norm
        result = whole - _as(rule.scale_direction(group, tensor), dtype) * direction
    elif matrices is not None:
        assert iteration is not None
        rule.accumulate(grad, wide, s)
        if exchanged is not None:
            exchanged.view(whole.shape).copy_(wide.pop("direction"))
            yield TensorNorms()
            orthogonal = exchanged.view(whole.shape).to(dtype)
        else:
            kept = kept_dtype(iteration.dtype, dtype)
            directions = wide.pop("direction").to(kept, copy=True).contiguous()
            _, rows, columns = matrices
            of_part = directions.view(directions.numel() // max(rows * columns, 1), rows, columns)
            orthogonal = orthogonalize_(of_part, iteration).view(whole.shape).to(dtype)
        direction = rule.direction(whole, {"direction": orthogonal}, s)
        result = whole - s.step_size * direction
        stored = _rounded(state, wide, words)
    else:
        result = rule.update(whole, grad, wide, s)
        stored = _rounded(state, wide, words)
    for name, value in stored.items():
        _store(state[name], value)
    if master is None:
        _store(param, result if words is None else words.round(result, param))
    else:
        masters.write(param, state, master, result, None if words is None else words.of(param))
    param_norm = tensor.param_norm if trust is not None or rule.has_direction else math.nan
    return MeasuredNorms(grad_norm, param_norm, tensor.trust_ratio) if measures or rule.has_direction else None


def _as(value: Number, dtype: torch.dtype) -> Number:
    """A number in the compute dtype."""
    return value.to(dtype) if isinstance(value, Tensor) else value
