"""Float32 master weights of 16-bit parameters: whole (`master_param`) or as the half that the parameter lacks.

The parameter is what counts, at every element and every step; the master adds the bits below it. So whatever writes a
parameter between two steps is seen, by comparing element by element: a master that still rounds to its parameter
counts, any other is replaced by the parameter.

`param_remainder` holds the lower 16 bits of the float32 value whose upper 16 bits are the bfloat16 parameter, as a
signed number to be added. For that the parameter is rounded to nearest with ties away from zero, and both kinds of
master give the same run, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import like, local

KEYS = {"float32": "master_param", "split": "param_remainder"}
DTYPES = {"master_param": torch.float32, "param_remainder": torch.int16}


def check_option(option: str | None) -> None:
    """Refuse another ``master_weights`` than those there are.

    Raises:
        ValueError: not ``"float32"``, ``"split"`` or None.
    """
    if option is not None and option not in KEYS:
        raise ValueError(f"master_weights={option!r} is not 'float32', 'split' or None")


def key_for(param: Tensor, option: str | None, name: str) -> str | None:
    """The state key of a parameter's master; None for a parameter that needs none.

    Raises:
        ValueError: a float16 parameter cannot be split.
    """
    if option is None or param.dtype not in (torch.bfloat16, torch.float16):
        return None
    if option == "split" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"master_weights='split' keeps the 16 bits that a bfloat16 parameter lacks, but {name} is {param.dtype}; "
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


def read(param: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    """The float32 number of each element: the master where it belongs to the parameter, elsewhere the parameter."""
    param = param.detach()
    if key == "master_param":
        whole = state[key]
        belongs = _bits(round_ties_away(whole, param.dtype)) == _bits(param)
    else:  # every remainder does, but for those that would make a NaN
        whole = ((_bits(param).to(torch.int32) << 16) + state[key].to(torch.int32)).view(torch.float32)
        belongs = ~torch.isnan(whole)
    return torch.where(belongs, whole, param.to(torch.float32))


def write(param: Tensor, state: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Store an updated master and the parameter rounded from it."""
    rounded = round_ties_away(value, param.dtype)
    if key == "master_param":
        state[key].copy_(value)
    else:
        state[key].copy_(remainder_of(value, rounded))
    param.copy_(rounded)


def build(param: Tensor, key: str) -> Tensor:
    """A new master that agrees with the parameter."""
    if key == "master_param":
        return torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(param.detach())
    return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)


def rename_remainder(state: dict[str, Any]) -> None:
    """TransformerEngine keeps a remainder, bit for bit that of here, as a ``master_param`` of int16."""
    master = state.get("master_param")
    if isinstance(master, Tensor) and master.dtype == torch.int16:
        state["param_remainder"] = state.pop("master_param")


def converted(state: dict[str, Any], param: Tensor, key: str) -> Tensor | None:
    """The master of kind ``key`` out of a state that has the other kind; None where there is none."""
    if param.dtype != torch.bfloat16:
        return None
    if key == "param_remainder" and isinstance(state.get("master_param"), Tensor):
        master = local(state["master_param"]).to(param.device)
        return like(param, remainder_of(master, round_ties_away(master, torch.bfloat16)))
    if key == "master_param" and isinstance(state.get("param_remainder"), Tensor):
        remainder = local(state["param_remainder"]).to(param.device)
        return like(param, read(local(param), {"param_remainder": remainder}, "param_remainder"))
    return None
