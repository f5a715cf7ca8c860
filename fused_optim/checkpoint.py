"""What is admitted as a checkpoint, and how its tensors come back in the dtype in which they were saved."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import masters
from .states import is_number, kept_dtype, like_param, name_of, new_step, state_dtype_of

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def admit(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """A ``load_state_dict`` pre-hook: refuse what cannot be loaded, before anything has changed.

    Raises:
        ValueError: the text names what is missing or wrong.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the state dict has no {key!r}: it is not an optimizer's, or it is truncated")
    groups = optimizer.param_groups
    saved_groups = state_dict["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        if "params" not in saved:
            raise ValueError(f"param_groups[{index}] of the state dict has no 'params'")
        if saved.get("bias_correction", True) is False:
            raise ValueError(
                f"param_groups[{index}] of the state dict was trained with bias_correction=False (apex, DeepSpeed), "
                f"which {type(optimizer).__name__} does not have"
            )
        names = optimizer.state_names({**optimizer.defaults, **saved})
        for position, (param, key) in enumerate(zip(group["params"], saved["params"])):
            state = state_dict["state"].get(key)
            if not state:
                continue
            place = name_of(group, index, position)
            for name in names:
                if name not in state:
                    if name in optimizer.late_states:
                        continue
                    raise ValueError(f"the state dict has no {name!r} for {place}; it has {sorted(state)}")
                shape = tuple(getattr(state[name], "shape", ()))
                if not isinstance(state[name], Tensor) or shape != tuple(param.shape):
                    raise ValueError(
                        f"{name!r} of {place} has shape {shape} in the state dict, the parameter {tuple(param.shape)}"
                    )
            step = state.get("step", saved.get("step"))
            if not is_number(step):
                raise ValueError(
                    f"'step' of {place}, in its state or its group, must be a number or a one-element Tensor in the "
                    f"state dict, found {step!r}; the state has {sorted(state)}"
                )
    optimizer._loading = state_dict


def restore(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Replace the states that torch has cast to the parameters' dtype by copies of those that were saved."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    places = ((group, param) for group in optimizer.param_groups for param in group["params"])
    for key, (group, param) in zip(keys, places):
        saved = state_dict["state"].get(key)
        if not saved:
            continue
        names = optimizer.state_names(group)
        # Known keys first and as literals: the plan compares them by identity.
        state: dict[str, Any] = {"step": new_step(saved.get("step", group.get("step", 0.0)), param)}
        for name in names:
            if name in saved:
                dtype = kept_dtype(param, saved[name].dtype)
                if optimizer._state_dtype is not None:
                    dtype = state_dtype_of(param, optimizer._state_dtype)
                state[name] = like_param(saved[name], param, dtype)
        master = masters.key_for(param, optimizer._master_weights, "a parameter")
        if master is not None:
            value = saved.get(master)
            value = masters.converted(saved, param, master) if value is None else value
            if value is not None:  # otherwise the next step builds it from the parameter
                state[master] = like_param(value, param, value.dtype)
                optimizer._versions[param] = param._version
        for name, value in saved.items():
            if name not in state and name not in masters.KEYS.values():
                state[name] = value.clone() if isinstance(value, Tensor) else value
        optimizer.state[param] = state
    for group in optimizer.param_groups:
        group.pop("step", None)  # apex and DeepSpeed count steps by group; now each parameter has its own
