"""How the numbers of a state lie in memory: as a dtype, or as codes of a byte with a scale beside them.

The tensor itself says which: int8 and uint8 are codes, `codec.py`, and the state's name with ``_scale`` is the key of
their scales. Which of the two a new state is, `format_of` decides by the optimizer's options.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends.choice import FallbackLog
from ..options.options import EIGHT_BIT, NARROW, Options
from ..parameters import Place
from ..rule.contract import Rule
from ..tensors import dtensor_type, is_sharded, local, same_placement
from . import codec

# The codes of each state: of an average of gradients, of an average of squares. Others are kept as numbers, as is
# amsgrad's maximum: what only grows would grow with every rounding.
CODES = {"exp_avg": torch.int8, "momentum_buffer": torch.int8, "exp_avg_sq": torch.uint8}
LEAST_ELEMENTS = 4096
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def scale_key(name: str) -> str:
    """The key of the scales of a state's codes."""
    return f"{name}_scale"


def is_code(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in CODES.values()


def check_names(groups: Sequence[dict[str, Any]], defaults: dict[str, Any], rule: Rule, options: Options) -> None:
    """Refuse a mapping of ``state_dtype`` that names no state with one number an element.

    Raises:
        ValueError: the text names what there is.
    """
    wanted = options.state_dtype
    if not isinstance(wanted, Mapping):
        return
    whole = [{**defaults, **group} for group in groups]
    names = {name for group in whole for name in rule.state_names(group)}
    numbers = {name for group in whole for name in rule.tensor_state_names(group)}
    for name in wanted:
        if name in names:
            continue
        listed = ", ".join(map(repr, sorted(names))) or "none"
        kind = "a number for each parameter, which has no other dtype" if name in numbers else "no state"
        raise ValueError(
            f"state_dtype={dict(wanted)}: {name!r} is {kind}; the states of a number an element are {listed}"
        )


def say_what_is_wider(
    places: Iterable[Place], defaults: dict[str, Any], rule: Rule, options: Options, log: FallbackLog
) -> None:
    """Say once which states were to be codes of a byte and cannot be."""
    found = []
    for place in places:
        reasons: dict[str, list[str]] = {}
        for name in rule.state_names({**defaults, **place.group}):
            reason = why_wider(name, place.param, options, place.name)
            if reason is not None:
                reasons.setdefault(reason, []).append(name)
        found += [f"{', '.join(names)} of {place.name}: {reason}" for reason, names in reasons.items()]
    if found:
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        log.tells("%s: states that are kept wider than 8 bits: %s", "; ".join(found[:20]) + more)


def say_rounding_without_effect(
    places: Sequence[Place], defaults: dict[str, Any], rule: Rule, options: Options, log: FallbackLog
) -> None:
    """Say once that nothing is stored in 16 bits, if that was to be rounded stochastically."""
    if options.rounding == "nearest":
        return
    for place in places:
        names = rule.state_names({**defaults, **place.group})
        stored = [format_of(name, place.param, options) for name in names]
        if options.master_weights is None:
            stored.append(place.param.dtype)
        if any(dtype in NARROW for dtype in stored):
            return
    what = (
        f"rounding={options.rounding!r} has no effect: no state, and no parameter without a master weight, has 16 bits"
    )
    log.once("rounding", "%s: %s", what)


def why_no_code(name: str, param: Tensor) -> str | None:
    """Why a state of a parameter is not kept as codes; None if it can be."""
    if is_lazy(param):
        return "its shape is not known yet"
    if name not in CODES:
        return "it is no average"
    if param.is_complex():
        return f"the parameter is {param.dtype}"
    row = param.numel() // param.shape[0] if param.ndim and param.shape[0] else 0
    if param.numel() < LEAST_ELEMENTS:
        return f"it has fewer than {LEAST_ELEMENTS:,} elements"
    if row % codec.GROUP:
        return f"its rows of {row} elements are no multiple of {codec.GROUP}"
    if not local(param).is_contiguous():
        return "its elements do not lie in their order"
    if is_sharded(param) and not all(map(_leaves_rows_whole, param.placements)):  # type: ignore[attr-defined]
        return f"it is sharded as {param.placements}, not along dimension 0 alone"  # type: ignore[attr-defined]
    return None


def _leaves_rows_whole(placement: Any) -> bool:
    return bool(placement.is_replicate() or (type(placement).__name__ == "Shard" and placement.is_shard(0)))


def wider_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a state that was to be codes and cannot be."""
    return param.dtype if param.is_complex() or param.dtype == torch.float64 else torch.float32


def wanted_of(name: str, param: Tensor, options: Options) -> torch.dtype | str | None:
    """What the user has asked for a state."""
    wanted = options.state_dtype
    if isinstance(wanted, Mapping):
        wanted = wanted.get(name)
    if wanted is None and options.master_weights is not None and param.dtype in NARROW:
        return torch.float32
    return wanted


def why_wider(name: str, param: Tensor, options: Options, place: str) -> str | None:
    """Why a state that was to be codes is not; None where it is, or nobody has asked for codes.

    Raises:
        ValueError: the parameter has no floating dtype; ``place`` names it.
    """
    if wanted_of(name, param, options) != EIGHT_BIT or is_lazy(param):
        return None
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(f"state_dtype='8bit': {place} is {param.dtype}, and only floating parameters have states")
    return why_no_code(name, param)


def format_of(name: str, param: Tensor, options: Options) -> torch.dtype:
    """The dtype of a new state, int8 and uint8 for codes: the parameter's, or what the user wants."""
    wanted = wanted_of(name, param, options)
    if wanted is None or param.is_complex():
        return param.dtype
    if not isinstance(wanted, str):
        return wanted
    return wider_dtype(param) if why_no_code(name, param) is not None else CODES[name]


def kept_format(name: str, param: Tensor, found: torch.dtype, options: Options) -> torch.dtype:
    """The dtype in which a found state is kept: its own beside 16-bit parameters, else that of a new one."""
    new = format_of(name, param, options)
    if param.dtype in NARROW and found in FLOATS:
        return found
    if found in CODES.values() and new not in CODES.values():
        return wider_dtype(param) if param.dtype in NARROW else new
    return torch.float32 if param.dtype in NARROW and new not in (*FLOATS, *CODES.values()) else new


def draws(param: Tensor, names: Collection[str], options: Options) -> bool:
    """Whether a step of a parameter takes random words."""
    if options.master_weights == "split8" and param.dtype in NARROW:
        return True
    formats = {format_of(name, param, options) for name in names}
    if formats & set(CODES.values()):
        return True
    if options.rounding != "stochastic":
        return False
    stored = formats if options.master_weights is not None else {*formats, param.dtype}
    return bool(stored & set(NARROW))


def first_place(param: Tensor) -> int:
    """The place in the whole tensor of the first element that this process has."""
    if not is_sharded(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = param
    _, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    strides = [math.prod(sharded.shape[dim + 1 :]) for dim in range(sharded.ndim)]
    return sum(offset * stride for offset, stride in zip(offsets, strides))


def new_state(param: Tensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state of zeros, and its scales where it is codes."""
    state = {name: torch.zeros_like(param, dtype=dtype, requires_grad=False)}
    if is_code(state[name]):
        state[scale_key(name)] = _as_scale(
            local(param).new_zeros(codec.scale_shape(local(param).shape), dtype=torch.uint8), param
        )
    return state


def _as_scale(part: Tensor, param: Tensor) -> Tensor:
    """The scales of the part that this process has, as a tensor that lies as the parameter does."""
    if not is_sharded(param):
        return part
    sharded: Any = param
    shape = torch.Size(codec.scale_shape(param.shape))
    scale: Tensor = dtensor_type().from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=(shape[1], 1)
    )
    return scale


def why_scales_do_not_fit(name: str, state: Mapping[str, Any], shape: torch.Size) -> str | None:
    """Why a state's codes cannot be read; None if they can.

    ``shape``: of the parameter.
    """
    key = scale_key(name)
    scale = state.get(key)
    if not isinstance(scale, Tensor):
        return f"{name!r} holds 8-bit codes, and there is no {key!r} beside it"
    if name not in CODES or state[name].dtype != CODES[name]:
        return f"{name!r} holds {state[name].dtype}, which is no code of this state"
    fits = len(shape) > 0 and math.prod(shape[1:]) % codec.GROUP == 0 and scale.shape == codec.scale_shape(shape)
    if not fits or scale.dtype != torch.uint8:
        wanted = codec.scale_shape(shape) if len(shape) else ()
        return (
            f"{key!r} has shape {tuple(scale.shape)} and dtype {scale.dtype}; the scales of the codes {name!r} are "
            f"uint8 of shape {wanted}, one for {codec.GROUP} elements of a row"
        )
    return None


def numbers_of(name: str, state: Mapping[str, Any], param: Tensor) -> Tensor:
    """A state as numbers; codes as float32, of a DTensor as one that is sharded as the codes are."""
    codes = state[name]
    if not is_code(codes):
        return codes
    scale = state[scale_key(name)]
    if not is_sharded(codes):
        return codec.decode(codes, scale.to(codes.device))
    if not is_sharded(scale) or scale.placements != codes.placements:
        scale = scale.redistribute(codes.device_mesh, codes.placements)
    decoded = codec.decode(local(codes), local(scale))
    number: Tensor = dtensor_type().from_local(
        decoded, codes.device_mesh, codes.placements, run_check=False, shape=codes.shape, stride=codes.stride()
    )
    return number


def converted(name: str, state: Mapping[str, Any], param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A copy of a state with the parameter's device, layout and placement, in another format; numbers become codes by
    rounding to nearest."""
    value = state[name]
    same_codes = is_code(value) and value.dtype == dtype
    if not same_codes:
        value = numbers_of(name, state, param).detach()
    if is_sharded(value) and not same_placement(value._spec, param._spec):  # type: ignore[attr-defined]
        value = value.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    if dtype not in CODES.values():
        return {name: torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)}
    result = new_state(param, name, dtype)
    codes, scale = local(result[name]), local(result[scale_key(name)])
    if same_codes:
        found = state[scale_key(name)]
        if is_sharded(found) and found.placements != param.placements:  # type: ignore[attr-defined]
            found = found.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
        codes.copy_(local(value))
        scale.copy_(local(found))
    else:
        numbers = local(value).to(device=codes.device, dtype=torch.float32)
        for out, encoded in zip((codes, scale), codec.encode(numbers, dtype, codec.middle_words(numbers))):
            out.copy_(encoded)
    return result
