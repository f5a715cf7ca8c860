"""What may change under an optimizer between steps: all of it takes effect at the next step, and memory that was let
go of is never written."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import (
    Case,
    assert_near,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    bits,
    device_of,
    each_adam,
    each_adamw,
    each_backend,
    each_dtype,
    each_implementation,
    each_kind,
    new_grad,
    new_params,
    set_grads,
    snapshot,
    train,
)
from support.ranks import Ranks
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import LAMB, LARC, SGD, Adam, AdamW, AdamWDL, ClipGradByGlobalNorm, GradScaler, NovoGrad

FEW = [(5,), (3, 4), ()]


def start(
    case: Case, backend: str, variant: str = "decay", steps: int = 2, **options: Any
) -> tuple[Any, list[Parameter]]:
    """An optimizer after a few steps, so that its plan is built."""
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, variant, backend=backend, **options)
    train(optimizer, params, steps)
    return optimizer, params


def fresh_from(case: Case, backend: str, optimizer: Any) -> tuple[Any, list[Parameter]]:
    """An optimizer with the same parameters, states and groups that never took a step: it has nothing cached."""
    twins: dict[Tensor, Parameter] = {}
    groups = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            twins[param] = Parameter(param.detach().clone())
        options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        groups.append({"params": [twins[param] for param in group["params"]], **options})
    fresh = case.make(groups, backend=backend)
    for param, state in optimizer.state.items():
        if param in twins:
            fresh.state[twins[param]] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
            }
    return fresh, [twins[param] for group in optimizer.param_groups for param in group["params"]]


def assert_next_step_is_that_of_a_fresh_one(case: Case, backend: str, optimizer: Any, steps: int = 2) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    fresh, twins = fresh_from(case, backend, optimizer)
    before = snapshot(optimizer)
    train(optimizer, params, steps, first=50)
    train(fresh, twins, steps, first=50)
    assert_same_results(optimizer, fresh)
    assert not torch.equal(bits(before[0]["param"]), bits(snapshot(optimizer)[0]["param"]))


@contextmanager
def watched(*tensors: Tensor) -> Iterator[None]:
    """Fails if the memory of these tensors changes."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        assert_same_bits(tensor, old, "memory that the optimizer no longer owns")


# Hyperparameters ------------------------------------------------------------------------------------------------

HYPERPARAMETERS: dict[str, tuple[str, Any]] = {
    "lr": ("lr", 0.5),
    "lr of type int": ("lr", 1),
    "lr as a Tensor": ("lr", torch.tensor(0.25)),
    "lr as a [1] Tensor": ("lr", torch.tensor([0.25])),
    "lr as a [1, 1] Tensor": ("lr", torch.tensor([[0.25]], dtype=torch.float64)),
    "betas": ("betas", (0.5, 0.6)),
    "betas as a list": ("betas", [0.5, 0.6]),
    "betas as Tensors": ("betas", (torch.tensor(0.5), torch.tensor(0.625))),
    "eps": ("eps", 0.1),
    "weight_decay": ("weight_decay", 0.7),
    "maximize": ("maximize", True),
    "amsgrad": ("amsgrad", True),
}


@each_implementation
@each_kind
@pytest.mark.parametrize("change", HYPERPARAMETERS)
@pytest.mark.parametrize("by", ["assignment", "pre-hook", "update", "new dict"])
def test_hyperparameter_changed_in_one_group(case: Case, change: str, by: str, backend: str) -> None:
    key, value = HYPERPARAMETERS[change]
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}], "decay", backend=backend)
    train(optimizer, params, 2)
    fresh, twins = fresh_from(case, backend, optimizer)
    fresh.param_groups[1][key] = value
    if by == "assignment":
        optimizer.param_groups[1][key] = value
    elif by == "update":
        optimizer.param_groups[1].update({key: value})
    elif by == "new dict":
        optimizer.param_groups[1] = {**optimizer.param_groups[1], key: value}
    else:

        def assign(owner: Any, args: Any, kwargs: Any) -> None:
            owner.param_groups[1][key] = value

        optimizer.register_step_pre_hook(assign)
    train(optimizer, params, 2, first=50)
    train(fresh, twins, 2, first=50)
    assert_same_results(optimizer, fresh)


@each_implementation
@each_adam
@pytest.mark.parametrize("change", HYPERPARAMETERS)
def test_hyperparameter_changes_the_step(case: Case, change: str, backend: str) -> None:
    """What the tests of changes rely on: each of the values makes a difference."""
    key, value = HYPERPARAMETERS[change]
    results = []
    for changed in (False, True):
        optimizer, params = start(case, backend)
        if changed:
            optimizer.param_groups[0][key] = value
        train(optimizer, params, 2, first=50)
        results.append(params[1].detach().clone())
    assert not torch.equal(results[0], results[1])


@each_implementation
@each_adamw
def test_flag_toggled_back(case: Case, backend: str) -> None:
    """The extra state of a flag stays while it is off, and is taken up again."""
    optimizer, params = start(case, backend, "amsgrad")
    optimizer.param_groups[0]["amsgrad"] = False
    kept = [optimizer.state[param]["max_exp_avg_sq"].clone() for param in params]
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    for param, old in zip(params, kept, strict=True):
        assert_same_bits(optimizer.state[param]["max_exp_avg_sq"], old)
    optimizer.param_groups[0]["amsgrad"] = True
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_adamw
def test_list_betas_changed_in_place(case: Case, backend: str) -> None:
    optimizer, _ = start(case, backend)
    optimizer.param_groups[0]["betas"] = betas = [0.9, 0.999]
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    betas[1] = 0.5
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    betas[:] = [0.1, 0.2]
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_adamw
def test_hyperparameter_tensors_filled_in_place(case: Case, backend: str) -> None:
    lr, beta = torch.tensor(0.01), torch.tensor(0.9)
    optimizer, _ = start(case, backend, lr=lr, betas=(0.9, 0.99))
    lr.fill_(0.3)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    optimizer.param_groups[0]["betas"] = (beta, beta)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    beta.fill_(0.25)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    lr.data = torch.tensor(0.7)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_kind
def test_group_key_removed_falls_back_to_the_default(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    fresh, twins = fresh_from(case, backend, optimizer)
    fresh.param_groups[0]["weight_decay"] = fresh.defaults["weight_decay"]
    optimizer.defaults["weight_decay"] = fresh.defaults["weight_decay"]
    del optimizer.param_groups[0]["weight_decay"]
    del optimizer.param_groups[0]["maximize"]
    optimizer.param_groups[0]["unknown"] = object()
    train(optimizer, params, 2, first=50)
    train(fresh, twins, 2, first=50)
    assert_same_results(optimizer, fresh)


@each_implementation
@each_adamw
def test_hyperparameter_replaced_by_an_equal_address(case: Case, backend: str) -> None:
    """Floats come back at the address of a freed one; a cached identity must not take them for the same."""
    optimizer, params = start(case, backend, "no decay")
    for step in range(30):
        optimizer.param_groups[0]["lr"] = float(step) / 7 + 0.1
        fresh, twins = fresh_from(case, backend, optimizer)
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        fresh.step()
        assert_same_results(optimizer, fresh)


# State ----------------------------------------------------------------------------------------------------------


@each_implementation
@each_kind
def test_state_tensor_replaced_at_the_same_python_address(case: Case, backend: str) -> None:
    """The replaced tensor's object often returns at the address of the old one, with other data."""
    optimizer, params = start(case, backend)
    param = params[1]
    came_back = 0
    name = optimizer.state_names(optimizer.param_groups[0])[0]
    for step in range(40):
        state = optimizer.state[param]
        address = id(state[name])
        del state[name]
        candidates = [torch.full(param.shape, float(step)) for _ in range(400)]
        state[name] = next((tensor for tensor in candidates if id(tensor) == address), candidates[0])
        came_back += id(state[name]) == address
        del candidates
        fresh, twins = fresh_from(case, backend, optimizer)
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        fresh.step()
        assert_same_snapshots(sorted_keys(optimizer), sorted_keys(fresh))
    assert came_back > 0


def sorted_keys(optimizer: Any) -> list[dict[str, Tensor]]:
    return [dict(sorted(entry.items())) for entry in snapshot(optimizer)]


def _swap_data(state: dict[str, Tensor], name: str) -> None:
    state[name].data = state[name].data.clone() + 1


def _to_bfloat16(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].to(torch.bfloat16)


def _to_float64(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].to(torch.float64)


def _data_to_float64(state: dict[str, Tensor], name: str) -> None:
    state[name].data = state[name].data.to(torch.float64)


def _round_trip(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name].to(torch.float64).to("cpu", torch.float32, copy=True)


def _delete_and_add(state: dict[str, Tensor], name: str) -> None:
    value = state.pop(name)
    state[name] = value * 2


def _parameter(state: dict[str, Tensor], name: str) -> None:
    state[name] = Parameter(state[name].clone(), requires_grad=False)


def _view(state: dict[str, Tensor], name: str) -> None:
    state[name] = torch.stack([state[name], state[name]], -1)[..., 1]


def _in_place(state: dict[str, Tensor], name: str) -> None:
    state[name].mul_(3)


CHANGES_OF_STATE = {
    change.__name__.strip("_"): change
    for change in (
        _swap_data,
        _to_bfloat16,
        _to_float64,
        _data_to_float64,
        _round_trip,
        _delete_and_add,
        _parameter,
        _view,
        _in_place,
    )
}


@each_implementation
@each_adamw
@pytest.mark.parametrize("change", CHANGES_OF_STATE)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_state_changed(case: Case, name: str, change: str, backend: str) -> None:
    optimizer, params = start(case, backend)
    if change == "to_bfloat16" and name == "step":
        optimizer.state[params[1]]["step"].fill_(4)  # a number that bfloat16 holds
    old = optimizer.state[params[1]][name]
    storage = torch.empty(0, dtype=old.dtype).set_(old.untyped_storage(), 0, (old.numel(),))
    CHANGES_OF_STATE[change](optimizer.state[params[1]], name)
    fresh, twins = fresh_from(case, backend, optimizer)
    if change == "in_place":
        train(optimizer, params, 2, first=50)
    else:
        with watched(storage):
            train(optimizer, params, 2, first=50)
    train(fresh, twins, 2, first=50)
    assert_same_snapshots(sorted_keys(optimizer), sorted_keys(fresh))


@each_backend
@each_adamw
@each_dtype
@pytest.mark.parametrize("found", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_found_state_dtype_is_adopted_alike(case: Case, found: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    """A state of another dtype than the optimizer would create: every backend keeps or widens it alike."""
    results = []
    for choice in (backend, "eager"):
        params = new_params(dtype, FEW, device=device_of(backend))
        optimizer = case.make(params, "all", backend=choice)
        train(optimizer, params, 2)
        for param in params:
            for name in optimizer.state_names(optimizer.param_groups[0]):
                optimizer.state[param][name] = optimizer.state[param][name].to(found)
        train(optimizer, params, 3, first=50)
        results.append(snapshot(optimizer))
    for mine, theirs in zip(*results, strict=True):
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype, name
            if dtype != torch.float64:
                assert_same_bits(value, theirs[name], name)
            else:
                torch.testing.assert_close(value, theirs[name], rtol=1e-13, atol=1e-13)


@each_implementation
@each_adamw
@pytest.mark.parametrize(
    "make",
    [
        lambda n: n,
        lambda n: float(n),
        lambda n: torch.tensor(n),
        lambda n: torch.tensor([float(n)]),
        lambda n: torch.tensor([[float(n)]], dtype=torch.float64),
        lambda n: torch.tensor(float(n), dtype=torch.float64),
        lambda n: torch.tensor(float(n), dtype=torch.float16),
    ],
    ids=["int", "float", "int64 tensor", "[1]", "[1, 1] float64", "float64", "float16"],
)
def test_step_of_any_form_is_adopted(case: Case, make: Callable[[int], Any], backend: str) -> None:
    """A Tensor is counted where it is; a number becomes one."""
    optimizer, params = start(case, backend)
    other, others = start(case, backend)
    steps = [make(7) for _ in params]
    for param, twin, step in zip(params, others, steps, strict=True):
        optimizer.state[param]["step"] = step
        other.state[twin]["step"] = torch.tensor(7.0)
    train(optimizer, params, 2, first=50)
    train(other, others, 2, first=50)
    for param, twin, made in zip(params, others, steps, strict=True):
        assert_same_bits(param, twin)
        step = optimizer.state[param]["step"]
        assert step is made or (not isinstance(made, Tensor) and step.shape == () and step.dtype == torch.float32)
        assert step == 9


# What the user has put into the state -----------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda params, **o: AdamW(params, 0.1, amsgrad=True, **o),
    "SGD": lambda params, **o: SGD(params, 0.1, 0.9, **o),
    "NovoGrad": lambda params, **o: NovoGrad(params, 0.1, **o),
    "LAMB": lambda params, **o: LAMB(params, **o),
}
# Name: what is put in the place of a state; whether the fused backends then read it where it is.
NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "[1], shared": (lambda t: t.reshape(1).clone().share_memory_(), True),
    "[1, 1]": (lambda t: t.reshape(1, 1).clone(), True),
    "element of a larger one": (lambda t: torch.stack([t, t, t])[1:2], True),
    "float64": (lambda t: t.double(), True),
    "int64": (lambda t: t.long(), False),
    "int32 [1]": (lambda t: t.int().reshape(1), False),
    "float16": (lambda t: t.half(), False),
    "negated": (lambda t: torch._neg_view(-t), False),
}
ELEMENTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "shared": (lambda t: t.clone().share_memory_(), True),
    "transposed": (lambda t: t.t().contiguous().t(), False),
    "every other": (lambda t: torch.stack([t, t], -1)[..., 0], False),
    "row of a larger one": (lambda t: torch.stack([t, t])[1], True),
}


def start_two(kind: str, backend: str, master: str | None = None) -> list[tuple[Any, list[Parameter]]]:
    """Two equal runs after a step."""
    runs = []
    for _ in range(2):
        params = new_params(torch.float32 if master is None else torch.bfloat16, [(7, 5), (3,)])
        optimizer = OPTIMIZERS[kind](params, backend=backend, master_weights=master)
        train(optimizer, params, 1)
        runs.append((optimizer, params))
    return runs


def put(optimizer: Any, param: Tensor, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    state = optimizer.state[param]
    state[name] = make(state[name])
    return state[name]


def assert_is_used(optimizer: Any, param: Tensor, name: str, mine: Tensor, address: int) -> None:
    assert optimizer.state[param][name] is mine
    assert mine.data_ptr() == address


@pytest.mark.parametrize(
    ("kind", "form"),
    [("AdamW", form) for form in NUMBERS]
    + [(kind, form) for kind in OPTIMIZERS if kind != "AdamW" for form in ("[1], shared", "int64")],
)
def test_a_step_count_is_the_users(kind: str, form: str, any_backend: str, fallbacks: list[str]) -> None:
    """Whatever its shape and dtype: as the shared one of several workers."""
    make, native = NUMBERS[form]
    runs = start_two(kind, any_backend)
    (optimizer, (param, _)), (twin, _) = runs
    mine = put(optimizer, param, "step", make)
    address, shape, dtype = mine.data_ptr(), mine.shape, mine.dtype
    for each, params in runs:
        train(each, params, 2, first=50)
    assert_is_used(optimizer, param, "step", mine, address)
    assert (mine.shape, mine.dtype) == (shape, dtype)
    assert mine == 3
    assert len(fallbacks) == (not native and any_backend != "eager")
    optimizer.state[param]["step"] = mine.float().reshape(())
    if native:
        assert_same_results(optimizer, twin)
    else:
        assert_near(optimizer, twin)  # sums of norms in another order


@pytest.mark.parametrize(
    ("kind", "name", "master", "form"),
    [
        *(("AdamW", "exp_avg", None, form) for form in ELEMENTS),
        *(
            (*state, form)
            for state in (
                ("AdamW", "max_exp_avg_sq", "split"),
                ("AdamW", "master_param", "float32"),
                ("AdamW", "param_remainder", "split"),
                ("SGD", "momentum_buffer", None),
                ("NovoGrad", "exp_avg", "float32"),
                ("LAMB", "exp_avg_sq", None),
            )
            for form in ("transposed", "row of a larger one")
        ),
    ],
)
def test_a_state_is_the_users(
    kind: str, name: str, master: str | None, form: str, any_backend: str, fallbacks: list[str]
) -> None:
    """Wherever its memory is, and in whatever order of its elements."""
    make, native = ELEMENTS[form]
    runs = start_two(kind, any_backend, master)
    (optimizer, (param, _)), (twin, _) = runs
    mine = put(optimizer, param, name, make)
    address, strides = mine.data_ptr(), mine.stride()
    for each, params in runs:
        train(each, params, 2, first=50)
    assert_is_used(optimizer, param, name, mine, address)
    assert mine.stride() == strides
    if any_backend == "eager" or native:
        assert fallbacks == []
        assert_same_results(optimizer, twin)
    else:
        (line,) = fallbacks
        assert f"its state {name!r} has strides {strides}, the parameter (5, 1)" in line
        assert_near(optimizer, twin)


@pytest.mark.parametrize("name", ["step", "exp_avg_sq"])
def test_a_number_of_novograds_is_the_users(name: str, any_backend: str, fallbacks: list[str]) -> None:
    runs = start_two("NovoGrad", any_backend)
    (optimizer, (param, _)), (twin, _) = runs
    mine = put(optimizer, param, name, lambda t: t.reshape(1, 1, 1).clone())
    for each, params in runs:
        train(each, params, 2, first=50)
    assert optimizer.state[param][name] is mine
    optimizer.state[param][name] = mine.reshape(())
    assert_same_results(optimizer, twin)
    assert fallbacks == []


def test_what_cannot_be_the_users_is_logged(any_backend: str, fallbacks: list[str]) -> None:
    """One line for each reason, which names the state that was replaced first."""
    params = new_params(shapes=[(4, 4), (4, 4), (4, 4)])
    optimizer = AdamW([(name, param) for name, param in zip("abc", params, strict=True)], backend=any_backend)
    train(optimizer, params, 1)
    states = [optimizer.state[param] for param in params]
    states[0]["exp_avg"] = states[0]["exp_avg"].double()
    states[1]["exp_avg_sq"] = states[1]["exp_avg_sq"].double()
    states[2]["exp_avg"] = torch.zeros(1, 1).expand(4, 4)
    states[2]["step"] = states[0]["step"]
    states[0]["step"], states[2]["step"] = states[0]["step"].long(), states[0]["step"].long()
    states[2]["step"] = states[0]["step"]
    train(optimizer, params, 2, first=50)
    assert [step.item() for step in (state["step"] for state in states)] == [3, 3, 3]
    lines = [line for line in fallbacks if "goes on with a copy" in line]
    assert lines == [
        "WARNING: AdamW: the step goes on with a copy of state 'exp_avg' of 'a' (param_groups[0]['params'][0]), which "
        "has dtype torch.float64, and is kept as torch.float32 beside the parameter's torch.float32",
        "WARNING: AdamW: the step goes on with a copy of state 'exp_avg' of 'c' (param_groups[0]['params'][2]), which "
        "is expanded: several of its elements are one number in memory",
        "WARNING: AdamW: the step goes on with a copy of state 'step' of 'c' (param_groups[0]['params'][2]), which is "
        "also that of another parameter",
    ]


def test_a_step_that_cannot_count_is_refused(any_backend: str) -> None:
    (param,) = new_params(shapes=[(4,)])
    optimizer = AdamW([param], backend=any_backend)
    train(optimizer, [param], 1)
    optimizer.state[param]["step"] = torch.tensor(True)
    before = snapshot(optimizer)
    set_grads([param], 1)
    with pytest.raises(RuntimeError, match=r"'step' of .* must be a number or a one-element Tensor, found a Tensor"):
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)


def worker(params: list[Tensor], states: list[dict[str, Tensor]], backend: str) -> None:
    """One of several processes that share parameters and the state of Adam, each in its turn."""
    optimizer = Adam(params, 0.1, backend=backend)
    for param, state in zip(params, states, strict=True):
        optimizer.state[param] = state
    for turn in range(8):
        if turn % 4 == torch.distributed.get_rank():
            train(optimizer, params, 1, first=turn)
        torch.distributed.barrier()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_workers_share_one_state(backend: str, ranks: Ranks) -> None:
    """The shared Adam of asynchronous methods: its step is a tensor of one element in shared memory."""
    params = [param.detach().share_memory_() for param in new_params(shapes=[(7, 5), (3,)])]
    states = [
        {
            "step": torch.zeros(1).share_memory_(),
            "exp_avg": torch.zeros_like(param).share_memory_(),
            "exp_avg_sq": torch.zeros_like(param).share_memory_(),
        }
        for param in params
    ]
    ranks.run(worker, params, states, backend)
    twins = new_params(shapes=[(7, 5), (3,)])
    alone = Adam(twins, 0.1, backend=backend)
    train(alone, twins, 8)
    for param, twin, state in zip(params, twins, states, strict=True):
        assert_same_bits(param, twin.detach())
        assert state["step"].tolist() == [8.0]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(state[name], alone.state[twin][name])


@each_implementation
@each_adamw
def test_step_is_counted_on_by_the_user(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    optimizer.state[params[0]]["step"] += 40
    optimizer.state[params[1]]["step"].fill_(3)
    optimizer.state[params[2]]["step"] = torch.tensor(11.0)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    assert [optimizer.state[param]["step"].item() for param in params] == [44, 5, 13]


@each_implementation
@each_kind
@pytest.mark.parametrize("clear", ["state", "one parameter's", "one parameter's dict", "new defaultdict"])
def test_state_cleared(case: Case, clear: str, backend: str) -> None:
    optimizer, params = start(case, backend)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    if clear == "state":
        optimizer.state.clear()
    elif clear == "one parameter's":
        del optimizer.state[params[1]]
    elif clear == "one parameter's dict":
        optimizer.state[params[1]].clear()
    else:
        import collections

        optimizer.state = collections.defaultdict(dict)
    cleared = params if clear in ("state", "new defaultdict") else params[1:2]
    each = len(kept) // len(params)
    gone = kept if len(cleared) > 1 else kept[each : 2 * each]
    with watched(*gone):
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    for param in cleared:
        assert optimizer.state[param].get("step", 2) == 2


@each_implementation
@each_kind
def test_state_dict_of_a_parameter_replaced(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    old = dict(optimizer.state[params[1]])
    optimizer.state[params[1]] = {key: value.clone() + 1 for key, value in reversed(old.items())}
    with watched(*old.values()):
        params_before = params[1].detach().clone()
        fresh, twins = fresh_from(case, backend, optimizer)
        train(optimizer, params, 2, first=50)
        train(fresh, twins, 2, first=50)
        assert_same_snapshots(sorted_keys(optimizer), sorted_keys(fresh))
        assert not torch.equal(params[1], params_before)


@each_implementation
@each_adamw
@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_state_tensor_shared_by_two_parameters_is_split(case: Case, name: str, backend: str) -> None:
    """As a deepcopy or a hand-made state leaves them: each parameter moves as if it had its own."""
    params = new_params(shapes=[(4, 4), (4, 4), (4, 4)], device=device_of(backend))
    optimizer = case.make(params, "decay", backend=backend)
    train(optimizer, params, 2)
    shared = optimizer.state[params[0]][name]
    for param in params[1:]:
        optimizer.state[param][name] = shared
    fresh, twins = fresh_from(case, backend, optimizer)  # clones each
    train(optimizer, params, 3, first=50)
    train(fresh, twins, 3, first=50)
    assert_same_results(optimizer, fresh)
    assert [optimizer.state[param]["step"].item() for param in params] == [5, 5, 5]


@each_implementation
@each_adamw
def test_step_views_of_one_tensor(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    flat = torch.full((len(params),), 2.0)
    for index, param in enumerate(params):
        optimizer.state[param]["step"] = flat[index]
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


# Parameters -----------------------------------------------------------------------------------------------------


@each_implementation
@each_kind
def test_parameter_data_swapped(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    old = [param.data for param in params]
    for param in params:
        param.data = param.data.clone() * 2
    with watched(*old):
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_kind
def test_parameter_data_of_another_shape(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    old = params[1].data
    params[1].data = torch.ones(2, 9)
    del optimizer.state[params[1]]
    with watched(old):
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameter_data_of_another_dtype(case: Case, dtype: torch.dtype, backend: str) -> None:
    """model.double() after steps: the states follow as far as no bit is lost."""
    optimizer, params = start(case, backend)
    for param in params:
        param.grad = None
        param.data = param.data.to(dtype)
    fresh, twins = fresh_from(case, backend, optimizer)
    train(optimizer, params, 2, first=50)
    train(fresh, twins, 2, first=50)
    assert_same_results(optimizer, fresh)
    name = optimizer.state_names(optimizer.param_groups[0])[0]
    for param in params:
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert optimizer.state[param][name].dtype == expected


@each_implementation
@each_kind
def test_parameter_data_of_another_layout(case: Case, backend: str) -> None:
    (param,) = new_params(shapes=[(4, 6)], device=device_of(backend))
    optimizer = case.make([param], backend=backend)
    train(optimizer, [param], 2)
    param.data = param.data.t().contiguous().t()
    assert param.stride() == (1, 4)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_kind
def test_parameters_appended_removed_replaced(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    extra, other = new_params(shapes=[(6,), (3, 4)], device=device_of(backend), seed=21)
    optimizer.param_groups[0]["params"].append(extra)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    assert optimizer.state[extra].get("step", 2) == 2
    removed = optimizer.param_groups[0]["params"].pop(0)
    with watched(removed, *optimizer.state[removed].values()):
        removed.grad = torch.ones_like(removed)
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    replaced = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"][0] = other
    with watched(replaced, *optimizer.state[replaced].values()):
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    optimizer.param_groups[0]["params"].reverse()
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    optimizer.param_groups[0]["params"] = list(params)
    with watched(other, extra):
        other.grad = torch.ones_like(other)
        fresh, twins = fresh_from(case, backend, optimizer)
        train(optimizer, params, 1, first=60)
        train(fresh, twins, 1, first=60)
        for param, twin in zip(params, twins, strict=True):
            assert_same_bits(param, twin)


@each_implementation
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_a_parameter_without_states_leaves_nothing_in_the_checkpoint(native: bool, asked: bool, backend: str) -> None:
    """As with torch's SGD: it has no state before momentum is switched on, wherever it was stepped."""
    params = [Parameter(torch.ones(3, 2, device=device_of(backend))) for _ in range(2)]
    optimizer = fused_optim.SGD(params, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param) if native else torch.ones(2, 3, device=param.device).t()
    optimizer.step()
    assert not optimizer.state
    if asked:
        assert optimizer.state[params[0]] == {}
    del optimizer.param_groups[0]["params"][0]
    assert optimizer.state_dict()["state"] == {}
    fused_optim.SGD(params[1:], lr=0.1, backend=backend).load_state_dict(optimizer.state_dict())


@each_implementation
@each_adamw
def test_a_state_of_a_parameter_that_left_is_refused_in_words(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    del optimizer.param_groups[0]["params"][1]
    with pytest.raises(KeyError, match=r"shape \(3, 4\) has a state and is in no group any more.*del optimizer.state"):
        optimizer.state_dict()
    del optimizer.state[params[1]]
    assert set(optimizer.state_dict()["state"]) == {0, 1}


@each_implementation
@each_adamw
def test_groups_added_removed_reordered(case: Case, backend: str) -> None:
    optimizer, _ = start(case, backend)
    optimizer.add_param_group(
        {"params": new_params(shapes=[(6,), (2, 2)], device=device_of(backend), seed=22), "lr": 0.3, "amsgrad": True}
    )
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    optimizer.param_groups.reverse()
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].append(moved)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    gone = optimizer.param_groups.pop(0)["params"]
    with watched(*gone):
        assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)


@each_implementation
@each_adamw
def test_parameters_come_and_go_between_steps(case: Case, backend: str) -> None:
    """Alternating sets of gradients, as mixtures of experts have them."""
    params = new_params(shapes=[(5,), (3, 4), (), (7,)], device=device_of(backend))
    optimizer = case.make(params, "decay", backend=backend)
    alone = []
    for param in params:
        twin = Parameter(param.detach().clone())
        alone.append((twin, case.make([twin], "decay", backend=backend)))
    for step in range(8):
        for position, param in enumerate(params):
            chosen = (step >> (position % 3)) % 2 == 0
            param.grad = new_grad(param, step, position) if chosen else None
            if chosen:
                twin, owner = alone[position]
                twin.grad = param.grad.clone()
                owner.step()
        optimizer.step()
    for param, (twin, owner) in zip(params, alone, strict=True):
        assert_same_bits(param, twin)
        for name, value in optimizer.state[param].items():
            assert_same_bits(value, owner.state[twin][name], name)


@each_implementation
@each_kind
def test_gradient_replaced_or_moved(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    for step in range(4):
        fresh, twins = fresh_from(case, backend, optimizer)
        set_grads(params, step)
        set_grads(twins, step)
        if step % 2:
            for param in params:
                assert param.grad is not None
                param.grad.data = param.grad.data.clone()
        optimizer.step()
        fresh.step()
        assert_same_results(optimizer, fresh)


# Shared memory --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@each_implementation
@each_adamw
@pytest.mark.parametrize("shape", [(8,), (300, 500)], ids=str)
def test_same_parameter_twice(case: Case, shape: tuple[int, ...], backend: str) -> None:
    """Appended to the list by hand (the constructor only warns): two updates a step, one after the other, as torch."""
    mine, theirs = (new_params(torch.float64, [shape])[0] for _ in range(2))
    one, reference = case.make([mine], backend=backend), case.make_reference([theirs])
    one.param_groups[0]["params"].append(mine)
    reference.param_groups[0]["params"].append(theirs)
    for step in range(3):
        for param, owner in ((mine, one), (theirs, reference)):
            param.grad = new_grad(param, step)
            owner.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    assert one.state[mine]["step"] == reference.state[theirs]["step"] == 6


@pytest.mark.usefixtures("two_threads")
@each_implementation
@each_adamw
@pytest.mark.parametrize("size", [40, 200_000])
@pytest.mark.parametrize("cut", ["whole", "half", "shifted"])
def test_overlapping_parameters(case: Case, cut: str, size: int, backend: str) -> None:
    """Two parameters on shared memory: updates follow one another in the order of the groups, as torch's do."""

    def views(buffer: Tensor) -> list[Parameter]:
        second = {"whole": buffer, "half": buffer[size // 2 :], "shifted": buffer[3:]}[cut]
        return [Parameter(buffer[: size - 1]), Parameter(second)]

    start = torch.linspace(-2, 2, size, dtype=torch.float64)
    buffers = [start.clone() for _ in range(2)]
    mine, theirs = (views(buffer) for buffer in buffers)
    one, reference = case.make(mine, backend=backend), case.make_reference(theirs)
    train(one, mine, 3)
    train(reference, theirs, 3)
    torch.testing.assert_close(buffers[0], buffers[1], rtol=1e-12, atol=1e-13)
    for my, their in zip(mine, theirs, strict=True):
        assert my.data_ptr() != their.data_ptr()
        assert one.state[my]["step"] == 3
        torch.testing.assert_close(one.state[my]["exp_avg"], reference.state[their]["exp_avg"])


@each_implementation
@each_adamw
def test_parameters_that_begin_to_overlap(case: Case, backend: str) -> None:
    results = []
    for make in (case.make, case.make_reference):
        params = new_params(torch.float64, [(200,), (200,)])
        options = {"backend": backend} if make == case.make else {}
        optimizer = make(params, "default", **options)
        train(optimizer, params, 2)
        params[1].data = params[0].data
        train(optimizer, params, 2, first=2)
        params[1].data = params[0].data.clone()
        train(optimizer, params, 2, first=4)
        results.append(params)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@each_implementation
@each_kind
def test_state_that_overlaps_a_parameter(case: Case, backend: str) -> None:
    """Whatever is made of it, the step must neither crash nor leave the neighbour's states wrong."""
    optimizer, params = start(case, backend)
    buffer = torch.zeros(20)
    params[0].data = buffer[:5]
    name = optimizer.state_names(optimizer.param_groups[0])[0]
    optimizer.state[params[1]][name] = buffer[8:20].view(3, 4)
    assert_next_step_is_that_of_a_fresh_one(case, backend, optimizer)
    assert buffer[5:8].eq(0).all()


@each_implementation
@each_adamw
def test_two_optimizers_share_parameters(case: Case, backend: str) -> None:
    params = new_params(shapes=FEW, device=device_of(backend))
    first = case.make(params, "decay", backend=backend)
    second = case.make(params, "all", backend=backend)
    twins = new_params(shapes=FEW, device=device_of(backend))
    third, fourth = case.make(twins, "decay", backend="eager"), case.make(twins, "all", backend="eager")
    for step in range(3):
        for owner in (first, second):
            set_grads(params, step)
            owner.step()
        for owner in (third, fourth):
            set_grads(twins, step)
            owner.step()
    assert_same_results(first, third)
    assert_same_results(second, fourth)


# Memory that was let go of --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_kind
def test_no_gradient_is_held_after_a_step(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    set_grads(params, 9)
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(grads)


# Let go of at once, without the garbage collector. Each kind of optimizer, with all that knows its parameters.
KEEPERS: dict[str, Any] = {
    "AdamW": lambda params, **o: AdamW(params, **o),
    "factors and clip": lambda params, **o: AdamW(
        params,
        lr_scale=lambda name, param: 0.5,
        weight_decay_scale={"0": 0.0},
        grad_clip=ClipGradByGlobalNorm(1.0, need_clip=lambda name, param: name != "1"),
        **o,
    ),
    "sequence": lambda params, **o: SGD(params, 0.1, 0.9, lr_scale=[0.5, 1.0, 2.0], **o),
    "layers": lambda params, **o: AdamWDL(params, layerwise_decay=0.5, **o),
    "LARC": lambda params, **o: LARC(NovoGrad(params, **o), exclude=["0"]),
    "LARC around torch's": lambda params, **o: LARC(torch.optim.SGD(params, 0.1), exclude=["0"]),
    "LAMB": lambda params, **o: LAMB(params, **o),
}
REFUSALS: dict[str, Callable[[Any], None]] = {
    "lr": lambda optimizer: optimizer.param_groups[0].update(lr="fast"),
    "state": lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][1]].update(step="late"),
    "grad": lambda optimizer: setattr(optimizer.param_groups[0]["params"][2], "grad", torch.eye(6).to_sparse()),
    "groups": lambda optimizer: optimizer.param_groups.append(None),
}


def keeper(kind: str, backend: str) -> tuple[Any, list[Parameter]]:
    params = new_params(shapes=[(7, 5), (3,), (6, 6)])
    optimizer = KEEPERS[kind]([(str(i), param) for i, param in enumerate(params)], backend=backend)
    train(optimizer, params, 2)
    return optimizer, params


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def alive(references: list[Any]) -> int:
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_a_refused_step_holds_no_gradient(kind: str, refusal: str, any_backend: str, no_collection: None) -> None:
    optimizer, params = keeper(kind, any_backend)
    set_grads(params, 9)
    REFUSALS[refusal](optimizer)
    grads = [weakref.ref(param.grad) for param in params]
    raised = False
    try:
        optimizer.step()
    except Exception:  # whatever it is; no traceback of it may live
        raised = True
    assert raised
    for param in params:
        param.grad = None
    assert alive(grads) == 0


@pytest.mark.parametrize("kind", ["AdamW", "factors and clip", "LAMB"])
def test_a_skipped_step_holds_no_gradient_and_keeps_its_plan(kind: str, any_backend: str, no_collection: None) -> None:
    optimizer, params = keeper(kind, any_backend)
    scaler = GradScaler("cpu", 4.0)
    scaler.scale(torch.zeros(()))
    set_grads(params, 9)
    params[1].grad[1] = torch.inf
    grads, plan = [weakref.ref(param.grad) for param in params], optimizer.plan
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    assert alive(grads) == 0
    train(optimizer, params, 1)
    assert optimizer.plan is plan


@pytest.mark.parametrize("kind", KEEPERS)
def test_cleared_groups_leave_nothing_behind(kind: str, any_backend: str, no_collection: None) -> None:
    optimizer, params = keeper(kind, any_backend)
    norms = optimizer.last_norms
    gone = [weakref.ref(param) for param in params]
    gone += [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    gone += [weakref.ref(param.grad) for param in params]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    del params
    assert alive(gone) == 0
    if norms is not None:
        assert all(map(torch.equal, optimizer.last_norms[1:], norms[1:]))
    others = new_params(shapes=[(4,)])
    if "LARC" not in kind and kind not in ("sequence", "layers"):  # of which new parameters have no factor
        optimizer.add_param_group({"params": [("0", others[0])]})
        train(optimizer, others, 1)
        assert optimizer.state[others[0]]["step"] == 1


@pytest.mark.usefixtures("few_to_collect")
def test_a_parameter_at_the_place_of_one_that_died(any_backend: str) -> None:
    """It has the address of the other, and not its factor."""
    params = [Parameter(torch.full((4,), 2.0))]
    optimizer = SGD([("a", params[0])], 1.0, lr_scale=lambda name, param: param[0].item(), backend=any_backend)
    params[0].grad = torch.zeros(4)
    optimizer.step()
    place = id(params[0])
    tensors = [torch.full((4,), 3.0) for _ in range(1000)]
    held = optimizer.param_groups[0]["params"]
    held.clear()
    optimizer.state.clear()
    params.clear()
    gc.collect()
    params += map(Parameter, tensors)
    param = next(param for param in params if id(param) == place)
    held.append(param)
    param.grad = torch.ones(4)
    optimizer.step()
    assert param.tolist() == [0.0] * 4


@pytest.mark.usefixtures("few_to_collect")
@each_implementation
@each_kind
def test_replaced_state_is_freed(case: Case, backend: str) -> None:
    optimizer, params = start(case, backend)
    old = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
    for state in optimizer.state.values():
        for name in list(state):
            state[name] = state[name].clone()
    train(optimizer, params, 1, first=3)
    gc.collect()
    assert [tensor() for tensor in old] == [None] * len(old)


@each_implementation
@each_kind
def test_closure_that_changes_everything(case: Case, backend: str) -> None:
    """It runs before anything of the step is read."""
    optimizer, params = start(case, backend)
    name = optimizer.state_names(optimizer.param_groups[0])[0]
    (extra,) = new_params(shapes=[(6,)], device=device_of(backend), seed=23)

    def closure() -> float:
        optimizer.param_groups[0]["lr"] = 0.4
        optimizer.param_groups[0]["params"].append(extra)
        optimizer.state[params[0]][name] = torch.ones_like(params[0])
        set_grads([*params, extra], 70)
        return 1.5

    fresh, twins = fresh_from(case, backend, optimizer)
    fresh.param_groups[0]["lr"] = 0.4
    twin = Parameter(extra.detach().clone())
    fresh.param_groups[0]["params"].append(twin)
    fresh.state[twins[0]][name] = torch.ones_like(params[0])
    assert optimizer.step(closure) == 1.5
    set_grads([*twins, twin], 70)
    fresh.step()
    assert_same_results(optimizer, fresh)
