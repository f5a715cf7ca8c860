"""The states of one parameter: created, checked, and brought into the shape that the plan reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..eager import sparse
from ..options.options import Options
from ..row import Row
from ..rule.contract import Rule
from ..rule.hyperparameters import is_number, shown
from ..tensors import is_plain, is_sharded, local, same_placement
from . import formats, masters

# Why a state is replaced that was made or copied in inference mode.
INFERENCE = "is an inference tensor, which cannot be written outside of torch.inference_mode()"
REMAINDERS = (torch.int16, torch.int8)


def check_memory(tensor: Tensor, what: str) -> None:
    """Refuse a tensor whose memory was taken away: torch's own operations would read address 0.

    Raises:
        RuntimeError: the text names it.
    """
    tensor = local(tensor)
    plain = is_plain(type(tensor)) and tensor.layout == torch.strided and tensor.device.type != "meta"
    if plain and tensor.numel() != 0 and tensor.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"the storage of {what} was resized to 0; step before its memory is freed, or after it is back"
        )


def check_writable(param: Tensor, group: dict[str, Any], name: str) -> None:
    """Refuse a parameter that torch would refuse to write, after its states had been written.

    Raises:
        RuntimeError: the text names it.
    """
    part = local(param)
    if part.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} is an inference tensor; create it outside of torch.inference_mode(), or clone it")
    if is_expanded(param):
        raise RuntimeError(f"{name} is expanded: several of its elements are one number in memory; make it contiguous")
    if group.get("differentiable") and torch.is_grad_enabled() and param.is_leaf and param.requires_grad:
        raise RuntimeError(
            f"{name} is a leaf that requires grad, which a differentiable step cannot write; give the optimizer a clone"
        )


def check_grad(row: Row, group: dict[str, Any], rule: Rule, options: Options) -> None:
    """Refuse a gradient that cannot be used.

    Raises:
        RuntimeError: its parameter cannot be written; or it is sparse, not of a floating or complex dtype, or of
            another device or shape than the parameter.
    """
    param, grad = row.param, row.param.grad
    assert grad is not None
    check_memory(param, row.name)
    check_memory(grad, f"the gradient of {row.name}")
    if grad.layout != torch.strided:
        name = type(rule).__name__
        if not options.lazy_mode:
            lazy = "make the optimizer with lazy_mode=True, " if rule.takes_sparse else ""
            raise RuntimeError(
                f"{name} does not support sparse gradients, please consider SparseAdam instead: {row.name} has a "
                f"gradient of layout {grad.layout}; {lazy}build its module with sparse=False or "
                "step it with torch.optim.SparseAdam"
            )
        trusts = row.has_trust_ratio and rule.trust_ratio(group) is not None
        reason = sparse.why_refused(grad, trusts=trusts, differentiable=bool(group.get("differentiable")))
        if reason is not None:
            raise RuntimeError(f"{name} cannot take the sparse gradient of {row.name}: {reason}")
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{row.name} has dtype {param.dtype}; only floating and complex parameters can be optimized")
    if not (grad.is_floating_point() or grad.is_complex()):
        raise RuntimeError(f"the gradient of {row.name} has dtype {grad.dtype}, not a floating or complex one")
    if grad.is_complex() and not param.is_complex():
        raise RuntimeError(
            f"the gradient of {row.name} is complex, the parameter is not; set param.grad to its real part"
        )
    if is_sharded(grad) != is_sharded(param) or (is_sharded(param) and grad.device_mesh != param.device_mesh):  # type: ignore[attr-defined]
        what, whose = (f"on {t.device_mesh}" if is_sharded(t) else "no DTensor" for t in (grad, param))  # type: ignore[attr-defined]
        raise RuntimeError(
            f"the gradient of {row.name} is {what}, the parameter {whose}; distribute both over the same mesh"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"the gradient of {row.name} is on {grad.device}, the parameter on {param.device}; move one to the other"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {row.name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}; "
            "call zero_grad() after the parameter was replaced"
        )
    if row.draws and group.get("differentiable"):
        raise RuntimeError(
            f"the group of {row.name} is differentiable, which rounding by random words and states of 8 bits are not; "
            "leave out state_dtype='8bit', master_weights='split8' and rounding='stochastic'"
        )
    check_writable(param, group, row.name)


def check_state(row: Row, state: Any, group: dict[str, Any], rule: Rule) -> None:
    """Refuse a state that lacks something, has another shape than its parameter, or codes without their scales.

    Raises:
        RuntimeError: the text names the parameter and the key.
    """
    if not state:
        return
    names = rule.state_names(group)
    for name in (*names, *map(formats.scale_key, names), *number_names(row, group, rule), *masters.STATES):
        if isinstance(state.get(name), Tensor):
            check_memory(state[name], f"state {name!r} of {row.name}")
    if not_begun(state, rule):
        return
    for name in names:
        if name not in state and name in rule.late_states:
            continue
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != row.param.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
            raise RuntimeError(
                f"state {name!r} of {row.name} must be a Tensor of shape {tuple(row.param.shape)}, found {found}; "
                "delete optimizer.state[param] to start it anew"
            )
        if is_sharded(value) != is_sharded(row.param):
            what, whose = ("a DTensor" if is_sharded(t) else "whole" for t in (value, row.param))
            raise RuntimeError(
                f"state {name!r} of {row.name} is {what}, the parameter {whose}; load it with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, or delete optimizer.state[param] to "
                "start it anew"
            )
        reason = formats.why_scales_do_not_fit(name, state, row.param.shape) if formats.is_code(value) else None
        if reason is not None:
            raise RuntimeError(
                f"the state of {row.name} cannot be read: {reason}; delete optimizer.state[param] to start it anew"
            )
    for name in number_names(row, group, rule):
        value = number_of(state, name, group, rule.missing_step)
        counts = is_number(value) and getattr(value, "dtype", None) != torch.bool
        # A state that was begun by steps without random words has no count for them.
        begins = name in rule.late_states or name not in rule.tensor_state_names(group)
        if not counts and not (value is None and begins):
            raise RuntimeError(
                f"state {name!r} of {row.name} must be a number or a one-element Tensor, found {shown(value)}; "
                "delete optimizer.state[param] to start it anew"
            )


def not_begun(state: Mapping[str, Any], rule: Rule) -> bool:
    """Whether a parameter that has a state has not had the first step of this rule.

    torch's SGD keeps a momentum_buffer of None where there was no gradient yet, or no momentum; and beside a master
    weight alone there is none before momentum is switched on.
    """
    present = {name for name, value in state.items() if value is not None and name not in masters.STATES}
    return bool(rule.states_of_first_step) and not present


def number_of(state: Mapping[str, Any], name: str, group: Mapping[str, Any], missing_step: float) -> Any:
    """A per-tensor state as it is found; apex and DeepSpeed keep the step in the group, torch's SGD keeps none."""
    if name == "step" and name not in state:
        return group.get("step", missing_step or None)
    return state.get(name)


def number_names(row: Row, group: dict[str, Any], rule: Rule) -> tuple[str, ...]:
    """The states of one number: the rule's, and the count of steps that random words are made from."""
    return (*rule.tensor_state_names(group), *(("step",) if row.counts else ()))


def number_dtype(name: str, param: Tensor) -> torch.dtype:
    """The dtype of a per-tensor state: a step count is float32, as torch's; others are float64 beside float64."""
    return torch.float64 if name != "step" and param.dtype == torch.float64 else torch.float32


def new_number(name: str, value: float | Tensor, param: Tensor) -> Tensor:
    """A per-tensor state as the plan reads it: 0-d, on the parameter's device, in memory of its own."""
    dtype = number_dtype(name, param)
    if isinstance(value, Tensor):
        return local(value.detach()).to(device=param.device, dtype=dtype, copy=True).reshape(())
    return torch.full((), float(value), dtype=dtype, device=param.device)


def like_param(value: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a state with the parameter's device, layout and placement."""
    if is_sharded(value) and not same_placement(value._spec, param._spec):  # type: ignore[attr-defined]
        value = value.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value.detach())


def why_not_usable(state: Tensor, param: Tensor, dtype: torch.dtype) -> str | None:
    """Why no backend can read and write a state of a number an element where it is; None if one can.

    ``dtype``: the one in which it is kept. Where only the order of the elements differs from the parameter's, the eager
    path takes it.
    """
    if state.device != param.device:
        return f"is on {state.device}, the parameter on {param.device}"
    if state.dtype != dtype:
        return f"has dtype {state.dtype}, and is kept as {dtype} beside the parameter's {param.dtype}"
    if is_sharded(param) and not same_placement(state._spec, param._spec):  # type: ignore[attr-defined]
        return f"lies as {state.placements}, the parameter as {param.placements}"  # type: ignore[attr-defined]
    if is_expanded(state):
        return "is expanded: several of its elements are one number in memory"
    return INFERENCE if local(state).is_inference() else None


def why_scale_not_usable(scale: Tensor, param: Tensor) -> str | None:
    """The same for the scales of a state's codes."""
    if scale.device != param.device:
        return f"has scales on {scale.device}, the parameter is on {param.device}"
    if is_sharded(param):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        if not is_sharded(scale) or (scale.device_mesh, scale.placements) != (mesh, placements):  # type: ignore[attr-defined]
            return "has scales in other processes than the parameter"
    if not local(scale).is_contiguous():
        return "has scales that do not lie in their order"
    return (
        "has scales that cannot be written outside of torch.inference_mode()" if local(scale).is_inference() else None
    )


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are one number in memory, which cannot be written."""
    part = local(tensor)
    return part.layout == torch.strided and any(n > 1 and not step for n, step in zip(part.shape, part.stride()))


def repair_state(
    row: Row,
    all_states: dict[Tensor, Any],
    group: dict[str, Any],
    rule: Rule,
    options: Options,
    taken: dict[int, Tensor],
) -> list[tuple[str, str]]:
    """Create what is missing. What is there is kept, so that the step reads and writes what the user has put there,
    unless no backend can: then it is replaced by its equal.

    ``taken`` maps the addresses of the states seen so far to their parameters: two parameters never share one.

    Returns:
        Each tensor that was replaced, by its key, and why.
    """
    param = row.param
    state = all_states.get(param, {})
    replaced: list[tuple[str, str]] = []
    for name in number_names(row, group, rule):
        value = number_of(state, name, group, 0.0 if not_begun(state, rule) else rule.missing_step)
        if not isinstance(state.get(name), Tensor):
            state[name] = new_number(name, 0.0 if value is None else value, param)
            continue
        reason = f"is on {value.device}, the parameter on {param.device}" if value.device != param.device else None
        reason = INFERENCE if reason is None and local(value).is_inference() else reason
        if reason is not None:
            replaced.append((name, reason))
            state[name] = new_number(name, value, param)
    names = [*number_names(row, group, rule)]
    for name in rule.state_names(group):
        value = state.get(name)
        if value is None:
            state |= formats.new_state(param, name, formats.format_of(name, param, options))
        else:
            kept = formats.kept_format(name, param, value.dtype, options)
            reason = why_not_usable(value, param, kept)
            if reason is None and formats.is_code(value):
                reason = why_scale_not_usable(state[formats.scale_key(name)], param)
            if reason is not None:
                replaced.append((name, reason))
                state |= formats.converted(name, state, param, kept)
        if formats.is_code(state[name]):
            names.append(formats.scale_key(name))
        else:
            state.pop(formats.scale_key(name), None)
        names.append(name)
    if row.master is not None and options.master_weights is not None:
        names.append(row.master)
        reason = repair_master(param, state, row.master, options.master_weights)
        if reason is not None:
            replaced.append((row.master, reason))
    for name in names:
        value = state[name]
        part = local(value)
        addressed = is_plain(type(part)) and part.device.type != "meta" and part.numel() != 0
        if addressed and taken.setdefault(part.data_ptr(), param) is not param:
            replaced.append((name, "is also that of another parameter"))
            state[name] = value.clone()
    if state:  # an empty one would keep a parameter that leaves its group, and torch's state_dict() refuses that
        all_states[param] = state
    return replaced


def repair_master(param: Tensor, state: dict[str, Any], key: str, option: str) -> str | None:
    """Create a master weight, of another kind if a checkpoint has left that; or replace it, and say why."""
    masters.rename_remainder(state)
    master, dtype, reason = state.get(key), masters.DTYPES[option], None
    is_there = isinstance(master, Tensor) and master.shape == param.shape
    if not isinstance(master, Tensor) or not is_there or (master.dtype in REMAINDERS and master.dtype != dtype):
        master = masters.converted(state, param, option)
        state[key] = masters.build(param, option) if master is None else like_param(master, param, dtype)
    else:
        reason = why_not_usable(master, param, dtype)
        if reason is not None:
            state[key] = like_param(master, param, dtype)
    for other in masters.STATES:
        if other != key:
            state.pop(other, None)
    return reason
