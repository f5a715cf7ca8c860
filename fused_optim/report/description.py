"""What an optimizer will do to each parameter: `describe()`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..optimizer import FusedOptimizer
from ..options.options import Options
from ..parameters import parameters
from ..plan.planner import row_of
from ..row import Row
from ..rule.contract import Rule
from ..rule.hyperparameters import is_number
from ..state import codec, formats, masters, states
from ..tensors import local

HEADINGS = ("parameter", "shape", "dtype", "lr", "weight decay", "state", "bytes", "backend")
NUMBERS = ("lr", "weight decay", "bytes")


def describe(optimizer: Any, *, file: TextIO | None = None) -> None:
    """Print a table of what an optimizer does to each parameter, before or during training.

    Above the table stand the options that are not the default, clipping among them. Then one line a parameter: its
    shape and dtype; the learning rate (``lr`` of its group times its ``lr_scale``); the weight decay (of its group
    times its ``weight_decay_scale``); its states with their dtypes, and their bytes; the backend that serves it. States
    that do not exist yet are those that the first step makes. Of a DTensor the bytes are those of this process.

    Args:
        optimizer: an optimizer of this package; a wrapper around one that has it as ``optimizer``, as accelerate's;
            or any other with ``param_groups``, of which only the states that exist and no backend are known.
        file: where to print; default ``sys.stdout``.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fused_optim.AdamW(
        ...     model.named_parameters(), weight_decay_scale=fused_optim.matrices_only, backend="eager")
        >>> fused_optim.describe(optimizer)
        AdamW: 2 parameters of 10 elements in 1 group; 88 bytes of state
        weight_decay_scale: matrices_only
        parameter  shape   dtype       lr  weight decay  state                               bytes  backend
        weight     (2, 4)  float32  0.001          0.01  float32: exp_avg, exp_avg_sq, step     68  eager
        bias       (2,)    float32  0.001             0  float32: exp_avg, exp_avg_sq, step     20  eager
    """
    kinds = [type(optimizer).__name__]
    while not isinstance(optimizer, FusedOptimizer) and hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
        kinds.append(type(optimizer).__name__)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"describe takes an optimizer with param_groups, got {type(optimizer).__name__}")
    lines = list(_lines(optimizer))
    elements = sum(
        0 if is_lazy(param) else param.numel() for group in optimizer.param_groups for param in group["params"]
    )
    total = sum(int(line[HEADINGS.index("bytes")].replace(",", "")) for line in lines)
    groups = len(optimizer.param_groups)
    out = sys.stdout if file is None else file
    print(
        f"{' around '.join(kinds)}: {len(lines):,} parameters of {elements:,} elements in {groups:,} "
        f"group{'s' * (groups != 1)}; {total:,} bytes of state",
        file=out,
    )
    if isinstance(optimizer, FusedOptimizer):
        for line in [*optimizer.options.shown(), *_foreign_keys(optimizer)]:
            print(line, file=out)
    rows = [HEADINGS, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        cells = (
            f"{cell:>{width}}" if heading in NUMBERS else f"{cell:<{width}}"
            for heading, cell, width in zip(HEADINGS, row, widths)
        )
        print("  ".join(cells).rstrip(), file=out)


def _foreign_keys(optimizer: FusedOptimizer) -> Iterator[str]:
    """What stands in groups under the name of an argument of ours, and is another library's."""
    groups = [index for index, group in enumerate(optimizer.param_groups) if "lr_scale" in group]
    if groups:
        yield (
            f"param_groups[{groups[0]}]['lr_scale']"
            + (f" and {len(groups) - 1} more" if len(groups) > 1 else "")
            + ": timm's key, which timm's schedulers multiply into 'lr'; it is not this optimizer's argument lr_scale"
        )


def _lines(optimizer: Any) -> Iterator[tuple[str, ...]]:
    defaults = optimizer.defaults if isinstance(optimizer, FusedOptimizer) else {}
    places = parameters([{**defaults, **group} for group in optimizer.param_groups])
    for index, place in enumerate(places):
        group, param = place.group, place.param
        lr_scale = weight_decay_scale = 1.0
        backend = "-"
        tensors = getattr(optimizer, "state", {}).get(param) or {}
        found = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
        state = [(key, value.dtype, local(value).numel()) for key, value in found.items()]
        if isinstance(optimizer, FusedOptimizer):
            row, _ = row_of(place, optimizer, optimizer.options, index)
            lr_scale, weight_decay_scale = row.lr_scale, row.weight_decay_scale
            backend = row.backend if row.native else "eager"
            first = _first_state(optimizer, optimizer.options, group, row)
            state += [entry for entry in first if entry[0] not in found]
        yield (
            place.name if place.own_name is None else place.own_name,
            "not known" if is_lazy(param) else str(tuple(param.shape)),
            _word(param.dtype),
            _product(group.get("lr"), lr_scale),
            _product(group.get("weight_decay"), weight_decay_scale),
            _state_cell(state),
            f"{sum(dtype.itemsize * numel for _, dtype, numel in state):,}",
            backend,
        )


def _first_state(
    rule: Rule, options: Options, group: dict[str, Any], row: Row
) -> Iterator[tuple[str, torch.dtype, int]]:
    """The states that a first step makes: name, dtype, elements."""
    param = row.param
    numel = 0 if is_lazy(param) else local(param).numel()
    for key in rule.state_names(group):
        dtype = formats.format_of(key, param, options)
        yield key, dtype, numel
        if dtype in formats.CODES.values():
            yield formats.scale_key(key), torch.uint8, numel // codec.GROUP
    for key in states.number_names(row, group, rule):
        yield key, states.number_dtype(key, param), 1
    if row.master is not None and options.master_weights is not None:
        yield row.master, masters.DTYPES[options.master_weights], numel


def _state_cell(state: Iterable[tuple[str, torch.dtype, int]]) -> str:
    by_dtype: dict[torch.dtype, list[str]] = {}
    for key, dtype, _ in sorted(state, key=lambda entry: (entry[0] == "step", entry[0])):
        by_dtype.setdefault(dtype, []).append(key)
    return "; ".join(f"{_word(dtype)}: {', '.join(keys)}" for dtype, keys in by_dtype.items()) or "-"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product(value: Any, scale: float) -> str:
    return "-" if not is_number(value) else f"{float(value) * scale:.6g}"
