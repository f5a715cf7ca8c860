"""describe(): the table says what the step then does."""

from __future__ import annotations

import io
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import describe


def table(optimizer: Any) -> tuple[str, list[dict[str, str]]]:
    """The first line, and a dict a parameter."""
    file = io.StringIO()
    describe(optimizer, file=file)
    title, *lines = file.getvalue().splitlines()
    assert file.getvalue().endswith("\n")
    while not lines[0].startswith("parameter  "):  # what stands above the table
        lines.pop(0)
    headings, *lines = lines
    # Columns are at least two spaces apart; no cell holds two spaces.
    keys = re.split(r"  +", headings.strip())
    return title, [dict(zip(keys, re.split(r"  +", line.strip()), strict=True)) for line in lines]


def bytes_of(optimizer: torch.optim.Optimizer, param: Tensor) -> int:
    return sum(value.element_size() * value.numel() for value in optimizer.state[param].values())


def named(dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    shapes = {"0.weight": (30, 50), "0.bias": (30,), "scale": ()}
    return [(name, Parameter(torch.ones(shape, dtype=dtype))) for name, shape in shapes.items()]


OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "float32": (torch.float32, {}, "float32: exp_avg, exp_avg_sq, step"),
    "float64": (torch.float64, {}, "float64: exp_avg, exp_avg_sq; float32: step"),
    "bfloat16": (torch.bfloat16, {}, "bfloat16: exp_avg, exp_avg_sq; float32: step"),
    "complex64": (torch.complex64, {}, "complex64: exp_avg, exp_avg_sq; float32: step"),
    "amsgrad": (torch.float32, {"amsgrad": True}, "float32: exp_avg, exp_avg_sq, max_exp_avg_sq, step"),
    "wide": (torch.float16, {"state_dtype": torch.float32}, "float32: exp_avg, exp_avg_sq, step"),
    "master": (
        torch.float16,
        {"master_weights": "float32"},
        "float32: exp_avg, exp_avg_sq, master_param, step",
    ),
    "split": (
        torch.bfloat16,
        {"master_weights": "split"},
        "float32: exp_avg, exp_avg_sq, step; int16: param_remainder",
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_states_before_the_first_step_are_those_after_it(option: str) -> None:
    dtype, options, state = OPTIONS[option]
    parameters = named(dtype)
    optimizer = fused_optim.AdamW(parameters, **options)
    before = table(optimizer)
    assert not optimizer.state, "describe made a state"
    for _, param in parameters:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert table(optimizer) == before
    title, rows = before
    assert [row["state"] for row in rows] == [state] * 3
    sizes = [bytes_of(optimizer, param) for _, param in parameters]
    assert [int(row["bytes"].replace(",", "")) for row in rows] == sizes
    assert title == f"AdamW: 3 parameters of 1,531 elements in 1 group; {sum(sizes):,} bytes of state"
    assert [row["dtype"] for row in rows] == [option if dtype == torch.complex64 else str(dtype)[6:]] * 3
    assert [row["shape"] for row in rows] == ["(30, 50)", "(30,)", "()"]
    assert [row["backend"] for row in rows] == ["eager" if dtype == torch.complex64 else "cpu"] * 3


def test_rates_are_those_of_the_groups_times_the_factors() -> None:
    parameters = named(torch.float32)
    optimizer = fused_optim.AdamW(
        [{"params": parameters[:1], "lr": torch.tensor(0.5)}, {"params": parameters[1:], "weight_decay": 0.25}],
        lr=1e-3,
        weight_decay=0.1,
        lr_scale={"0.*": 0.5, "scale": 0.0},
        weight_decay_scale=fused_optim.matrices_only,
    )
    title, rows = table(optimizer)
    assert "in 2 groups" in title
    assert [row["parameter"] for row in rows] == ["0.weight", "0.bias", "scale"]
    assert [row["lr"] for row in rows] == ["0.25", "0.0005", "0"]
    assert [row["weight decay"] for row in rows] == ["0.1", "0", "0"]
    optimizer.param_groups[0]["lr"] = 1.0
    assert table(optimizer)[1][0]["lr"] == "0.5"


def test_ratios_of_layers_show() -> None:
    layers = [(f"encoder.layers.{layer}.weight", Parameter(torch.ones(2, 2))) for layer in range(2)]
    optimizer = fused_optim.AdamWDL(
        layers, 1.0, layerwise_decay=0.5, n_layers=2, apply_decay_param_fun=lambda name: "0" in name, weight_decay=0.5
    )
    title, rows = table(optimizer)
    assert title.startswith("AdamWDL: ")
    assert [(row["lr"], row["weight decay"]) for row in rows] == [("0.25", "0.5"), ("0.5", "0")]


def test_parameters_without_names_have_their_place() -> None:
    optimizer = fused_optim.AdamW([{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))]}])
    assert [row["parameter"] for row in table(optimizer)[1]] == [
        "param_groups[0]['params'][0]",
        "param_groups[1]['params'][0]",
    ]


def test_odd_parameters_are_served_by_the_eager_path() -> None:
    params = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4)[:, 0])]
    assert [row["backend"] for row in table(fused_optim.AdamW(params))[1]] == ["cpu", "eager"]
    assert [row["backend"] for row in table(fused_optim.AdamW(params, backend="eager"))[1]] == ["eager", "eager"]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameter_without_shape() -> None:
    optimizer = fused_optim.AdamW(torch.nn.LazyLinear(3).named_parameters())
    row = table(optimizer)[1][0]
    assert (row["shape"], row["bytes"], row["backend"]) == ("not known", "4", "eager")


def test_wrappers_and_other_optimizers() -> None:
    inner = fused_optim.AdamW(named(torch.float32))
    title, rows = table(inner)
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner, param_groups=inner.param_groups))
    assert table(wrapper) == ("SimpleNamespace around SimpleNamespace around " + title, rows)

    param = Parameter(torch.ones(3))
    torchs = torch.optim.SGD([param], lr=0.5, momentum=0.9)
    before = {"lr": "0.5", "weight decay": "0", "state": "-", "bytes": "0", "backend": "-"}
    assert table(torchs)[1][0].items() >= before.items()
    param.grad = torch.ones(3)
    torchs.step()
    assert table(torchs)[1][0].items() >= (before | {"state": "float32: momentum_buffer", "bytes": "12"}).items()
    assert table(torch.optim.Rprop([param], lr=0.5))[1][0]["weight decay"] == "-"
    assert table(SimpleNamespace(param_groups=[]))[1] == []


def test_columns_are_aligned_and_it_prints_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = fused_optim.AdamW(named(torch.float32))
    describe(optimizer)
    _, headings, *lines = capsys.readouterr().out.splitlines()
    assert {line.index("float32") for line in lines} == {headings.index("dtype")}
    ends = {headings.index("bytes") + len("bytes")}
    assert {line.index("  cpu") for line in lines} == ends


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="describe takes an optimizer with param_groups, got Linear"):
        describe(torch.nn.Linear(2, 2))


def everything(name: str, param: Tensor) -> bool:
    return True


SHOWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "global norm": (
        {"grad_clip": fused_optim.ClipGradByGlobalNorm(1.0)},
        ["grad_clip: ClipGradByGlobalNorm(1.0)"],
    ),
    "norm": (
        {"grad_clip": fused_optim.ClipGradByNorm(2.0, need_clip=everything)},
        ["grad_clip: ClipGradByNorm(2.0, need_clip=everything)"],
    ),
    "value": ({"grad_clip": fused_optim.ClipGradByValue(3.0, -1.0)}, ["grad_clip: ClipGradByValue(3.0, -1.0)"]),
    "masters": ({"master_weights": "split"}, ["master_weights: split"]),
    "states": ({"state_dtype": torch.float32}, ["state_dtype: torch.float32"]),
    "both": (
        {"master_weights": "split", "state_dtype": torch.bfloat16},
        ["master_weights: split", "state_dtype: torch.bfloat16"],
    ),
    "patterns": ({"lr_scale": {"0.*": 0.5}}, ["lr_scale: {'0.*': 0.5}"]),
    "sequence": ({"lr_scale": [1.0, 0.5, 0.25]}, ["lr_scale: 3 factors"]),
    "functions": (
        {"lr_scale": lambda name, param: 0.5, "weight_decay_scale": fused_optim.matrices_only},
        ["lr_scale: a function", "weight_decay_scale: matrices_only"],
    ),
    "lazy": ({"lazy_mode": True}, ["lazy_mode: True"]),
}


def test_repr_and_the_table_show_the_options_of_matrices() -> None:
    optimizer = fused_optim.Muon(
        [torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(2, 3, 2))],
        heads=[2, 1],
        flatten=True,
        ns_dtype=torch.float32,
    )
    lines = ["flatten: True", "ns_dtype: torch.float32", "heads: 2 factors"]
    text = repr(optimizer).splitlines()
    assert text[text.index("backend: cpu") + 1 :] == [*lines, ")"]
    out = io.StringIO()
    describe(optimizer, file=out)
    assert out.getvalue().splitlines()[1:4] == lines


@pytest.mark.parametrize("case", SHOWN)
def test_repr_and_the_table_show_every_option_that_is_not_the_default(case: str) -> None:
    options, lines = SHOWN[case]
    optimizer = fused_optim.AdamW(named(torch.bfloat16), **options)
    text = repr(optimizer).splitlines()
    assert text[text.index("backend: cpu") + 1 :] == [*lines, ")"]
    out = io.StringIO()
    describe(optimizer, file=out)
    assert out.getvalue().splitlines()[1 : 1 + len(lines)] == lines
    forced = repr(fused_optim.AdamW(named(torch.bfloat16), backend="eager", **options)).splitlines()
    assert forced[forced.index("backend: eager (forced)") + 1 :] == [*lines, ")"]


def test_exclusions_show() -> None:
    optimizer = fused_optim.LAMB(named(torch.float32), exclude=["*.bias", "scale"])
    assert "exclude: ['*.bias', 'scale']" in repr(optimizer).splitlines()


def test_a_pickled_function_shows_as_what_is_left_of_it() -> None:
    optimizer = fused_optim.AdamW(named(torch.float32), lr_scale=everything)
    assert "lr_scale: the factors that were pickled" in repr(pickle.loads(pickle.dumps(optimizer))).splitlines()


def test_ratios_of_layers_show_in_the_options() -> None:
    layers = [(f"encoder.layers.{layer}.weight", Parameter(torch.ones(2, 2))) for layer in range(2)]
    optimizer = fused_optim.AdamWDL(layers, 1.0, layerwise_decay=0.5, n_layers=2, lr_scale={"*": 0.5})
    (line,) = [line for line in repr(optimizer).splitlines() if line.startswith("lr_scale")]
    assert "lr_scale ({'*': 0.5})" in line
    assert " times " in line


def test_a_group_key_of_timm_is_marked() -> None:
    groups = [{"params": [param], "lr_scale": 0.5} for _, param in named(torch.float32)]
    out = io.StringIO()
    describe(fused_optim.AdamW(groups), file=out)
    line = "param_groups[0]['lr_scale'] and 2 more: timm's key, which timm's schedulers multiply into 'lr'; it is not "
    assert line + "this optimizer's argument lr_scale" in out.getvalue().splitlines()


NO_MASTER = "master_weights={} has no effect: no parameter is float16 or bfloat16"
NOT_ROUNDED = "rounding='stochastic' has no effect: no state, and no parameter without a master weight, has 16 bits"


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (torch.float32, {"master_weights": "split"}, NO_MASTER.format("'split'")),
        (torch.float64, {"master_weights": "float32"}, NO_MASTER.format("'float32'")),
        (torch.float32, {"rounding": "stochastic"}, NOT_ROUNDED),
        (torch.float32, {"rounding": "stochastic", "state_dtype": "8bit"}, NOT_ROUNDED),
        (torch.bfloat16, {"rounding": "stochastic", "master_weights": "split8"}, NOT_ROUNDED),
        (torch.bfloat16, {"rounding": "stochastic"}, None),
        (torch.float16, {"rounding": "stochastic", "state_dtype": torch.float32}, None),
        (torch.float32, {"rounding": "stochastic", "state_dtype": {"exp_avg": torch.bfloat16}}, None),
        (torch.float32, {"state_dtype": torch.bfloat16}, None),
        (torch.bfloat16, {"master_weights": "split"}, None),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}, None),
    ],
)
def test_an_option_without_effect_is_said_once(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, options: dict[str, Any], said: str | None
) -> None:
    optimizer = fused_optim.AdamW(named(dtype), **options)
    optimizer.add_param_group({"params": [("more", Parameter(torch.ones(2, dtype=dtype)))]})
    lines = [record.getMessage() for record in caplog.records]
    lines = [line for line in lines if "wider than 8 bits" not in line]
    assert lines == ([] if said is None else [f"AdamW: {said}"])
