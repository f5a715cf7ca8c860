"""From param groups to a plan: a row of each parameter, and which plan steps them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..backends import choice, extension
from ..backends.choice import FallbackLog
from ..options.clip import GLOBAL_NORM, NORM
from ..options.options import Options
from ..parameters import Place, parameters
from ..row import DTYPES, Row
from ..rule.contract import Rule
from ..rule.hyperparameters import LIMITS
from ..rule.trust_ratio import TrustRatio
from ..state import formats, masters
from ..tensors import (
    current_stream,
    describe_tensor,
    is_flattened,
    is_sharded,
    kind_of,
    layout_of,
    local,
    make_room,
    negative_bit,
    same_placement,
)
from .agreement import Agreement
from .built_plan import BuiltPlan, is_on_device, rows_on_devices
from .directions import Directions, Settings
from .plan import Plan, why_not_native
from .python_plan import PythonPlan
from .read_groups import ReadForTriton
from .shards import Shards, check_placement, check_same_rows, refuse_flattened
from .tensor_shim import tensor_shim
from .triton_plan import TritonPlan, TritonRows


def build_plan(
    param_groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    rule: Rule,
    options: Options,
    log: FallbackLog,
    same_rows: str,
) -> BuiltPlan:
    """The plan of an optimizer's groups as they are now; a collective where parameters are shards.

    Args:
        param_groups, defaults: the optimizer's.
        rule: its mathematics.
        options: what its constructor was told.
        log: says which better backend is passed over.
        same_rows: what the processes had found to be the same everywhere when the last plan was built.
    """
    groups = [{**defaults, **group} for group in param_groups]
    options.factors.check(groups)
    for index, group in enumerate(groups) if rule.keys_of_directions else ():
        rule.check_group(index, group, defaults)
    rows = []
    for index, place in enumerate(parameters(groups)):
        row, passed_over = row_of(place, rule, options, index)
        if passed_over is not None:
            slower = ", slower than torch.optim's own steps" if row.backend == "eager" else ""
            log.serves(f"parameters on {place.param.device}{slower}", passed_over, served_by=row.backend)
        if is_sharded(place.param):
            check_placement(place.param, place.name)
        check_flattened(place, rule, options)
        rows.append(row)
    rules = [rule.rule(group) for group in groups]
    has_trust_ratio = any(rule.trust_ratio(group) is not None for group in groups)
    asks = has_trust_ratio or any(rule.norms(group) for group in groups)
    reduces, measures = asks or options.clip.kind in (GLOBAL_NORM, NORM), asks or rule.has_direction
    directions = Directions.of(rows, groups, rule)
    agreement = None
    if directions is not None and directions.dealt:
        dealt = [one for of_table in directions.dealt.values() for one in of_table]
        agreement = Agreement(rows, rules, directions.iterations, dealt)
    shards: Mapping[torch.device | None, Shards] = {}
    if (reduces or measures) and any(is_sharded(row.param) for row in rows):
        if agreement is None:  # which compares them at each step
            same_rows = check_same_rows(rows, rules, same_rows)
        # Only a global norm or the norm of each gradient is left.
        total_only = not measures and options.clip.kind == GLOBAL_NORM
        takes_maximum = any("grad_max" in rule.norms(group) for group in groups)
        shards = shards_of(rows, total_only=total_only, takes_maximum=takes_maximum)
    settings = Settings(param_groups, rule.keys_of_directions) if rule.keys_of_directions else None
    native = make_plan(
        rows,
        rules,
        groups,
        defaults,
        rule.structural_keys,
        rule.trust_ratio if has_trust_ratio else None,
        check=partial(rule.check_group, defaults=defaults),
        has_direction=rule.has_direction,
    )
    return BuiltPlan(
        rows,
        native,
        shards,
        measures=measures,
        reduces=reduces,
        same_rows=same_rows,
        directions=directions,
        agreement=agreement,
        settings=settings,
    )


def check_flattened(place: Place, rule: Rule, options: Options) -> None:
    """Refuse a parameter that FSDP1 has flattened where a step would need the norm of the whole tensor.

    Raises:
        ValueError: the text names the parameter, what needs the norm, and the remedy.
    """
    if not is_flattened(place.param):
        return
    _, _, clips, has_trust_ratio = options.factors.of(place)
    by_ratio = rule.has_direction or rule.trust_ratio(place.group) is not None
    if by_ratio and has_trust_ratio and not rule.exempt(place.group, place.param):
        refuse_flattened(place.name, "LARC" if options.trust_ratio is not None else type(rule).__name__)
    if rule.norms(place.group):
        refuse_flattened(place.name, type(rule).__name__)
    if clips and options.clip.kind in (GLOBAL_NORM, NORM):
        what = "ClipGradByGlobalNorm" if options.clip.kind == GLOBAL_NORM else "ClipGradByNorm"
        refuse_flattened(place.name, what, ", or leave grad_clip out and call clip_grad_norm_() of the FSDP module")


def row_of(place: Place, rule: Rule, options: Options, index: int) -> tuple[Row, str | None]:
    """The row of a parameter whose group has the defaults in it, and why a better backend is passed over.

    ``index``: of the parameter among all of the optimizer.
    """
    param = place.param
    backend, passed_over = choice.choose(param.device, options.backend)
    lr_scale, weight_decay_scale, clips, has_trust_ratio = options.factors.of(place)
    if rule.exempt(place.group, param):
        weight_decay_scale = has_trust_ratio = 0.0
    matrices = rule.matrices(place)
    master = masters.key_for(param, options.master_weights, place.name)
    draws = formats.draws(param, rule.state_names(place.group), options)
    refused = why_not_native(param, place.group, backend, matrices)
    row = Row(
        group=place.group_index,
        param_ref=weakref.ref(param),
        lr_scale=lr_scale,
        weight_decay_scale=weight_decay_scale,
        native=refused is None,
        clipped=clips != 0,
        has_trust_ratio=has_trust_ratio != 0,
        master=master,
        dtype=param.dtype,
        device=param.device,
        layout=layout_of(param),
        name=place.name,
        backend=backend,
        refused=refused,
        own_name=place.own_name,
        matrices=matrices,
        formats=tuple(DTYPES.get(formats.format_of(name, param, options), 0) for name in rule.state_names(place.group)),
        master_format=0 if master is None else DTYPES[masters.DTYPES[options.master_weights or ""]],
        draws=draws,
        counts=draws and "step" not in rule.tensor_state_names(place.group),
        stochastic=draws and options.rounding == "stochastic",
        seed=options.seed,
        place=index,
        first=formats.first_place(param) if draws else 0,
    )
    return row, passed_over


def shards_of(rows: Sequence[Row], *, total_only: bool, takes_maximum: bool) -> Mapping[torch.device | None, Shards]:
    """What is exchanged between processes: of each CUDA device and, at None, of the host."""
    on_host = {index: index for index, row in enumerate(rows) if not is_on_device(row)}
    shards: dict[torch.device | None, Shards] = {
        None: Shards(rows, on_host, torch.device("cpu"), total_only=total_only, takes_maximum=takes_maximum)
    }
    for device, of_device in rows_on_devices(rows).items():
        positions = {index: position for position, index in enumerate(of_device)}
        shards[device] = Shards(rows, positions, device, total_only=False, takes_maximum=takes_maximum)
    return {device: of_table for device, of_table in shards.items() if of_table}


def make_plan(
    rows: list[Row],
    rules: list[str],
    groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    structural_keys: tuple[str, ...],
    trust_ratio: Callable[[dict[str, Any]], TrustRatio | None] | None,
    *,
    check: Callable[[int, dict[str, Any]], None],
    has_direction: bool,
) -> Plan:
    """The compiled plan, or the one in Python; around it the launcher where rows are Triton's."""
    devices: dict[torch.device, list[int]] = {}
    for index, row in enumerate(rows):
        if row.native and row.backend == "triton":
            devices.setdefault(row.param.device, []).append(index)
    triton_rows = list(devices.values())
    reader: Any
    if extension._C is not None and any(row.native for row in rows):
        reader = extension._C.Plan(
            rules=rules,
            rows=rows,
            triton_rows=triton_rows,
            defaults=defaults,
            structural=structural_keys,
            exchange_api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
            kind_of=kind_of,
            same_placement=same_placement,
            describe=describe_tensor,
            current_stream=current_stream,
            make_room=make_room,
            negative_bit=negative_bit(),
            tensor_shim=tensor_shim(),
            trust_ratio=trust_ratio,
            limits=LIMITS,
            check=check,
        )
    elif not triton_rows:
        reader = PythonPlan(rows, len(groups), has_direction=has_direction)
    else:
        from ..kernels import phases, table
        from ..kernels.rules.trust_ratio import needs_of

        known = phases.rules()
        read = ReadForTriton(
            devices=triton_rows,
            rules={rows[index].group: known[rules[rows[index].group]] for of_one in triton_rows for index in of_one},
            needs_of=needs_of,
            row_fields=table.ROW,
            group_fields=table.GROUP,
            defaults=defaults,
            structural=structural_keys,
            trust_ratio=trust_ratio,
            check=check,
        )
        reader = PythonPlan(rows, len(groups), read, has_direction=has_direction)
    if not triton_rows:
        return reader
    from ..kernels import phases

    capturable = any(group.get("capturable", False) for group in groups)
    return TritonPlan(
        reader,
        [
            TritonRows(
                device,
                indices,
                phases.Phases(
                    device,
                    [rules[rows[index].group] for index in indices],
                    [local(rows[index].param).numel() for index in indices],
                    len(groups),
                    capturable,
                ),
            )
            for device, indices in devices.items()
        ],
    )
