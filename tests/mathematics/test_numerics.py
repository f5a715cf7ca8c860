"""The numbers: every backend against the witness, all of them against the mathematics, torch and golden data."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    GOLDEN,
    SHAPES,
    Case,
    Exact,
    assert_same_bits,
    assert_same_results,
    device_of,
    each_adam,
    each_adam_variant,
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
from hypothesis import given
from hypothesis import strategies as st
from support.sources import sources
from torch import Tensor

# Half a unit in the last place, relative; and half the distance between subnormal numbers.
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {
    torch.float32: np.longdouble(2) ** -150,
    torch.float64: np.longdouble(2) ** -1075,
    torch.bfloat16: np.longdouble(2) ** -134,
    torch.float16: np.longdouble(2) ** -25,
}


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)


def compute_rounding(param: Tensor) -> float:
    return ROUNDING[torch.float64 if param.dtype == torch.float64 else torch.float32]


def exact_results(
    case: Case, optimizer: Any, param: Tensor, stored: dict[str, Tensor], grad: Tensor
) -> dict[str, Exact]:
    """What one step makes of a parameter and its states as they were stored."""
    group = optimizer.param_groups[0]
    zeros = torch.zeros(param.shape)
    state = {name: array(stored.get(name, zeros)) for name in optimizer.state_names(group)}
    state["step"] = array(stored.get("step", torch.tensor(0.0)))
    with np.errstate(divide="ignore", invalid="ignore"):  # eps=0
        prepared = ROUNDING[torch.float64] / compute_rounding(param)
        return case.exact(array(stored["param"]), array(grad), state, group, prepared)


def assert_near_exact(case: Case, optimizer: Any, before: list[dict[str, Tensor]], grads: list[Tensor]) -> None:
    """The optimizer's parameters and states are one step after `before`, to the roundings that this takes."""
    for param, stored, grad in zip(optimizer.param_groups[0]["params"], before, grads, strict=True):
        for name, exact in exact_results(case, optimizer, param, stored, grad).items():
            result = param if name == "param" else optimizer.state[param][name]
            allowed = compute_rounding(param) * exact.bound + SUBNORMAL[result.dtype]
            if result.dtype in (torch.bfloat16, torch.float16):
                allowed = allowed + ROUNDING[result.dtype] * np.abs(exact.value)
            with np.errstate(invalid="ignore"):
                error = np.abs(array(result) - exact.value)
            overflows = np.abs(exact.value) > torch.finfo(result.dtype).max
            good = (error <= allowed) | (array(result) == exact.value)
            good |= overflows & (array(result) == np.copysign(np.inf, exact.value))
            good = np.where(np.isnan(exact.value), np.isnan(array(result)), good)
            if not good.all():
                raise AssertionError(
                    f"{name} of shape {tuple(param.shape)} is off by {error[~good]}; allowed are {allowed[~good]}; "
                    f"found {array(result)[~good]}, exact {exact.value[~good]}"
                )


# Against the witness --------------------------------------------------------------------------------------------


def assert_near_witness(case: Case, one: Any, witness: Any) -> None:
    """The same bits; in float64 the witness's root may miss by an ulp, and a few steps carry that on."""
    for mine, theirs in zip(snapshot(one), snapshot(witness), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if value.dtype != torch.float64:
                assert_same_bits(value, theirs[name], name)
            else:
                torch.testing.assert_close(value, theirs[name], rtol=1e-14, atol=1e-14, equal_nan=True)


@pytest.mark.usefixtures("all_native")
@each_backend
@each_dtype
@each_adam_variant
def test_float64_step_equals_the_witness_to_rounding(
    case: Case, variant: str, dtype: torch.dtype, backend: str
) -> None:
    """One step from one state: what `assert_near_witness` cannot say of float64 after several."""
    mine, theirs = (new_params(dtype, device=device_of(backend)) for _ in range(2))
    one = case.make(mine, variant, backend=backend)
    witness = case.make(theirs, variant, backend="eager")
    train(witness, theirs, steps=4)
    for param, source in zip(mine, theirs, strict=True):
        param.data.copy_(source.data)
        one.state[param] = {key: value.clone() for key, value in witness.state[source].items()}
    before = snapshot(one)
    set_grads(mine, 4)
    set_grads(theirs, 4)
    one.step()
    witness.step()
    names = one.state_names(one.param_groups[0])
    for param, source, stored in zip(mine, theirs, before, strict=True):
        assert_same_bits(one.state[param]["step"], witness.state[source]["step"])
        for name in names:
            assert_same_bits(one.state[param][name], witness.state[source][name], name)
        if dtype != torch.float64:
            assert_same_bits(param, source, "param")
            continue
        assert param.grad is not None
        bound = exact_results(case, one, param, stored, param.grad)["param"].bound
        differ = np.abs(array(param) - array(source))
        near = differ <= 2 * ROUNDING[dtype] * bound  # each is within the bound of the exact result
        assert bool(np.all(near | (np.isnan(array(param)) & np.isnan(array(source)))))


@pytest.mark.usefixtures("all_native")
@each_backend
@each_adam
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_of_another_dtype_than_the_parameter(
    case: Case, dtype: torch.dtype, state_dtype: torch.dtype, backend: str
) -> None:
    mine, theirs = (new_params(dtype, device=device_of(backend)) for _ in range(2))
    one = case.make(mine, "amsgrad", backend=backend, state_dtype=state_dtype)
    witness = case.make(theirs, "amsgrad", backend="eager", state_dtype=state_dtype)
    train(one, mine, steps=4)
    train(witness, theirs, steps=4)
    for name in one.state_names(one.param_groups[0]):
        assert {one.state[param][name].dtype for param in mine} == {state_dtype}
    assert_same_results(one, witness)


@each_kind
@each_implementation
def test_states_of_wide_parameters_may_be_narrow(case: Case, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        mine, theirs = (new_params(dtype, device=device_of(backend)) for _ in range(2))
        one = case.make(mine, backend=backend, state_dtype=torch.bfloat16)
        witness = case.make(theirs, backend="eager", state_dtype=torch.bfloat16)
        train(one, mine, steps=3)
        train(witness, theirs, steps=3)
        for name in one.state_names(one.param_groups[0]):
            assert {one.state[param][name].dtype for param in mine} == {torch.bfloat16}
        if not case.sums and not case.directions:
            assert_same_results(one, witness)


@each_kind
@pytest.mark.parametrize("state_dtype", [torch.float64, torch.int32, torch.complex64, "float32"])
def test_state_dtype_that_is_none_is_refused(case: Case, state_dtype: Any) -> None:
    with pytest.raises(ValueError, match="state_dtype="):
        case.make(new_params(), state_dtype=state_dtype)


@pytest.mark.usefixtures("all_native")
@each_backend
@each_adam
@pytest.mark.requires(torch="2.10")
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_gradient_of_another_dtype(case: Case, dtype: torch.dtype, grad_dtype: torch.dtype, backend: str) -> None:
    """torch allows it where `grad_dtype` says so; it is widened, not reinterpreted."""
    results = []
    for choice in (backend, "eager"):
        params = new_params(dtype, device=device_of(backend))
        optimizer = case.make(params, backend=choice)
        for step in range(3):
            for position, param in enumerate(params):
                param.grad_dtype = grad_dtype
                param.grad = new_grad(param, step, position).to(grad_dtype)
            optimizer.step()
        results.append(optimizer)
    assert_near_witness(case, *results)


# Against the mathematics ----------------------------------------------------------------------------------------


@each_implementation
@each_dtype
@each_adam_variant
def test_one_step_is_the_mathematics(case: Case, variant: str, dtype: torch.dtype, backend: str) -> None:
    params = new_params(dtype, device=device_of(backend))
    optimizer = case.make(params, variant, backend=backend)
    for step in (*range(4), 1000):
        before = snapshot(optimizer)
        set_grads(params, step, scale=10.0 if step == 1000 else 1.0)
        if step == 1000:
            for stored, param in zip(before, params, strict=True):
                optimizer.state[param]["step"].fill_(99_999)
                stored["step"].fill_(99_999)
        grads = [param.grad.clone() for param in params if param.grad is not None]
        optimizer.step()
        assert_near_exact(case, optimizer, before, grads)
        if variant == "zero eps" and step == 0:
            # 0/0: an element without gradient yet has no direction. Later steps need numbers to start from.
            for param in params:
                param.data.nan_to_num_(nan=0.5)


hyperparameter = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "betas": st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
        "eps": st.sampled_from([1e-15, 1e-8, 1e-3, 1.0]),
        "weight_decay": st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


@each_adam
@each_backend
@given(
    options=hyperparameter,
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
    step=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
)
def test_any_hyperparameters(
    case: Case,
    backend: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    step: int,
    scale: float,
) -> None:
    """From any state: the mathematics, and the witness's bits."""
    device = device_of(backend)
    results = []
    for choice in (backend, "eager"):
        params = new_params(dtype, [shape], seed=seed, device=device)
        optimizer = case.make(params, backend=choice, **options)
        names = optimizer.state_names(optimizer.param_groups[0])
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            state = {"step": torch.tensor(float(step), device=device)}
            for name in names:
                value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
                value = value if name == "exp_avg" else value.square()
                state[name] = value.to(device=device, dtype=dtype)
            optimizer.state[param] = state
        before = snapshot(optimizer)
        grads = [new_grad(param, seed, scale=scale) for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        if dtype != torch.float16 or scale == 1.0:  # elsewhere float16 overflows or vanishes
            assert_near_exact(case, optimizer, before, grads)
        results.append(optimizer)
    if dtype != torch.float64:
        assert_same_results(*results)


# Against torch --------------------------------------------------------------------------------------------------


@each_implementation
@each_adam_variant
def test_many_float64_steps_are_torchs(case: Case, variant: str, backend: str) -> None:
    mine, theirs = (new_params(torch.float64, device=device_of(backend)) for _ in range(2))
    one = case.make(mine, variant, backend=backend)
    reference = case.make_reference(theirs, variant)
    train(one, mine, steps=25)
    train(reference, theirs, steps=25)
    for my, their in zip(snapshot(one), snapshot(reference), strict=True):
        assert list(my) == list(their)
        for name, value in my.items():
            equal_nan = variant == "zero eps"
            torch.testing.assert_close(value, their[name], rtol=1e-12, atol=1e-13, equal_nan=equal_nan)


@each_implementation
@each_adamw
def test_many_float32_steps_stay_near_torchs(case: Case, backend: str) -> None:
    mine, theirs = (new_params(device=device_of(backend)) for _ in range(2))
    one = case.make(mine, "large eps", backend=backend)
    reference = case.make_reference(theirs, "large eps")
    train(one, mine, steps=20)
    train(reference, theirs, steps=20)
    for param, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-6)
        assert torch.equal(one.state[param]["step"], reference.state[other]["step"])


@each_implementation
@each_adamw
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_step_is_nearer_to_float64_than_torchs(case: Case, dtype: torch.dtype, backend: str) -> None:
    """torch's for-loop rounds after every operation, a rule once at the store."""
    results = []
    for make, wide in ((case.make, False), (case.make_reference, False), (case.make_reference, True)):
        (param,) = new_params(dtype, [(4096,)], device=device_of(backend))
        grad = new_grad(param, 0)
        if wide:
            param, grad = torch.nn.Parameter(param.detach().to(torch.float64)), grad.to(torch.float64)
        options = {"backend": backend} if make == case.make else {}
        param.grad = grad
        make([param], "large eps", **options).step()
        results.append(param.detach().to(torch.float64))
    mine, theirs, exact = results
    assert (mine - exact).abs().mean() <= (theirs - exact).abs().mean()


@each_implementation
@each_adam
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_and_inf_in_gradients_end_as_torchs(case: Case, dtype: torch.dtype, amsgrad: bool, backend: str) -> None:
    device = device_of(backend)
    poison = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -3.0] * 7, device=device)
    calm = torch.tensor([1.0, 0.5, -1.0, 0.25, -0.5, 1.0] * 7, device=device)
    mine, theirs = (new_params(dtype, [poison.shape], device=device)[0] for _ in range(2))
    one = case.make([mine], backend=backend, amsgrad=amsgrad)
    reference = case.make_reference([theirs], amsgrad=amsgrad)
    for grad in (calm, poison, calm, calm):
        for param in (mine, theirs):
            param.grad = grad.to(dtype)
        one.step()
        reference.step()
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.isinf(), theirs.isinf())
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert mine.isnan().any()
    assert mine.isfinite().any()


@each_backend
@each_adam
@each_dtype
def test_nan_and_inf_are_the_witnesss(case: Case, dtype: torch.dtype, backend: str) -> None:
    """In states too, and from states that hold them already."""
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 6e4, 1e-30]
    grid = torch.cartesian_prod(*(torch.tensor(values) for _ in range(3))).T
    results = []
    for choice in (backend, "eager"):
        param = torch.nn.Parameter(grid[0].to(device_of(backend), dtype, copy=True))
        optimizer = case.make([param], backend=choice, amsgrad=True)
        for step in range(2):
            param.grad = grid[1 + step].to(param)
            optimizer.step()
        results.append(snapshot(optimizer)[0])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=0, equal_nan=True)


# Golden data ----------------------------------------------------------------------------------------------------


def golden_trajectories() -> list[Any]:
    """Of every row each trajectory; an interpreter runs the first every day."""
    parameters = []
    for case in CASES:
        for golden, dtype in itertools.product(case.golden, (torch.float64, torch.float32)):
            # A float32 trajectory of Adam's is followed in float32 alone.
            if golden.endswith("float32") and dtype == torch.float64 and case.exact is not None:
                continue
            for backend in ("cpu", "triton", "eager"):
                marks = [pytest.mark.interpreted] if backend == "triton" else []
                if backend == "triton" and (golden != next(iter(case.golden)) or dtype == torch.float64):
                    marks.append(pytest.mark.slow)
                name = f"{backend}-{case.name}-{golden}-in-{str(dtype).removeprefix('torch.')}"
                parameters.append(pytest.param(case, golden, dtype, backend, id=name, marks=marks))
    return parameters


@pytest.mark.every("case")
@pytest.mark.parametrize(("case", "golden", "dtype", "backend"), golden_trajectories())
def test_golden_trajectory(case: Case, golden: str, dtype: torch.dtype, backend: str) -> None:
    data = np.load(GOLDEN / f"{golden}.npz")
    meta = json.loads(str(data["meta"]))
    shapes = json.loads(str(data["shapes"]))
    sizes = [int(np.prod(shape)) for shape in shapes]

    def split(flat: np.ndarray) -> list[Tensor]:
        pieces = torch.from_numpy(flat).to(device=device_of(backend), dtype=dtype).split(sizes)
        return [piece.reshape(shape).clone() for piece, shape in zip(pieces, shapes, strict=True)]

    named = [
        (str(name), torch.nn.Parameter(value)) for name, value in zip(data["names"], split(data["p0"]), strict=True)
    ]
    make = case.golden[golden].make
    # What the row gives as an object stands in the file in words.
    given = {"lr", "learning_rate", "foreach", *getattr(make, "keywords", ())}
    hyper = {key: value for key, value in meta["hyper"].items() if key not in given}
    optimizer = make(named, float(data["lr"][0]), backend=backend, **hyper)
    for lr, grads, expected in zip(data["lr"], data["g"], data["p"], strict=True):
        optimizer.param_groups[0]["lr"] = float(lr)
        for (_, param), grad in zip(named, split(grads), strict=True):
            param.grad = grad
        optimizer.step()
        result = torch.cat([param.detach().flatten() for _, param in named]).cpu().to(torch.float64).numpy()
        error = np.abs(result - expected) / np.maximum(1, np.abs(expected))
        # Float32 has its own error beside that of an oracle whose hyperparameters are float32.
        tolerance = case.golden[golden].tolerance
        assert error.max() <= tolerance + (2e-6 if dtype == torch.float32 and tolerance != 2e-6 else 0)


def test_every_golden_file_is_held() -> None:
    files = {path.stem for path in sources("tests/golden", ".npz", at_least=35)}
    files -= {"timm_layer_decay", "states_torchao_adamw8bit", "states_bitsandbytes_adamw8bit"}  # no trajectories
    assert files == {golden for case in CASES for golden in case.golden}


# What a step depends on -----------------------------------------------------------------------------------------


@each_implementation
@each_kind
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_of_any_one_element_shape(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    lr = torch.full(shape, 0.015625, dtype=dtype)  # a power of two: the same number in every dtype
    mine, theirs = (new_params(device=device_of(backend)) for _ in range(2))
    one = case.make(mine, backend=backend, lr=lr)
    other = case.make(theirs, backend=backend, lr=0.015625)
    train(one, mine, steps=2)
    train(other, theirs, steps=2)
    lr.fill_(0.25)
    other.param_groups[0]["lr"] = 0.25
    train(one, mine, steps=2, first=2)
    train(other, theirs, steps=2, first=2)
    assert one.param_groups[0]["lr"] is lr
    assert_same_results(one, other)


@each_implementation
@each_adamw
def test_late_parameter_gets_its_own_bias_correction(case: Case, backend: str) -> None:
    first, late = new_params(device=device_of(backend), shapes=[(5, 7), (5, 7)])
    optimizer = case.make([first, late], backend=backend)
    start = late.detach().clone()
    for step in range(3):
        first.grad = new_grad(first, step)
        optimizer.step()
    assert_same_bits(late, start)
    assert late not in optimizer.state
    (alone,) = new_params(device=device_of(backend), shapes=[(5, 7)])
    alone.data.copy_(start)
    fresh = case.make([alone], backend=backend)
    for step in range(2):
        late.grad = new_grad(late, step)
        alone.grad = late.grad.clone()
        optimizer.step()
        fresh.step()
    assert_same_bits(late, alone)
    assert optimizer.state[late].get("step", 2) == 2
    assert optimizer.state[first].get("step", 5) == 5


@each_implementation
@each_kind
def test_parameter_without_gradient_is_untouched(case: Case, backend: str) -> None:
    """No decay, no step, and the states stay as they were."""
    params = new_params(device=device_of(backend))
    optimizer = case.make(params, "decay", backend=backend)
    train(optimizer, params, steps=2)
    before = snapshot(optimizer)
    for param in params[::2]:
        param.grad = None
    optimizer.step()
    after = snapshot(optimizer)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if index % 2 == 0:
            for name, value in old.items():
                assert_same_bits(value, new[name], name)
        else:
            assert new.get("step", 3) == 3


@each_implementation
@each_dtype
@each_kind
def test_zero_gradient_with_zero_lr_changes_no_parameter(case: Case, dtype: torch.dtype, backend: str) -> None:
    """How torch.distributed.checkpoint makes an optimizer create its state."""
    for lr in (0.0, torch.tensor(0.0)):
        params = new_params(dtype, device=device_of(backend))
        params[4].data[0] = -0.0
        optimizer = case.make(params, "all", backend=backend, lr=lr)
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert_same_bits(param, old, "param")
            assert optimizer.state[param].get("step", 1) == 1


@each_implementation
@each_kind
def test_split_into_groups_does_not_matter(case: Case, backend: str) -> None:
    results = []
    for size in (1, 3, len(SHAPES)):
        params = new_params(device=device_of(backend))
        groups = [{"params": params[start : start + size]} for start in range(0, len(params), size)]
        optimizer = case.make(groups, "all", backend=backend)
        train(optimizer, params, steps=3)
        results.append(optimizer)
    assert_same_results(results[0], results[1])
    assert_same_results(results[0], results[2])


@each_implementation
@each_adam
def test_groups_have_their_own_hyperparameters(case: Case, backend: str) -> None:
    settings = [
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 1e-3, "betas": (0.5, 0.6), "maximize": True},
        {"eps": 1e-2, "amsgrad": True},
    ]
    together = [new_params(device=device_of(backend), seed=seed) for seed in range(3)]
    apart = [new_params(device=device_of(backend), seed=seed) for seed in range(3)]
    one = case.make([{"params": p, **s} for p, s in zip(together, settings, strict=True)], backend=backend)
    for params in together:
        set_grads(params, 0)
    one.step()
    expected = []
    for params, setting in zip(apart, settings, strict=True):
        optimizer = case.make(params, backend=backend, **setting)
        set_grads(params, 0)
        optimizer.step()
        expected += snapshot(optimizer)
    for my, their in zip(snapshot(one), expected, strict=True):
        assert my.keys() == their.keys()
        for name, value in my.items():
            assert_same_bits(value, their[name], name)


@each_implementation
@each_adamw
def test_dtypes_and_devices_mix_in_one_group(case: Case, backend: str) -> None:
    mixed = [param for dtype in DTYPES for param in new_params(dtype, device=device_of(backend))]
    optimizer = case.make(mixed, backend=backend)
    for dtype_index in range(len(DTYPES)):
        set_grads(mixed[dtype_index * len(SHAPES) : (dtype_index + 1) * len(SHAPES)], 0)
    optimizer.step()
    together = snapshot(optimizer)
    for dtype_index, dtype in enumerate(DTYPES):
        params = new_params(dtype, device=device_of(backend))
        alone = case.make(params, backend=backend)
        train(alone, params, steps=1)
        for my, their in zip(together[dtype_index * len(SHAPES) :], snapshot(alone), strict=False):
            for name, value in their.items():
                assert_same_bits(value, my[name], name)


@each_implementation
@each_kind
def test_runs_are_repeatable(case: Case, backend: str) -> None:
    results = []
    for _ in range(2):
        params = new_params(device=device_of(backend), shapes=[(300, 1000), (17,)])
        optimizer = case.make(params, backend=backend)
        train(optimizer, params, steps=3)
        results.append(optimizer)
    assert_same_results(*results)
