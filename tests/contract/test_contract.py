"""The object: what code written for torch.optim may do with an optimizer."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    Case,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    device_of,
    each_adam,
    each_adamw,
    each_backend,
    each_case,
    each_implementation,
    each_implementation_daily,
    each_kind,
    each_twin,
    new_grad,
    new_params,
    params_of,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fused_optim
from fused_optim.plan import planner

FEW = [(5,), (3, 4), ()]


def start(
    case: Case, backend: str, variant: str = "decay", steps: int = 2, **options: Any
) -> tuple[Any, list[Parameter]]:
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, variant, backend=backend, **options)
    train(optimizer, params, steps)
    return optimizer, params


# Construction ---------------------------------------------------------------------------------------------------


@each_case
def test_is_a_torch_optimizer(case: Case) -> None:
    optimizer = case.make(new_params())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, fused_optim.FusedOptimizer)
    assert hasattr(type(optimizer).step, "hooked")  # torch's wrapper: profiler, schedulers and hooks patch through it


@each_twin
def test_defaults_are_torchs(case: Case) -> None:
    mine = case.optimizer([Parameter(torch.zeros(1))])
    theirs = case.reference([Parameter(torch.zeros(1))])
    assert mine.defaults == theirs.defaults
    assert list(mine.param_groups[0]) == list(theirs.param_groups[0])
    assert list(mine.state_dict()["param_groups"][0]) == list(theirs.state_dict()["param_groups"][0])


def raised(make: Callable[..., Any], **arguments: Any) -> tuple[type[Exception], str] | None:
    try:
        make([Parameter(torch.zeros(2))], **arguments)
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        pytest.param(case, arguments, id=f"{case.name}-{arguments}")
        for case in CASES
        for arguments in case.bad_arguments
    ],
)
def test_bad_arguments_raise_torchs_exceptions(case: Case, arguments: dict[str, Any]) -> None:
    expected = raised(case.reference, **arguments)
    assert expected is not None, "torch accepts this"
    got = raised(case.optimizer, **arguments)
    assert got is not None
    assert got[0] is expected[0]
    # A call's text names the class that refused it.
    assert got[1].replace("fused_optim.", "") == expected[1] or (expected[0] is TypeError and "unexpected" in got[1])


@each_twin
@pytest.mark.parametrize(
    "params",
    [
        [],
        torch.zeros(3),
        [torch.zeros(3), "text"],
        [{"params": {torch.zeros(3)}}],
        [torch.zeros(3, requires_grad=True) * 2],
        [{"lr": 1.0}],
        None,
    ],
    ids=["empty", "tensor", "no tensor", "set", "no leaf", "no params", "none"],
)
def test_bad_parameters_raise_torchs_exceptions(case: Case, params: Any) -> None:
    errors = []
    for make in (case.optimizer, case.reference):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the two are compared
            make(params)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@each_adam
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("fused", [None, True, False])
def test_foreach_and_fused_choose_nothing(case: Case, foreach: bool | None, fused: bool | None) -> None:
    if foreach and fused:
        with pytest.raises(RuntimeError):
            case.make(new_params(), foreach=foreach, fused=fused)
        return
    params, twins = new_params(), new_params()
    one = case.make(params, foreach=foreach, fused=fused)
    other = case.make(twins)
    train(one, params, 2)
    train(other, twins, 2)
    assert_same_results(one, other)
    assert one.backend == other.backend
    assert one.param_groups[0]["foreach"] is foreach
    assert one.param_groups[0]["fused"] is fused
    assert one.state_dict()["param_groups"][0]["fused"] is fused


@each_implementation
@each_adamw
def test_numpy_numbers_and_lists(case: Case, backend: str) -> None:
    mine, theirs = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    one = case.optimizer(
        mine,
        lr=np.float64(0.125),
        betas=[0.5, np.float64(0.75)],
        eps=np.float32(0.25),
        weight_decay=np.int64(1),
        backend=backend,
    )
    other = case.optimizer(theirs, lr=0.125, betas=(0.5, 0.75), eps=0.25, weight_decay=1.0, backend=backend)
    train(one, mine, 3)
    train(other, theirs, 3)
    assert_same_results(one, other)
    one.param_groups[0]["lr"] = np.float32(0.5)
    other.param_groups[0]["lr"] = 0.5
    train(one, mine, 1, first=3)
    train(other, theirs, 1, first=3)
    assert_same_results(one, other)


@each_implementation
@each_case
def test_named_parameters(case: Case, backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = case.make(model.named_parameters(), backend=backend)
    names = {name for name, _ in model.named_parameters()}
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == names
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"]
    assert {name for group in saved for name in group["param_names"]} == names


@each_case
def test_generator_and_groups(case: Case) -> None:
    params = new_params(shapes=FEW)
    optimizer = case.make((param for param in params), "default")
    assert set(params_of(optimizer)) == set(params)
    groups = ({"params": (p for p in [param]), "lr": 0.5} for param in params)
    assert [group["lr"] for group in case.make(groups).param_groups] == [0.5] * 3


@each_implementation
@each_adam
def test_representation_names_the_backend(case: Case, backend: str) -> None:
    optimizer, _ = start(case, backend)
    text = repr(optimizer)
    assert text.startswith(f"{case.name} (\nParameter Group 0")
    assert f"backend: {backend}" in text
    assert "weight_decay: 0.3" in text


@each_adam
def test_differentiable_with_fused_raises_torchs_error(case: Case) -> None:
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        case.make(new_params(), fused=True, differentiable=True)


# Hooks and closures ---------------------------------------------------------------------------------------------


@each_implementation
@each_kind
def test_hooks_run(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        set_grads(params, 9)
        optimizer.step()
        assert calls == ["global pre", "pre", "post", "global post"] or sorted(calls) == sorted(
            ["pre", "global pre", "post", "global post"]
        )
        calls.clear()
        optimizer.load_state_dict(optimizer.state_dict())
        assert calls == ["state_dict pre", "state_dict post", "load pre", "load post"]
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == []


@each_implementation
@each_kind
def test_hooks_run_once_around_the_step_of_a_subclass(case: Case, backend: str) -> None:
    class Louder(case.optimizer):  # type: ignore[misc,name-defined]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    params = new_params()
    optimizer, calls = Louder(params, backend=backend), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_grads(params, 1)
    optimizer.step()
    assert calls == ["pre", "post"]


@each_implementation
@each_adamw
def test_hooks_run_in_torchs_order(case: Case, backend: str) -> None:
    orders = []
    for make, options in ((case.make, {"backend": backend}), (case.make_reference, {})):
        params = new_params(shapes=FEW)
        optimizer = make(params, "default", **options)
        set_grads(params, 0)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, c=calls: c.append("first"))
        optimizer.register_step_pre_hook(lambda *_, c=calls: c.append("second"))
        optimizer.register_step_post_hook(lambda *_, c=calls: c.append("post"))
        optimizer.step()
        orders.append(calls)
    assert orders[0] == orders[1] == ["first", "second", "post"]


@each_implementation
@each_kind
def test_pre_hook_may_make_the_gradients(case: Case, backend: str) -> None:
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    optimizer, other = (case.make(p, backend=backend) for p in (params, twins))
    optimizer.register_step_pre_hook(lambda *_: set_grads(params, 4))
    set_grads(twins, 4)
    optimizer.step()
    other.step()
    assert_same_results(optimizer, other)


@each_implementation
@each_kind
def test_step_shows_in_the_profiler(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    set_grads(params, 9)
    # Without acc_events torch 2.11 warns, once a process, that a cycle clears the events of the last.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        optimizer.step()
    assert f"Optimizer.step#{case.name}.step" in {event.key for event in profile.key_averages()}


@each_implementation
@each_kind
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_closure_runs_once_with_gradients_enabled(case: Case, grad_enabled: bool, backend: str) -> None:
    optimizer, params = start(case, backend)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((param.square().sum() for param in params), torch.zeros(()))
        loss.backward()
        return loss

    before = snapshot(optimizer)
    with torch.set_grad_enabled(grad_enabled):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() is grad_enabled
    assert calls == [True]
    assert loss == sum(entry["param"].square().sum() for entry in before)
    assert not torch.equal(params[0], before[0]["param"])


@each_implementation
@each_kind
def test_step_without_closure_returns_none(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    set_grads(params, 9)
    assert optimizer.step() is None
    with torch.inference_mode(False), torch.no_grad():
        assert optimizer.step(None) is None


@each_implementation
@each_kind
def test_closure_that_raises_changes_nothing(case: Case, backend: str) -> None:
    optimizer, _ = start(case, backend)
    before = snapshot(optimizer)

    def closure() -> float:
        raise ValueError("from the closure")

    with pytest.raises(ValueError, match="from the closure"):
        optimizer.step(closure)
    assert_same_snapshots(snapshot(optimizer), before)


@each_implementation
@each_kind
def test_step_before_any_gradient(case: Case, backend: str) -> None:
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, "decay", backend=backend)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert optimizer.state == {}
    assert optimizer.state_dict()["state"] == {}
    for param, old in zip(params, before, strict=True):
        assert_same_bits(param, old)


# Copies and memory ----------------------------------------------------------------------------------------------


def _through_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def _through_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _through_pickle,
    "torch.save": _through_torch_save,
}


@each_implementation
@each_case
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on_alike(case: Case, way: str, steps: int, backend: str) -> None:
    optimizer, _ = start(case, backend, "all", steps)
    twin = COPIES[way](optimizer)
    params, twins = params_of(optimizer), params_of(twin)
    assert twin.backend == optimizer.backend == backend
    assert not {param.data_ptr() for param in params} & {param.data_ptr() for param in twins}
    before = snapshot(optimizer)
    train(twin, twins, 2, first=50)
    assert_same_snapshots(snapshot(optimizer), before)
    train(optimizer, params, 2, first=50)
    assert_same_results(optimizer, twin)


@each_implementation
@each_kind
def test_copy_keeps_the_state_dtype(case: Case, backend: str) -> None:
    params = new_params(torch.bfloat16, FEW, device=device_of(backend))
    optimizer = case.make(params, backend=backend, state_dtype=torch.float32)
    for way in COPIES.values():
        twin = way(optimizer)
        twins = twin.param_groups[0]["params"]
        train(twin, twins, 1)
        name = twin.state_names(twin.param_groups[0])[0]
        assert twin.state[twins[0]][name].dtype == torch.float32


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_kind
def test_deleted_optimizer_keeps_nothing_alive(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    states = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    kept = [weakref.ref(param) for param in params]
    owner = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert owner() is None
    assert [state() for state in states] == [None] * len(states)
    del params
    gc.collect()
    assert [param() for param in kept] == [None] * len(kept)


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_twin
def test_cycle_through_a_parameter_is_collected(case: Case, backend: str) -> None:
    """param.optimizer = optimizer: the collector must see what the plan holds."""
    before = None
    for _ in range(4):
        optimizer, params = start(case, backend)
        params[0].optimizer = optimizer  # type: ignore[attr-defined]
        optimizer.param_groups[0]["back"] = optimizer
        set_grads(params, 5)
        optimizer.step()
        reference = weakref.ref(params[0])
        del optimizer, params
        gc.collect()
        assert reference() is None
        if before is None:  # the first has made numbers that `cases` remembers
            before = tensors_alive()
    assert tensors_alive() <= before


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_kind
def test_steps_allocate_no_lasting_objects(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend, steps=3)
    set_grads(params, 0)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    optimizer.step()
    before = objects()
    for _ in range(200):
        optimizer.step()
    assert objects() - before < 50


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_kind
def test_changed_groups_leave_no_parameter_behind(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    gone = weakref.ref(params[1])
    del optimizer.param_groups[0]["params"][1]
    del optimizer.state[params[1]]
    del params[1]
    set_grads(params, 5)
    optimizer.step()
    gc.collect()
    assert gone() is None


# Schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[4]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@each_implementation
@each_adamw
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_work_as_with_torch(case: Case, scheduler: str, tensor_lr: bool, backend: str) -> None:
    results = []
    for make, options in ((case.make, {"backend": backend}), (case.make_reference, {})):
        params = new_params(torch.float64, FEW)
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        optimizer = make(params, "default", lr=lr, **options)
        schedule = SCHEDULERS[scheduler](optimizer)
        history = []
        for step in range(10):
            set_grads(params, step)
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            history.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]))
        if tensor_lr:
            assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
        results.append((history, params))
    assert results[0][0] == results[1][0]
    assert len({lr for lr, _ in results[0][0]}) > 1
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


# GradScaler -----------------------------------------------------------------------------------------------------


def scaled_run(
    make: Callable[..., Any], optimizer_options: dict[str, Any], unscale: bool, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[Any]]:
    """Six steps under GradScaler, two of them with an Inf in the gradients."""
    params = new_params(dtype, [(7,), (3, 5)])
    optimizer = make(params, **optimizer_options)
    optimizer._step_supports_amp_scaling = not unscale
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    history = []
    for step in range(6):
        optimizer.zero_grad()
        target = [new_grad(param, step, position) for position, param in enumerate(params)]
        loss = sum((param * grad).sum() for param, grad in zip(params, target, strict=True))
        scaler.scale(loss).backward()
        if step in (0, 3):
            assert params[1].grad is not None
            params[1].grad[1, 2] = float("inf") if step == 0 else float("nan")
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        grads = [param.grad.clone() for param in params if param.grad is not None]
        scaler.step(optimizer)
        scaler.update()
        for param, grad in zip(params, grads, strict=True):
            assert_same_bits(param.grad, grad, "gradient")
        if step in (0, 3):
            for old, new in zip(before, snapshot(optimizer), strict=True):
                assert_same_bits(old["param"], new["param"], "parameter of a skipped step")
                assert int(old.get("step", 0)) == int(new.get("step", 0))
                for name in set(old) & set(new):
                    assert_same_bits(old[name], new[name], name)
        history.append(scaler.get_scale())
    return optimizer, history


@each_implementation
@each_adamw
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(case: Case, unscale: bool, backend: str) -> None:
    one, mine = scaled_run(case.optimizer, {"lr": 0.01, "backend": backend}, unscale)
    other, theirs = scaled_run(case.reference, {"lr": 0.01, "foreach": False}, True)
    assert mine == theirs
    for my, their in zip(snapshot(one), snapshot(other), strict=True):
        assert list(my) == list(their)
        assert my["step"] == their["step"] == 4
        for name, value in my.items():
            torch.testing.assert_close(value, their[name], rtol=3e-6, atol=3e-6)


@each_implementation
@each_kind
def test_grad_scaler_divides_inside_the_step(case: Case, backend: str) -> None:
    """No pass over the gradients before the step: they keep their scale, and the results are the same bits, as the
    scale is a power of two."""
    one, _ = scaled_run(case.optimizer, {"backend": backend}, unscale=False)
    other, _ = scaled_run(case.optimizer, {"backend": backend}, unscale=True)
    assert_same_results(one, other)


@each_implementation
@each_adamw
def test_grad_scaler_after_loading_a_checkpoint_of_torchs(case: Case, backend: str) -> None:
    params = new_params(shapes=FEW)
    reference = case.reference(params)
    train(reference, params, 2)
    optimizer = case.make(params, backend=backend)
    optimizer.load_state_dict(reference.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(sum(param.sum() for param in params)).backward()
    before = snapshot(optimizer)
    for param in params:
        param.grad = param.grad * 0 + 4.0 if param.grad is not None else None
    scaler.step(optimizer)
    scaler.update()
    assert [int(entry["step"]) for entry in snapshot(optimizer)] == [3, 3, 3]
    assert not torch.equal(before[0]["param"], params[0])


@each_implementation
@each_kind
def test_grad_scale_and_found_inf_by_hand(case: Case, backend: str) -> None:
    """torch's contract, as frameworks use it: attributes for the one step, deleted afterwards."""
    optimizer, params = start(case, backend)
    twin, twins = start(case, backend)
    before = snapshot(optimizer)
    set_grads(params, 7)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)
    optimizer.found_inf = torch.tensor(0.0)
    for param in params:
        assert param.grad is not None
        param.grad.mul_(8)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    set_grads(twins, 7)
    twin.step()
    assert_same_results(optimizer, twin)
    train(optimizer, params, 1, first=8)
    train(twin, twins, 1, first=8)
    assert_same_results(optimizer, twin)


# Autograd -------------------------------------------------------------------------------------------------------


@each_implementation
@each_kind
@pytest.mark.parametrize("shape", [(4,), (200_000,)], ids=str)
def test_stale_graph_raises(case: Case, shape: tuple[int, ...], backend: str) -> None:
    (param,) = new_params(shapes=[shape], device=device_of(backend))
    optimizer = case.make([param], backend=backend)
    for _ in range(3):  # the first step builds the plan, later ones reuse it
        loss = param.square().sum()
        param.grad = new_grad(param, 0)
        version = param._version
        optimizer.step()
        assert param._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_implementation
@each_kind
def test_untouched_parameter_keeps_its_graph(case: Case, backend: str) -> None:
    params = new_params(shapes=[(4,), (4,)], device=device_of(backend))
    optimizer = case.make(params, backend=backend)
    train(optimizer, params, 2)
    loss = params[1].square().sum()
    params[0].grad, params[1].grad = new_grad(params[0], 1), None
    optimizer.step()
    loss.backward()
    assert torch.equal(params[1].grad, 2 * params[1])


@each_implementation
@each_kind
def test_states_have_no_graph(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    loss = sum(param.square().sum() for param in params)
    loss.backward(create_graph=False)
    with torch.enable_grad():
        optimizer.step()
    for param in params:
        assert param.is_leaf
        assert param.requires_grad
        assert not any(value.requires_grad for value in optimizer.state[param].values())


# Surroundings ---------------------------------------------------------------------------------------------------


@each_implementation
@each_kind
def test_step_warns_not_and_prints_nothing(case: Case, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, params = start(case, backend, "all")
        params[0].grad = torch.ones(()).expand(5)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@each_implementation
@each_kind
def test_no_random_number_is_consumed(case: Case, backend: str) -> None:
    state = torch.get_rng_state()
    optimizer, _ = start(case, backend, "all")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@each_adamw
@pytest.mark.parametrize("variant", ["decay", "maximize", "large eps"])
def test_differentiable_gives_torchs_meta_gradient(case: Case, variant: str) -> None:
    """The gradient of a loss after three steps, back through them. (Of AMSGrad torch itself cannot do three.)

    The default dtype is float64 because torch computes the bias corrections in that of `step`.
    """
    results = []
    for make in (case.make, case.make_reference):
        start = torch.linspace(-1, 1, 6, dtype=torch.float64).add(0.05).requires_grad_()
        factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        param = start.clone()
        optimizer = make([start], variant, differentiable=True, lr=0.05)
        optimizer.param_groups[0]["params"] = [param]
        for _ in range(3):
            param.grad = factor * param.clone().square() + 0.1
            optimizer.step()
        param.pow(3).sum().backward()
        results.append((param.detach().clone(), factor.grad, start.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("default_dtype")
@each_implementation
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_default_dtype_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    """New step counts may be float64 then, as torch's are; the numbers are the same."""
    params = new_params(dtype, FEW, device=device_of(backend))
    optimizer = case.make(params, "all", backend=backend)
    train(optimizer, params, 3)
    torch.set_default_dtype(torch.float32)
    twins = new_params(dtype, FEW, device=device_of(backend))
    other = case.make(twins, "all", backend=backend)
    train(other, twins, 3)
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin)
        count = optimizer.state[param].get("step", torch.tensor(3.0))
        assert count.shape == ()
        assert count == 3
        for name in optimizer.state_names(optimizer.param_groups[0]):
            assert_same_bits(optimizer.state[param][name], other.state[twin][name])


@each_implementation
@each_kind
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(case: Case, device: str, backend: str) -> None:
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    for step in range(3):
        set_grads(params, step)
        set_grads(twins, step)
        if step == 0:
            one = None
        with torch.device(device):
            if one is None:
                one = case.make(params, "all", backend=backend)
            one.step()
        if step == 0:
            other = case.make(twins, "all", backend=backend)
        other.step()
    assert_same_results(one, other)


def steps_partly_within(mode: Any, when: str, optimizer: Any, twin: Any) -> None:
    """Four steps of both, the first one's with something done in a mode."""
    for step in range(4):
        for one in (optimizer, twin):
            set_grads((param for group in one.param_groups for param in group["params"]), step)
        within = (when, step) in (("the first step", 0), ("a later step", 2))
        with mode() if within else nullcontext():
            optimizer.step()
        twin.step()
        with mode():
            if (when, step) == ("a checkpoint", 1):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif (when, step) == ("copied states", 1):
                optimizer.state.update({param: copy.deepcopy(state) for param, state in optimizer.state.items()})
    assert_same_results(optimizer, twin)


WHEN = ("the first step", "a later step", "a checkpoint", "copied states")


@each_implementation
@each_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("when", WHEN)
def test_inference_and_no_grad_modes(case: Case, mode: Any, when: str, backend: str, fallbacks: list[str]) -> None:
    """What is made there serves outside of it."""
    optimizer, twin = (case.make(new_params(shapes=FEW, device=device_of(backend)), backend=backend) for _ in range(2))
    steps_partly_within(mode, when, optimizer, twin)
    assert when == "copied states" or not any("inference" in line for line in fallbacks)


@pytest.mark.sparingly(kind="split")
@each_implementation_daily
@pytest.mark.parametrize("kind", ["float32", "split"])
@pytest.mark.parametrize("when", WHEN)
def test_masters_norms_and_tables_made_in_inference_mode(
    kind: str, when: str, backend: str, fallbacks: list[str]
) -> None:
    optimizer, twin = (
        fused_optim.NovoGrad(
            new_params(torch.bfloat16, FEW, device_of(backend)),
            backend=backend,
            master_weights=kind,
            grad_clip=fused_optim.ClipGradByGlobalNorm(0.5),
        )
        for _ in range(2)
    )
    steps_partly_within(torch.inference_mode, when, optimizer, twin)
    with torch.inference_mode():
        optimizer.refresh_masters()
    twin.refresh_masters()
    steps_partly_within(torch.inference_mode, when, optimizer, twin)
    assert when == "copied states" or not any("inference" in line for line in fallbacks)


@pytest.mark.parametrize("name", ["step", "exp_avg", "master_param"])
def test_an_inference_tensor_among_states_is_replaced_with_a_word(name: str, fallbacks: list[str]) -> None:
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fused_optim.AdamW([param], backend="eager", master_weights="float32")
    param.grad = torch.ones_like(param)
    optimizer.step()
    with torch.inference_mode():
        optimizer.state[param][name] = optimizer.state[param][name].clone()
    optimizer.step()
    assert not optimizer.state[param][name].is_inference()
    assert len(fallbacks) == 1
    assert f"a copy of state {name!r}" in fallbacks[0]
    assert "which is an inference tensor" in fallbacks[0]


@each_implementation_daily
def test_one_optimizer_in_two_threads_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread's step; the first one's goes on as if there had been no other."""
    optimizer, twin = (
        fused_optim.AdamW(new_params(shapes=FEW, device=device_of(backend)), backend=backend) for _ in range(2)
    )
    began, go_on = threading.Event(), threading.Event()
    make = optimizer._kept.ready

    def wait_once(*of: Any) -> Any:
        found = make(*of)  # the gradients are held from here on
        if not began.is_set():
            began.set()
            assert go_on.wait(60)
        return found

    monkeypatch.setattr(optimizer._kept, "ready", wait_once)
    for one in (optimizer, twin):
        set_grads(one.param_groups[0]["params"], 0)
    twin.step()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    assert began.wait(60)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="two threads at once"):
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)
    go_on.set()
    thread.join(60)
    assert_same_results(optimizer, twin)
    optimizer.step()
    twin.step()
    assert_same_results(optimizer, twin)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", ["cpu", "eager"])  # Triton's interpreter has one state for all threads
@each_kind
def test_two_optimizers_in_two_threads(case: Case, backend: str) -> None:
    """The same bits as one after the other."""

    def job(seed: int, results: dict[int, Any]) -> None:
        params = new_params(shapes=[(200, 300), (17,)], seed=seed, device=device_of(backend))
        optimizer = case.make(params, "decay", backend=backend)
        for step in range(3):
            for position, param in enumerate(params):
                param.grad = new_grad(param, step + seed, position)
            optimizer.step()
        results[seed] = snapshot(optimizer)

    together: dict[int, Any] = {}
    threads = [threading.Thread(target=job, args=(seed, together)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart: dict[int, Any] = {}
    for seed in range(3):
        job(seed, apart)
        assert_same_snapshots(together[seed], apart[seed])


@each_backend
@each_kind
@pytest.mark.usefixtures("all_native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_without_the_exchange_api(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch before 2.10, and without the C shim: addresses come by a Python callable, and the bits are the same."""
    params = new_params(dtype, device=device_of(backend))
    optimizer = case.make(params, "all", backend=backend)
    train(optimizer, params, 3)
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    monkeypatch.setattr(planner, "tensor_shim", lambda: None)
    twins = new_params(dtype, device=device_of(backend))
    other = case.make(twins, "all", backend=backend)
    train(other, twins, 3)
    assert_same_results(optimizer, other)


@each_backend
@each_kind
def test_odd_layouts_without_the_exchange_api(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    monkeypatch.setattr(planner, "tensor_shim", lambda: None)
    results = []
    for choice in (backend, "eager"):
        base = torch.linspace(-1, 1, 64).view(8, 8)
        params = [Parameter(base[:, 0]), Parameter(base.t()[3:]), Parameter(torch.ones(1)), Parameter(torch.ones(4))]
        optimizer = case.make(params, backend=choice)
        for step in range(2):
            set_grads(params, step)
            params[2].grad = torch.view_as_complex(torch.tensor([[1.0, 2.0]])).conj().imag
            params[3].grad = torch.view_as_complex(torch.ones(4, 2)).conj().imag
            optimizer.step()
        results.append(optimizer)
    assert_same_results(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own access
@each_implementation
@each_kind
def test_compiled_function_around_a_step(case: Case, backend: str) -> None:
    """The graph breaks at the step; loss, parameters and states are those of the uncompiled run."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = new_params(shapes=FEW, device=device_of(backend))
        optimizer = case.make(params, "decay", backend=backend)

        def one_step(scale: Tensor, params: Any = params, optimizer: Any = optimizer) -> Tensor:
            loss = sum((param * param * scale).sum() for param in params)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss * 2

        run = torch.compile(one_step, backend="eager") if compiled else one_step
        losses = [run(torch.tensor(float(step + 1))).detach() for step in range(4)]
        results.append((losses, snapshot(optimizer)))
    for mine, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, theirs)
    for old, new in zip(results[0][1], results[1][1], strict=True):
        assert old.get("step", 4) == new.get("step", 4) == 4
        for name, value in old.items():
            torch.testing.assert_close(value, new[name], rtol=1e-6, atol=1e-6)


@each_implementation
@each_kind
def test_compiled_step_alone(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    optimizer, params = start(case, backend)
    twin, twins = start(case, backend)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for index in range(3):
        set_grads(params, index)
        set_grads(twins, index)
        step()
        twin.step()
    assert_same_results(optimizer, twin)


@each_implementation
@each_adamw
def test_optimizer_in_backward_hooks(case: Case, backend: str) -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    owners = {param: case.make([param], backend=backend) for param in params}

    def step_now(param: Tensor) -> None:
        owners[param].step()
        owners[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(step_now)
    other = case.make(twins, backend=backend)
    for _ in range(3):
        sum(param.square().sum() for param in params).backward()
        sum(param.square().sum() for param in twins).backward()
        other.step()
        other.zero_grad()
    for param, twin in zip(params, twins, strict=True):
        assert_same_bits(param, twin)
        assert param.grad is None


@each_implementation
@each_kind
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(case: Case, set_to_none: bool, backend: str) -> None:
    optimizer, params = start(case, backend)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in params:
        assert param.grad is None if set_to_none else bool((param.grad == 0).all())


@each_implementation
@each_kind
def test_subclass_of_the_optimizer(case: Case, backend: str) -> None:
    class Logged(case.optimizer):  # type: ignore[misc,name-defined]
        def step(self, closure: Any = None) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    one, other = Logged(params, backend=backend), case.optimizer(twins, backend=backend)
    train(one, params, 2)
    train(other, twins, 2)
    assert one.steps == 2
    assert_same_results(one, other)


@each_implementation
@each_kind
def test_parameter_subclass_without_dispatch(case: Case, backend: str) -> None:
    """Subclasses that only carry methods are data as any other."""

    class Tagged(Parameter):
        pass

    class TaggedTensor(Tensor):
        pass

    values = new_params(shapes=[(5,), (3, 4)], device=device_of(backend))
    params = [Tagged(values[0].detach().clone()), Parameter(values[1].detach().clone().as_subclass(TaggedTensor))]
    one, other = case.make(params, backend=backend), case.make(values, backend=backend)
    train(one, params, 3)
    train(other, values, 3)
    for param, twin in zip(params, values, strict=True):
        assert_same_bits(param.detach().as_subclass(Tensor), twin)


def test_pre_hook_may_replace_the_closure() -> None:
    param = Parameter(torch.ones(3))
    optimizer = fused_optim.AdamW([param])
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "closure": lambda: 7.0}))
    assert optimizer.step(closure=lambda: 3.0) == 7.0


def test_classes_may_take_torchs_places_in_torch_optim(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGD", "Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, getattr(fused_optim, name))
    for name in ("SGD", "Adam", "AdamW"):
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        getattr(torch.optim, name)([param], lr=0.1).step()
        assert param[0] < 1


class OfConfiguration(Sequence):  # type: ignore[type-arg]
    """A list as configuration libraries have them."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)


SEQUENCES: dict[str, Callable[[list[float]], Any]] = {
    "configuration": OfConfiguration,
    "list": list,
    "array": np.array,
    "tensor": lambda values: torch.tensor(values, dtype=torch.float64),
    "tensors": lambda values: tuple(torch.tensor(value, dtype=torch.float64) for value in values),
}


@each_implementation_daily
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", [fused_optim.AdamW, fused_optim.Lion, fused_optim.LAMB, fused_optim.NovoGrad])
def test_betas_may_be_any_sequence(kind: Any, later: bool, backend: str) -> None:
    results = {}
    for name, make in {"tuple": tuple, **SEQUENCES}.items():
        betas = make([0.8, 0.9])
        param = Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1, betas=(0.5, 0.5) if later else betas, backend=backend)
        optimizer.param_groups[0]["betas"] = betas
        for value in (1.0, 3.0):  # by one value alone Adam moves the same whatever its betas
            param.grad = torch.full((3,), value)
            optimizer.step()
        results[name] = param.tolist()
    assert all(result == results["tuple"] for result in results.values()), results


@each_implementation_daily
@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
def test_a_hyperparameter_may_be_an_array_of_no_dimension(key: str, backend: str) -> None:
    """As torch takes lr and weight_decay; a scheduler multiplies it like any other number."""
    results = []
    for value in (0.125, np.array(0.125)):
        param = Parameter(torch.ones(3))
        options: dict[str, Any] = {"lr": 0.5, key: value}
        optimizer = fused_optim.AdamW([param], backend=backend, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        train(optimizer, [param], 2)
        scheduler.step()
        optimizer.param_groups[0][key] = value * 2
        train(optimizer, [param], 2, first=2)
        results.append(optimizer)
    assert_same_results(*results)


@each_implementation_daily
@pytest.mark.parametrize("key", ["lr", "momentum"])
def test_larc_around_an_optimizer_with_a_number_of_numpys(key: str, backend: str) -> None:
    results = []
    for value in (0.5, np.array(0.5)):
        param = Parameter(torch.ones(3))
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, key: value}
        optimizer = fused_optim.LARC(fused_optim.SGD([param], backend=backend, **options))
        train(optimizer, [param], 3)
        results.append(optimizer.optimizer)
    assert_same_results(*results)


@pytest.mark.parametrize("variant", [None, "apex"])
def test_larc_around_another_librarys_optimizer_with_a_number_of_numpys(variant: str | None) -> None:
    results = []
    for value in (0.5, np.array(0.5)):
        param = Parameter(torch.ones(3))
        optimizer = fused_optim.LARC(torch.optim.AdamW([param], value, weight_decay=value), variant=variant)
        train(optimizer, [param], 3)
        results.append(param)
    assert_same_bits(*results)
