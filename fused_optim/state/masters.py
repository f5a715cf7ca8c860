"""Float32 master weights of 16-bit parameters: whole (`master_param`) or as the half that the parameter lacks.

The parameter is what counts, at every element and every step; the master adds the bits below it. So whatever writes a
parameter between two steps is seen, by comparing element by element: a master that still rounds to its parameter
counts, any other is replaced by the parameter.

`param_remainder` holds the lower 16 bits of the float32 value whose upper 16 bits are the bfloat16 parameter, as a
signed number to be added, as int16. For that the parameter is rounded to nearest with ties away from zero, and both
kinds of master give the same run, bit for bit. As int8 it holds the upper 8 of the 16: a master of 24 bits, rounded up
or down by a random word at each step, so that what a step adds below them is not lost on average.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..parameters import Place
from ..tensors import lasting, like, local

KEYS = {"float32": "master_param", "split": "param_remainder", "split8": "param_remainder"}
DTYPES = {"float32": torch.float32, "split": torch.int16, "split8": torch.int8}
STATES = tuple(dict.fromkeys(KEYS.values()))


def check_option(option: str | None) -> None:
    """Refuse another ``master_weights`` than those there are.

    Raises:
        ValueError: not ``"float32"``, ``"split"``, ``"split8"`` or None.
    """
    if option is not None and option not in KEYS:
        raise ValueError(f"master_weights={option!r} is not 'float32', 'split', 'split8' or None")


def key_for(param: Tensor, option: str | None, name: str) -> str | None:
    """The state key of a parameter's master; None for a parameter that needs none.

    Raises:
        ValueError: a float16 parameter cannot be split.
    """
    if option is None or param.dtype not in (torch.bfloat16, torch.float16):
        return None
    if option != "float32" and param.dtype != torch.bfloat16:
        kept = "the 16 bits" if option == "split" else "8 of the 16 bits"
        raise ValueError(
            f"master_weights={option!r} keeps {kept} that a bfloat16 parameter lacks, but {name} is {param.dtype}; "
            "use master_weights='float32'"
        )
    return KEYS[option]


def _bits(value: Tensor) -> Tensor:
    value = value.resolve_neg().contiguous()  # torch refuses another dtype where a negation is pending
    return value.view(torch.int32) if value.dtype == torch.float32 else value.view(torch.int16)


def round_ties_away(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor as the parameter beside a master: bfloat16 to nearest, ties away from zero."""
    if dtype != torch.bfloat16:
        return value.to(dtype)
    rounded = ((_bits(value) + 0x8000) >> 16).to(torch.int16)
    rounded = torch.where(torch.isnan(value), torch.full_like(rounded, 0x7FC0), rounded)
    return rounded.view(torch.bfloat16)


def remainder_of(value: Tensor, param: Tensor) -> Tensor:
    """What the bfloat16 ``param``, rounded from the float32 ``value``, lacks of it."""
    difference = _bits(value) - (_bits(param).to(torch.int32) << 16)
    return torch.where(torch.isnan(value), torch.zeros_like(difference), difference).to(torch.int16)


def remainder8_of(value: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor rounded to its upper 24 bits by random words: the bfloat16 parameter and the int8 remainder."""
    nan = torch.isnan(value)
    upper = (_bits(value) + (words & 255)) & ~255
    param = torch.where(nan, torch.full_like(upper, 0x7FC0), (upper + 0x8000) >> 16).to(torch.int16)
    remainder = (upper - (param.to(torch.int32) << 16)) >> 8
    return param.view(torch.bfloat16), torch.where(nan, torch.zeros_like(remainder), remainder).to(torch.int8)


def read(param: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    """The float32 number of each element: the master where it belongs to the parameter, elsewhere the parameter."""
    param = param.detach()
    master = state[key]
    if key == "master_param":
        whole = master
        belongs = _bits(round_ties_away(whole, param.dtype)) == _bits(param)
    elif master.dtype == torch.int16:  # every remainder does, but for those that would make a NaN
        whole = ((_bits(param).to(torch.int32) << 16) + master.to(torch.int32)).view(torch.float32)
        belongs = ~torch.isnan(whole)
    else:  # a NaN that a remainder of 8 bits makes is not one that it makes alone: none counts beside 0, Inf and NaN
        whole = ((_bits(param).to(torch.int32) << 16) + (master.to(torch.int32) << 8)).view(torch.float32)
        belongs = torch.isfinite(param) & (param != 0)
    return torch.where(belongs, whole, param.to(torch.float32))


def write(param: Tensor, state: dict[str, Tensor], key: str, value: Tensor, words: Tensor | None) -> None:
    """Store an updated master and the parameter rounded from it; ``words``: for a remainder of 8 bits."""
    if state[key].dtype == torch.int8:
        assert words is not None
        rounded, remainder = remainder8_of(value, words)
        state[key].copy_(remainder)
    else:
        rounded = round_ties_away(value, param.dtype)
        state[key].copy_(value if key == "master_param" else remainder_of(value, rounded))
    param.copy_(rounded)


def build(param: Tensor, option: str) -> Tensor:
    """A new master that agrees with the parameter."""
    if option == "float32":
        return torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(param.detach())
    return torch.zeros_like(param, dtype=DTYPES[option], requires_grad=False)


def rebuild(places: Iterable[Place], states: dict[Tensor, Any], option: str | None) -> None:
    """A new master in place of each that there is."""
    for place in places:
        key = key_for(place.param, option, place.name)
        if option is not None and key in states.get(place.param, {}):
            with lasting():
                states[place.param][key] = build(place.param, option)


def rename_remainder(state: dict[str, Any]) -> None:
    """TransformerEngine keeps a remainder, bit for bit that of here, as a ``master_param`` of int16."""
    master = state.get("master_param")
    if isinstance(master, Tensor) and master.dtype == torch.int16:
        state["param_remainder"] = state.pop("master_param")


def converted(state: dict[str, Any], param: Tensor, option: str) -> Tensor | None:
    """The master of an option out of a state that has one of another; None where there is none."""
    if param.dtype != torch.bfloat16:
        return None
    key = next((key for key in STATES if isinstance(state.get(key), Tensor)), None)
    if key is None:
        return None
    found, part = local(state[key]).to(param.device), local(param).detach()
    if option == "float32":
        return like(param, read(part, {key: found}, key))
    if found.dtype == torch.int8:
        remainder = found.to(torch.int32) << 8
    elif key == "param_remainder":
        remainder = found.to(torch.int32)
    else:
        remainder = remainder_of(found, round_ties_away(found, torch.bfloat16)).to(torch.int32)
    if option == "split8":  # to nearest, beside the parameter as it is
        remainder = ((remainder + 128) >> 8).clamp_max(127)
    return like(param, remainder.to(DTYPES[option]))
