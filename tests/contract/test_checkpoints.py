"""Checkpoints: to and from torch.optim, apex and DeepSpeed, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    ROWS,
    Case,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    device_of,
    each_adam,
    each_adam_variant,
    each_adamw,
    each_case,
    each_dtype,
    each_implementation,
    each_implementation_daily,
    each_kind,
    new_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fused_optim
from fused_optim.state import masters

FEW = [(5,), (3, 4), (), (0,)]


def trained(case: Case, backend: str, variant: str = "all", steps: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, variant, backend=backend, **options)
    train(optimizer, params, steps)
    return optimizer, params


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Resuming -------------------------------------------------------------------------------------------------------


@each_implementation
@each_dtype
@each_adam_variant
def test_resumed_run_equals_the_uninterrupted_one(case: Case, variant: str, dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend)
    params = new_params(dtype, device=device)
    optimizer = case.make(params, variant, backend=backend)
    train(optimizer, params, 3)
    saved = through_file(optimizer.state_dict())
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = case.make(twins, variant, backend=backend)
    resumed.load_state_dict(saved)
    assert_same_results(optimizer, resumed)
    train(optimizer, params, 2, first=3)
    train(resumed, twins, 2, first=3)
    assert_same_results(optimizer, resumed)


@each_implementation
@each_adamw
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("same_option", [True, False])
def test_wide_states_of_narrow_parameters_survive(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype | None, same_option: bool, backend: str
) -> None:
    """torch casts them to the parameter's dtype on load, and loses 16 of their bits."""
    params = new_params(dtype, device=device_of(backend))
    optimizer = case.make(params, "all", backend=backend, state_dtype=state_dtype)
    train(optimizer, params, 3)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = case.make(twins, "all", backend=backend, state_dtype=state_dtype if same_option else None)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, params, 2, first=3)
    train(resumed, twins, 2, first=3)
    assert_same_results(optimizer, resumed)
    assert resumed.state[twins[0]]["exp_avg"].dtype == state_dtype or dtype


@each_implementation
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loading_shares_no_memory_and_keeps_dtypes(case: Case, dtype: torch.dtype, backend: str) -> None:
    params = new_params(dtype, FEW, device=device_of(backend))
    optimizer = case.make(params, "all", backend=backend)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, "all", backend=backend)
    other.load_state_dict(saved)
    train(other, twins, 2, first=2)
    assert saved["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert_same_bits(saved["state"][key][name], value, name)
            assert other.state[twins[key]][name].dtype == value.dtype


@each_implementation
@each_case
def test_own_state_dict_loaded_back(case: Case, backend: str) -> None:
    """The state dict holds the live tensors; loading it must not tie two of them together."""
    optimizer, params = trained(case, backend)
    twin, twins = trained(case, backend)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 2, first=3)
    train(twin, twins, 2, first=3)
    assert_same_results(optimizer, twin)


@each_implementation
@each_kind
def test_load_replaces_what_the_plan_knew(case: Case, backend: str) -> None:
    """Rolling back in place, and the old state tensors are never written again."""
    optimizer, params = trained(case, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    start = [param.detach().clone() for param in params]
    train(optimizer, params, 3, first=3)
    expected = snapshot(optimizer)
    old = [value for state in optimizer.state.values() for value in state.values()]
    before = [value.clone() for value in old]
    optimizer.load_state_dict(saved)
    for param, value in zip(params, start, strict=True):
        param.data.copy_(value)
    train(optimizer, params, 3, first=3)
    assert_same_snapshots(snapshot(optimizer), expected)
    for value, copied in zip(old, before, strict=True):
        assert_same_bits(value, copied)


@each_implementation
@each_kind
def test_hyperparameters_come_from_the_checkpoint(case: Case, backend: str) -> None:
    optimizer, _ = trained(case, backend, lr=0.125)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    fresh = case.make(new_params(shapes=FEW), backend=backend)
    fresh.load_state_dict(optimizer.state_dict())
    group = {key: value for key, value in fresh.param_groups[0].items() if key != "params"}
    assert group == {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert fresh.backend == backend


@each_kind
def test_backend_is_not_in_the_checkpoint(case: Case) -> None:
    optimizer, _ = trained(case, "eager")
    assert "backend" not in optimizer.param_groups[0]
    other = case.make(new_params(shapes=FEW), backend="cpu")
    other.load_state_dict(optimizer.state_dict())
    assert other.backend == "cpu"


@each_implementation
@each_adamw
@pytest.mark.parametrize("kind", [np.array, np.float64, np.int64, int, lambda value: torch.tensor([value])])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_step_may_be_any_number(case: Case, kind: Callable[[int], Any], loaded: bool, backend: str) -> None:
    """An array of no dimension, as a tree of tensors becomes by Tensor.numpy(), among them."""
    optimizer, params = trained(case, backend)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, "all", backend=backend)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = kind(int(state["step"]))
    if loaded:
        other.load_state_dict(saved)
        assert_same_results(optimizer, other)
    else:
        other.state.update({twins[key]: state for key, state in saved["state"].items()})
    train(optimizer, params, 2, first=3)
    train(other, twins, 2, first=3)
    for one, two in zip(params, twins, strict=True):
        assert_same_bits(one, two)


@each_implementation
@each_kind
def test_tensor_lr_comes_back(case: Case, backend: str) -> None:
    optimizer, params = trained(case, backend, lr=torch.tensor(0.125))
    saved = through_file(optimizer.state_dict())
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, backend=backend)
    other.load_state_dict(saved)
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    train(optimizer, params, 2, first=3)
    train(other, twins, 2, first=3)
    assert_same_results(optimizer, other)


@each_implementation
@each_kind
def test_parameters_without_state(case: Case, backend: str) -> None:
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, backend=backend)
    set_grads(params[:2], 0)
    optimizer.step()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state) == set(twins[:2])
    train(optimizer, params, 2)
    train(other, twins, 2)
    assert_same_results(optimizer, other)


@each_implementation
@each_kind
def test_other_keys_of_the_state_are_kept(case: Case, backend: str) -> None:
    optimizer, params = trained(case, backend)
    optimizer.state[params[0]]["note"] = "kept"
    optimizer.state[params[0]]["extra"] = torch.arange(3)
    other = case.make(new_params(shapes=FEW), "all", backend=backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = other.state[other.param_groups[0]["params"][0]]
    assert state["note"] == "kept"
    assert torch.equal(state["extra"], torch.arange(3))
    assert torch.equal(through_file(other.state_dict())["state"][0]["extra"], torch.arange(3))


# torch.optim, both ways -----------------------------------------------------------------------------------------


@each_implementation
@each_adam_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpoint_of_torchs(case: Case, variant: str, dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend)
    params = new_params(dtype, device=device)
    reference = case.make_reference(params, variant)
    train(reference, params, 3)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = case.make(twins, backend=backend)
    optimizer.load_state_dict(through_file(reference.state_dict()))
    assert_same_snapshots(snapshot(optimizer), snapshot(reference))
    train(reference, params, 2, first=3)
    train(optimizer, twins, 2, first=3)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-2
    for mine, theirs in zip(snapshot(optimizer), snapshot(reference), strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(
                value, theirs[name], rtol=tolerance, atol=tolerance, equal_nan=variant == "zero eps"
            )


@each_implementation
@each_adam_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpoint_goes_to_torchs(case: Case, variant: str, dtype: torch.dtype, backend: str) -> None:
    params = new_params(dtype, device=device_of(backend))
    optimizer = case.make(params, variant, backend=backend)
    train(optimizer, params, 3)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    reference = case.reference(twins)
    reference.load_state_dict(through_file(optimizer.state_dict()))
    for mine, theirs in zip(snapshot(optimizer), snapshot(reference), strict=True):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            assert_same_bits(value, theirs[name], name)
    train(optimizer, params, 2, first=3)
    train(reference, twins, 2, first=3)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-2
    for mine, theirs in zip(snapshot(optimizer), snapshot(reference), strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(
                value, theirs[name], rtol=tolerance, atol=tolerance, equal_nan=variant == "zero eps"
            )


@each_implementation
@each_adam
@pytest.mark.parametrize("fused", [True, None])
def test_checkpoint_of_torchs_fused_optimizer(case: Case, fused: bool | None, backend: str) -> None:
    params = new_params(shapes=FEW[:3])
    reference = case.reference(params, fused=fused)
    train(reference, params, 2)
    optimizer = case.make(params, backend=backend)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["fused"] is fused
    before = snapshot(optimizer)
    train(optimizer, params, 1, first=2)
    assert [int(entry["step"]) for entry in snapshot(optimizer)] == [3, 3, 3]
    assert not torch.equal(before[0]["param"], params[0])


@each_implementation
def test_decoupled_weight_decay_of_the_class_or_the_checkpoint(backend: str) -> None:
    """AdamW stays AdamW whatever the checkpoint says; Adam obeys it. So do torch's."""
    import fused_optim

    for mine, theirs in ((fused_optim.AdamW, torch.optim.AdamW), (fused_optim.Adam, torch.optim.Adam)):
        for source in (torch.optim.AdamW, torch.optim.Adam):
            params = new_params(shapes=FEW)
            saved = source(params, weight_decay=0.1)
            train(saved, params, 1)
            state_dict = saved.state_dict()
            expected = theirs(params)
            expected.load_state_dict(state_dict)
            optimizer = mine(params, backend=backend)
            optimizer.load_state_dict(copy.deepcopy(state_dict))
            flag = optimizer.param_groups[0]["decoupled_weight_decay"]
            assert flag is expected.param_groups[0]["decoupled_weight_decay"]
            del state_dict["param_groups"][0]["decoupled_weight_decay"]  # torch before 2.6 had no such key
            optimizer.load_state_dict(copy.deepcopy(state_dict))
            expected.load_state_dict(state_dict)
            train(optimizer, params, 1, first=1)


# apex and DeepSpeed ---------------------------------------------------------------------------------------------


@each_implementation
@each_adamw
@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5.0), torch.tensor([5], dtype=torch.int32)], ids=str)
def test_step_of_the_group(case: Case, step: Any, backend: str) -> None:
    """apex's FusedAdam keeps the step in the group; DeepSpeed's too, beside moments of its own dtype."""
    optimizer, params = trained(case, backend, "decay", steps=5)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["step"]
    group = saved["param_groups"][0]
    saved["param_groups"][0] = {
        "params": group["params"],
        "lr": group["lr"],
        "bias_correction": True,
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "step": step,
    }
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, backend=backend)
    other.load_state_dict(saved)
    assert [other.state[param]["step"].item() for param in twins] == [5.0] * len(twins)
    assert "step" not in other.param_groups[0]
    assert not torch.is_tensor(step) or saved["param_groups"][0]["step"] is step
    train(optimizer, params, 2, first=5)
    train(other, twins, 2, first=5)
    for mine, theirs in zip(snapshot(optimizer), snapshot(other), strict=True):
        for name, value in mine.items():
            assert_same_bits(value, theirs[name], name)


@each_implementation
@each_adamw
def test_step_count_as_a_number(case: Case, backend: str) -> None:
    """DeepSpeed's CPU Adam and torch before 1.12 keep a Python int per parameter."""
    optimizer, params = trained(case, backend, "decay")
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = case.make(twins, "decay", backend=backend)
    other.load_state_dict(saved)
    train(optimizer, params, 2, first=3)
    train(other, twins, 2, first=3)
    assert_same_results(optimizer, other)


@each_implementation
@each_adam
def test_checkpoint_without_bias_correction_is_refused(case: Case, backend: str) -> None:
    optimizer, _ = trained(case, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["bias_correction"] = False
    with pytest.raises(ValueError, match=r"param_groups\[0\].*bias_correction=False"):
        optimizer.load_state_dict(saved)


@each_implementation
@each_adamw
def test_group_key_step_without_state(case: Case, backend: str) -> None:
    """DeepSpeed puts it there when it creates the optimizer; it is no reason to skip bias correction."""
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    optimizer, other = case.make(params, backend=backend), case.make(twins, backend=backend)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = 0
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2)
    train(other, twins, 2)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin)


# Group keys -----------------------------------------------------------------------------------------------------


@each_implementation
@each_kind
def test_unknown_and_missing_group_keys(case: Case, backend: str) -> None:
    optimizer, params = trained(case, backend, "default")
    twin, twins = trained(case, backend, "default")
    saved = copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    saved["param_groups"][0] = {"params": group["params"], "lr": group["lr"], "unknown": [1, 2], "name": "x"}
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["unknown"] == [1, 2]
    train(optimizer, params, 2, first=3)
    train(twin, twins, 2, first=3)
    assert_same_results(optimizer, twin)


# Refusals -------------------------------------------------------------------------------------------------------


def _no_state(saved: dict[str, Any]) -> None:
    del saved["state"]


def _no_groups(saved: dict[str, Any]) -> None:
    del saved["param_groups"]


def _no_params(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["params"]


def _fewer_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def _fewer_params(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


def _no_moment(saved: dict[str, Any]) -> None:
    del saved["state"][1]["exp_avg_sq"]


def _no_step(saved: dict[str, Any]) -> None:
    del saved["state"][2]["step"]


def _wrong_shape(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(4, 3)


def _flat_moment(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg"] = torch.zeros(12)


def _momentum_buffer(saved: dict[str, Any]) -> None:
    saved["state"] = {key: {"momentum_buffer": torch.zeros(1)} for key in saved["state"]}


def _no_tensor(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = 0.5


def _long_step(saved: dict[str, Any]) -> None:
    saved["state"][0]["step"] = torch.zeros(2)


def _bare_state(saved: dict[str, Any]) -> None:
    saved["state"][1] = torch.zeros(3, 4)


def _listed_states(saved: dict[str, Any]) -> None:
    saved["state"] = list(saved["state"].values())


def _numbered_state(saved: dict[str, Any]) -> None:
    saved["state"][1] = {0: torch.zeros(3, 3), "preconditioner": torch.zeros(3, 3)}


def _full_step(saved: dict[str, Any]) -> None:
    saved["state"][1]["step"] = torch.full((3, 4), 0.625)


def _tensors_step(saved: dict[str, Any]) -> None:
    saved["state"][1]["step"] = [torch.full((3, 4), 0.625)]


def _text_step(saved: dict[str, Any]) -> None:
    saved["state"][0]["step"] = "three"


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no state": (_no_state, "'state'"),
    "no groups": (_no_groups, "'param_groups'"),
    "no params": (_no_params, r"param_groups\[0\].*'params'"),
    "fewer groups": (_fewer_groups, "different number of parameter groups"),
    "fewer params": (_fewer_params, "doesn't match the size of optimizer's group"),
    "no moment": (_no_moment, r"'exp_avg_sq'.*param_groups\[0\]\['params'\]\[1\]"),
    "no step": (_no_step, r"'step'.*param_groups\[1\]\['params'\]\[0\]"),
    "wrong shape": (_wrong_shape, r"'exp_avg'.*param_groups\[0\]\['params'\]\[1\].*\(4, 3\).*\(3, 4\)"),
    "flat moment": (_flat_moment, r"'exp_avg'.*\(12,\).*\(3, 4\)"),
    "another optimizer's": (_momentum_buffer, "'exp_avg'.*momentum_buffer"),
    "no tensor": (_no_tensor, "'exp_avg'"),
    "long step": (_long_step, r"'?step'?.*param_groups\[0\]\['params'\]\[0\]"),
    "text step": (_text_step, r"'?step'?.*param_groups\[0\]\['params'\]\[0\]"),
    "bare state": (_bare_state, r"the state of .*\[1\] in the state dict is a Tensor of shape \(3, 4\), not a dict"),
    "listed states": (_listed_states, "'state'"),
    "numbered state": (_numbered_state, r"'exp_avg'.*it has \['0', 'preconditioner'\]"),
    "full step": (_full_step, r"'step'.*found a Tensor of shape \(3, 4\)"),
    "tensors for a step": (_tensors_step, r"'step'.*found \[a Tensor of shape \(3, 4\)\]"),
}


@each_implementation
@each_adamw
@pytest.mark.parametrize("damage", REFUSED)
def test_damaged_checkpoint_is_refused_and_nothing_changes(case: Case, damage: str, backend: str) -> None:
    def make() -> tuple[Any, list[Any]]:
        params = new_params(shapes=FEW, device=device_of(backend))
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
        optimizer = case.make(groups, "decay", backend=backend)
        train(optimizer, params, 2)
        return optimizer, params

    (optimizer, params), (twin, twins) = make(), make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"] + 1
    break_it, text = REFUSED[damage]
    break_it(saved)
    before = snapshot(optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=text) as caught:
        optimizer.load_state_dict(saved)
    assert "0.625" not in str(caught.value)
    assert_same_snapshots(snapshot(optimizer), before)
    assert optimizer.param_groups == groups
    train(optimizer, params, 2, first=2)
    train(twin, twins, 2, first=2)
    assert_same_results(optimizer, twin)


@each_implementation
@each_adamw
def test_refusal_names_the_parameter(case: Case, backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = case.make(model.named_parameters(), backend=backend)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"'exp_avg'.*'bias'"):
        optimizer.load_state_dict(saved)


OURS: dict[str, Callable[..., Any]] = {
    "Adam": fused_optim.Adam,
    "AdamW": fused_optim.AdamW,
    "AdamWDL": fused_optim.AdamWDL,
    "SGD": lambda params, **options: fused_optim.SGD(params, momentum=0.9, **options),
    "LARS": fused_optim.LARS,
    "LAMB": fused_optim.LAMB,
    "Lion": fused_optim.Lion,
    "Muon": fused_optim.Muon,
    "NovoGrad": fused_optim.NovoGrad,
}
THEIRS = {name: getattr(torch.optim, name) for name in torch.optim.__all__ if name not in ("Optimizer", "LBFGS")}
FOREIGN: dict[str, Callable[..., Any]] = {
    **{f"fused {name}": make for name, make in OURS.items()},
    **{name: kind for name, kind in THEIRS.items() if isinstance(kind, type)},
    "SGD with momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("source", FOREIGN)
@pytest.mark.parametrize("target", OURS)
def test_another_optimizers_checkpoint_loads_or_is_refused_in_words(target: str, source: str, steps: int) -> None:
    """Not by what its tensors hold, and not when half of it has been loaded."""
    saving, loading = (new_params(shapes=[(3, 4), (40, 50)]) for _ in range(2))
    foreign = FOREIGN[source](saving)
    for step in range(steps):
        set_grads(saving, step)
        if source == "SparseAdam":
            for param in saving:
                param.grad = param.grad.to_sparse()
        foreign.step()
    optimizer = OURS[target](loading)
    train(optimizer, loading, 1)
    before, groups = snapshot(optimizer), [dict(group) for group in optimizer.param_groups]
    refused = None
    try:
        optimizer.load_state_dict(foreign.state_dict())
    except (ValueError, TypeError) as error:
        refused = str(error)
    if refused is not None:
        assert "tensor" not in refused
        assert len(refused) < 400
        assert_same_snapshots(snapshot(optimizer), before)
        assert optimizer.param_groups == groups
    train(optimizer, loading, 1)
    assert all(param.isfinite().all() for param in loading)


# TransformerEngine ----------------------------------------------------------------------------------------------


def as_transformer_engine(saved: dict[str, Any], dtype: torch.dtype = torch.int16) -> dict[str, Any]:
    """As its FusedAdam writes the same run with store_param_remainders: steps by group, and its name of a remainder."""
    saved = copy.deepcopy(saved)
    steps = set()
    for state in saved["state"].values():
        steps.add(int(state.pop("step")))
        state["master_param"] = state.pop("param_remainder").to(dtype)
    (saved["param_groups"][0]["step"],) = steps
    saved["param_groups"][0]["bias_correction"] = True
    return saved


@each_implementation_daily
@pytest.mark.parametrize("kind", ["split", "float32"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_remainder_of_transformer_engines_goes_on_bit_for_bit(kind: str, loaded: bool, backend: str) -> None:
    """Into "split" as it is, into "float32" put together; also where somebody has put it into the state."""
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "backend": backend}
    params = new_params(torch.bfloat16, FEW, device_of(backend))
    optimizer = fused_optim.AdamW(params, master_weights="split", **options)
    train(optimizer, params, 3)
    assert any(bool(state["param_remainder"].ne(0).any()) for state in optimizer.state.values())
    saved = as_transformer_engine(optimizer.state_dict())
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = fused_optim.AdamW(twins, master_weights=kind, **options)
    if loaded:
        other.load_state_dict(through_file(saved))
        remainders = [other.state[twin]["param_remainder"] for twin in twins]
        for param, remainder in zip(params, remainders, strict=True):
            assert_same_bits(remainder, optimizer.state[param]["param_remainder"])
    else:
        other.state.update({twins[key]: {"step": 3, **state} for key, state in saved["state"].items()})
    train(optimizer, params, 2, first=3)
    train(other, twins, 2, first=3)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin)
        assert set(other.state[twin]) == {"step", "exp_avg", "exp_avg_sq", masters.KEYS[kind]}
        whole, mine = (
            masters.read(one, state, next(key for key in masters.STATES if key in state))
            for one, state in ((param, optimizer.state[param]), (twin, other.state[twin]))
        )
        assert_same_bits(whole, mine)


def test_a_remainder_of_transformer_engines_without_master_weights() -> None:
    params = new_params(torch.bfloat16, FEW)
    optimizer = fused_optim.AdamW(params, master_weights="split")
    train(optimizer, params, 3)
    other = fused_optim.AdamW(params)
    other.load_state_dict(as_transformer_engine(optimizer.state_dict()))
    train(other, params, 1, first=3)
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in other.state.values())


@pytest.mark.parametrize("name", ["master_param", "param_remainder"])
def test_a_master_of_another_shape_is_refused_before_anything_changes(name: str) -> None:
    params = new_params(torch.bfloat16, FEW)
    optimizer = fused_optim.AdamW(params, master_weights="float32")
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][name] = torch.zeros(12, dtype=torch.float32 if name == "master_param" else torch.int16)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"{name!r} of .*\[1\] has shape \(12,\)"):
        optimizer.load_state_dict(saved)
    assert_same_snapshots(snapshot(optimizer), before)


# torch.distributed.checkpoint -----------------------------------------------------------------------------------


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def train_model(model: nn.Module, optimizer: Any, steps: int) -> None:
    params = list(model.parameters())
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each_implementation
@each_adamw
@pytest.mark.parametrize("source", ["ours", "torch's"])
@pytest.mark.parametrize("target", ["ours", "torch's"])
def test_distributed_checkpoint_state_dicts(case: Case, source: str, target: str, backend: str) -> None:
    def make(kind: str, model: nn.Module) -> Any:
        if kind == "ours":
            return case.make(model.parameters(), backend=backend)
        return case.make_reference(model.parameters())

    first, second = model_of(), model_of()
    saving, loading = make(source, first), make(target, second)
    train_model(first, saving, 3)
    second.load_state_dict(first.state_dict())
    saved = get_optimizer_state_dict(first, saving)
    before = [param.detach().clone() for param in second.parameters()]
    set_optimizer_state_dict(second, loading, copy.deepcopy(saved))
    for param, old in zip(second.parameters(), before, strict=True):
        assert_same_bits(param, old)
    assert_same_results(saving, loading)
    restored = get_optimizer_state_dict(second, loading)
    assert restored["state"].keys() == saved["state"].keys()
    assert restored["param_groups"] == saved["param_groups"]
    train_model(first, saving, 1)
    train_model(second, loading, 1)
    for param, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@each_implementation
@each_adam
def test_distributed_checkpoint_of_torchs_through_files(case: Case, backend: str, tmp_path: Any) -> None:
    """dcp.load raises for any key that torch did not write: the default optimizer adds none."""
    import torch.distributed.checkpoint as dcp

    first, second = model_of(), model_of()
    reference = case.make_reference(first.parameters())
    train_model(first, reference, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(first, reference)}, checkpoint_id=tmp_path, no_dist=True)
    second.load_state_dict(first.state_dict())
    optimizer = case.make(second.parameters(), backend=backend)
    wanted = {"optimizer": get_optimizer_state_dict(second, optimizer)}
    dcp.load(wanted, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(second, optimizer, wanted["optimizer"])
    assert_same_results(reference, optimizer)


@each_implementation
@each_kind
def test_loading_warns_not(case: Case, backend: str) -> None:
    optimizer, _ = trained(case, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(through_file(optimizer.state_dict()))


@each_implementation
@each_kind
def test_load_hooks_may_change_the_dict(case: Case, backend: str) -> None:
    """A pre-hook that replaces the dict is heard, and what it made is checked."""
    optimizer, params = trained(case, backend, "decay")
    saved = copy.deepcopy(optimizer.state_dict())
    damaged = {"state": {}, "param_groups": saved["param_groups"]}
    handle = optimizer.register_load_state_dict_pre_hook(lambda owner, state_dict: saved)
    twin, twins = trained(case, backend, "decay")
    optimizer.load_state_dict(damaged)
    handle.remove()
    train(optimizer, params, 2, first=3)
    train(twin, twins, 2, first=3)
    assert_same_results(optimizer, twin)
    optimizer.register_load_state_dict_pre_hook(lambda owner, state_dict: {"state": {}})
    with pytest.raises(ValueError, match="'param_groups'"):
        optimizer.load_state_dict(saved)


# Factors --------------------------------------------------------------------------------------------------------

KEY = "fused_optim_scales"
HALF = {"0.*": 0.5}


def with_factors(case: Case, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any]:
    model = model_of() if model is None else model
    optimizer = case.make(model.named_parameters(), **options)
    train_model(model, optimizer, 2)
    return model, optimizer


@each_kind
def test_factors_stand_in_the_checkpoint_where_one_is_not_1(case: Case) -> None:
    for options in ({}, {"lr_scale": {"0.*": 1.0}}, {"lr_scale": [1, 1.0, 1, 1], "weight_decay_scale": lambda n, p: 1}):
        assert with_factors(case, **options)[1].state_dict().keys() == {"state", "param_groups"}
    _, optimizer = with_factors(case, lr_scale=HALF, weight_decay_scale=fused_optim.matrices_only)
    _, plain = with_factors(case)
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups", KEY}
    assert saved[KEY] == {"lr_scale": {0: 0.5, 1: 0.5}, "weight_decay_scale": {1: 0.0, 3: 0.0}}
    for group, other in zip(saved["param_groups"], plain.state_dict()["param_groups"], strict=True):
        assert group.keys() == other.keys()
    assert saved["state"][0].keys() == plain.state_dict()["state"][0].keys()
    assert through_file(saved)[KEY] == saved[KEY]


@each_kind
def test_resuming_with_the_same_factors_warns_not(case: Case, fallbacks: list[str]) -> None:
    _, optimizer = with_factors(case, lr_scale=HALF)
    _, other = with_factors(case, lr_scale=lambda name, param: 0.5 * (1 + 1e-14) if name[0] == "0" else 1.0)
    _, torchs = with_factors(case)
    other.load_state_dict(through_file(optimizer.state_dict()))
    other.load_state_dict(torchs.state_dict())  # says nothing about factors
    assert fallbacks == []


@each_kind
@pytest.mark.parametrize("now", [{}, {"lr_scale": {"0.weight": 0.5, "0.bias": 0.25}}, {"weight_decay_scale": HALF}])
def test_resuming_with_other_factors_warns(case: Case, now: dict[str, Any], fallbacks: list[str]) -> None:
    model, optimizer = with_factors(case, lr_scale=HALF)
    twin, other = with_factors(case, copy.deepcopy(model), **now)
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(saved)
    (line,) = fallbacks
    assert line.startswith(f"WARNING: {case.name}: the checkpoint was written with other factors: lr_scale of '0.")
    weight = "lr_scale of '0.weight' (param_groups[0]['params'][0]) was 0.5 and is 1"
    assert (weight in line) == ("lr_scale" not in now)
    assert ("lr_scale of '0.bias' (param_groups[0]['params'][1]) was 0.5 and is 0.25" in line) == ("lr_scale" in now)
    assert ("weight_decay_scale of '0.weight'" in line) == ("weight_decay_scale" in now)
    assert "1.weight" not in line
    assert_same_snapshots(  # all else is loaded, and the factors stay the optimizer's
        [{**entry, "param": 0} for entry in snapshot(other)], [{**entry, "param": 0} for entry in snapshot(optimizer)]
    )
    train_model(twin, other, 1)
    assert other.state_dict().get(KEY, {}) != saved[KEY]


def test_long_warnings_are_cut(fallbacks: list[str]) -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(25)]
    saved = fused_optim.AdamW(params, lr_scale=[0.5] * 25).state_dict()
    fused_optim.AdamW(params).load_state_dict(saved)
    assert fallbacks[0].count("was 0.5 and is 1") == 20
    assert fallbacks[0].endswith("; and 5 more")


@each_adam
def test_checkpoint_with_factors_goes_to_torchs_and_back(case: Case) -> None:
    model, optimizer = with_factors(case, lr_scale=HALF)
    saved = copy.deepcopy(optimizer.state_dict())
    torchs = case.make_reference(model.named_parameters())
    torchs.load_state_dict(saved)
    assert_same_results(torchs, optimizer)
    assert torchs.state_dict().keys() == {"state", "param_groups"}
    train_model(model, torchs, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each_kind
def test_distributed_checkpoint_passes_factors_over(case: Case, fallbacks: list[str]) -> None:
    model, optimizer = with_factors(case, lr_scale=HALF)
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved.keys() == {"state", "param_groups"}
    twin = model_of()
    twin.load_state_dict(model.state_dict())
    other = case.make(twin.named_parameters())
    set_optimizer_state_dict(twin, other, copy.deepcopy(saved))
    assert_same_results(other, optimizer)
    assert fallbacks == []


@pytest.mark.parametrize("damaged", [None, 3, [], {"lr_scale": {}}])
def test_damaged_factors_load(damaged: Any) -> None:
    _, optimizer = with_factors(ROWS["AdamW"], lr_scale=HALF)
    optimizer.load_state_dict({**optimizer.state_dict(), KEY: damaged})
