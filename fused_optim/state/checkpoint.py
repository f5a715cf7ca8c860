"""What is admitted as a checkpoint, and how its tensors come back in the dtype in which they were saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from ..backends.choice import logger
from ..options.options import Options
from ..parameters import Place, parameters
from ..rule.contract import Rule
from ..rule.hyperparameters import is_number, plain_number, shown
from . import foreign, formats, masters
from .states import REMAINDERS, like_param, new_number, not_begun, number_of

SCALES = "fused_optim_scales"  # key of a state dict: factors that are not 1


Groups = Sequence[dict[str, Any]]


def factors(groups: Groups, options: Options) -> Iterator[tuple[str, int, str, float]]:
    """For each factor of each parameter: the argument, the parameter's position over all groups, its name, it."""
    for position_over_all, place in enumerate(parameters(groups)):
        lr, weight_decay, *_ = options.factors.of(place)
        yield "lr_scale", position_over_all, place.name, lr
        yield "weight_decay_scale", position_over_all, place.name, weight_decay


def clear_absent(groups: Groups, states: dict[Tensor, Any]) -> None:
    """Forget the empty states of parameters that have left their groups, and refuse a state of one: a state dict has no
    place for it, and torch would raise a KeyError with an address in its text.

    Raises:
        KeyError: the text says which parameter it is of, and what to do.
    """
    present = {place.param for place in parameters(groups)}
    absent = [param for param in states if isinstance(param, Tensor) and param not in present]
    for param in absent:
        if states[param]:
            raise KeyError(
                f"a parameter of shape {tuple(param.shape)} has a state and is in no group any more, so that the state "
                "dict has no place for it; del optimizer.state[param] when you take a parameter out of its group"
            )
        del states[param]  # a defaultdict makes an empty one when it is asked


def remember_scales(groups: Groups, options: Options, state_dict: dict[str, Any]) -> None:
    """Note the factors in a state dict, if one of them differs from 1."""
    found: dict[str, dict[int, float]] = {}
    for argument, position, _, factor in factors(groups, options):
        if factor != 1:
            found.setdefault(argument, {})[position] = factor
    if found:
        state_dict[SCALES] = found


def compare_scales(groups: Groups, rule: Rule, options: Options, state_dict: dict[str, Any]) -> None:
    """Warn if the checkpoint remembers other factors than the optimizer has; a dict without any says nothing."""
    saved = state_dict.get(SCALES)
    if not isinstance(saved, Mapping):
        return
    differ = []
    for argument, position, place, factor in factors(groups, options):
        before = saved.get(argument, {}).get(position, 1.0)
        if not math.isclose(before, factor, rel_tol=1e-9):
            differ.append(f"{argument} of {place} was {before:g} and is {factor:g}")
    if differ:
        logger.warning(
            "%s: the checkpoint was written with other factors: %s",
            type(rule).__name__,
            "; ".join(differ[:20]) + (f"; and {len(differ) - 20} more" if len(differ) > 20 else ""),
        )


def as_torch(groups: Groups, rule: Rule, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as ``torch.optim`` would have it: codes as the float32 numbers that they stand for, and nothing of
    what only this package keeps."""
    states = dict(state_dict["state"])
    for position, place in enumerate(parameters(groups)):
        found = states.get(position)
        if found is None:
            continue
        names = rule.state_names(place.group)
        ours = {*masters.STATES, *map(formats.scale_key, names), "step"} - {*rule.tensor_state_names(place.group)}
        state = {key: value for key, value in found.items() if key not in ours}
        state |= {
            name: formats.numbers_of(name, found, place.param) for name in names if formats.is_code(found.get(name))
        }
        if state:
            states[position] = state
        else:
            del states[position]
    return {"state": states, "param_groups": state_dict["param_groups"]}


def as_ours(state: Any) -> Any:
    """A saved state as it would be here: with the name of a remainder of TransformerEngine's, and Python's numbers in
    place of numpy's, since torch would go through the elements even of an array that has no dimension."""
    if not isinstance(state, Mapping):
        return state
    state = {name: plain_number(value) for name, value in state.items()}
    masters.rename_remainder(state)
    return state


def admit(
    groups: Groups, defaults: dict[str, Any], rule: Rule, options: Options, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Refuse what cannot be loaded, before anything has changed.

    Returns:
        The dict that torch then loads, with the states `as_ours`.

    Raises:
        ValueError, TypeError: the text names what is missing or wrong.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the state dict has no {key!r}: it is not an optimizer's, or it is truncated")
    state_dict = {**state_dict, "state": {key: as_ours(state) for key, state in state_dict["state"].items()}}
    saved_groups = state_dict["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, saved_groups)):
        if "params" not in saved:
            raise ValueError(f"param_groups[{index}] of the state dict has no 'params'")
        if saved.get("bias_correction", True) is False and "bias_correction" not in defaults:
            raise ValueError(
                f"param_groups[{index}] of the state dict was trained with bias_correction=False (apex, DeepSpeed), "
                f"which {type(rule).__name__} does not have"
            )
        if "exp_avg_sq" in saved:
            raise ValueError(
                f"param_groups[{index}] of the state dict holds 'exp_avg_sq' for all its parameters (apex's "
                "FusedNovoGrad, which keeps norms); give each parameter its own before loading: "
                "state[i]['exp_avg_sq'] = norm ** 2, where norm is its element of group['exp_avg_sq'][0] (float16) or "
                "[1] (float32)"
            )
        rule.check_group(index, saved, defaults, of=" of the state dict")
        rule.trust_ratio({**defaults, **saved})  # which has limits of its own
        names = rule.state_names({**defaults, **saved})
        becomes = {**defaults, **saved, "param_names": group.get("param_names")}
        for position, (param, key) in enumerate(zip(group["params"], saved["params"])):
            state = state_dict["state"].get(key)
            place = Place(index, group, position, param).name
            try:
                rule.matrices(Place(index, becomes, position, param))
            except ValueError as error:
                raise ValueError(f"param_groups[{index}] of the state dict: {error}") from None
            if state is not None and not isinstance(state, Mapping):
                raise ValueError(f"the state of {place} in the state dict is {shown(state)}, not a dict")
            if state:
                try:
                    state = state_dict["state"][key] = foreign.as_numbers(state, names)
                except ValueError as error:
                    raise ValueError(f"the state of {place} in the state dict: {error}") from None
            if not state or not_begun(state, rule):
                continue
            has_master = masters.key_for(param, options.master_weights, place) is not None
            for name in (*names, *(masters.STATES if has_master else ())):
                if name not in state:
                    if name in rule.late_states or name in masters.STATES:
                        continue
                    raise ValueError(f"the state dict has no {name!r} for {place}; it has {sorted(map(str, state))}")
                shape = tuple(getattr(state[name], "shape", ()))
                if not isinstance(state[name], Tensor) or shape != tuple(param.shape):
                    raise ValueError(
                        f"{name!r} of {place} has shape {shape} in the state dict, the parameter {tuple(param.shape)}"
                    )
                if name in masters.STATES or not formats.is_code(state[name]):
                    continue
                reason = formats.why_scales_do_not_fit(name, state, param.shape)
                if reason is not None:
                    raise ValueError(f"the state of {place} in the state dict cannot be read: {reason}")
            for name in rule.tensor_state_names({**defaults, **saved}):
                value = number_of(state, name, saved, rule.missing_step)
                if not is_number(value) and not (value is None and name in rule.late_states):
                    raise ValueError(
                        f"{name!r} of {place}, in its state or its group, must be a number or a one-element Tensor in "
                        f"the state dict, found {shown(value)}; the state has {sorted(map(str, state))}"
                    )
    return state_dict


def restore(
    groups: Groups, states: dict[Tensor, Any], rule: Rule, options: Options, state_dict: dict[str, Any]
) -> None:
    """Replace the states that torch has cast to the parameters' dtype by copies of those that were saved."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for key, place in zip(keys, parameters(groups)):
        group, param = place.group, place.param
        saved = state_dict["state"].get(key)
        if not saved:
            continue
        names = rule.state_names(group)
        # Known keys first and as literals: the plan compares them by identity.
        state: dict[str, Any] = {}
        begun = not not_begun(saved, rule)
        for name in rule.tensor_state_names(group) if begun else ():
            value = number_of(saved, name, group, rule.missing_step)
            state[name] = new_number(name, 0.0 if value is None else value, param)
        for name in names:
            if isinstance(saved.get(name), Tensor):
                chosen = formats.wanted_of(name, param, options) is not None
                dtype = formats.format_of(name, param, options)
                if not chosen:
                    dtype = formats.kept_format(name, param, saved[name].dtype, options)
                state |= formats.converted(name, saved, param, dtype)
        if options.master_weights is not None:  # one kind; the step converts the other, or builds it
            master = masters.KEYS[options.master_weights]
            kept = master if master in saved else next((key for key in masters.STATES if key in saved), None)
            if kept is not None:
                found, dtype = saved[kept], masters.DTYPES[options.master_weights]
                if kept == master and found.dtype in REMAINDERS and found.dtype != dtype:
                    converted = masters.converted(saved, param, options.master_weights)
                    found = found if converted is None else converted
                state[kept] = like_param(found, param, found.dtype)
        left = {*masters.STATES, *map(formats.scale_key, names)}
        for name, value in saved.items():
            if name not in state and name not in left and (begun or value is not None):
                state[name] = value.clone() if isinstance(value, Tensor) else value
        if state:
            states[param] = state
        else:
            states.pop(param, None)
    for group in groups:
        group.pop("step", None)  # apex and DeepSpeed count steps by group; now each parameter has its own
    compare_scales(groups, rule, options, state_dict)
