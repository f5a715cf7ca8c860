"""GradScaler: nothing writes the gradients, and everything else is as with torch's."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    RULES,
    assert_same_bits,
    assert_same_snapshots,
    bits,
    each_backend,
    each_dtype,
    each_implementation,
    each_rule,
    inner,
    new_grad,
    new_params,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

from fused_optim import (
    LAMB,
    LARC,
    SGD,
    Adam,
    AdamW,
    AdamWDL,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    GradScaler,
    NovoGrad,
    grad_scaler,
)

SHAPES = [(), (7,), (3, 5), (0,), (1100,)]
CLIPS = {
    "no clip": None,
    "global norm": ClipGradByGlobalNorm(0.5),
    "norm": ClipGradByNorm(0.5),
    "value": ClipGradByValue(0.25),
}
each_clip = pytest.mark.parametrize("clip", CLIPS)
SCALE = 1024.0


@pytest.fixture
def no_unscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel that reads and writes every gradient is not called."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the gradients were unscaled in place")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", refuse)


def start_scale(scaler: torch.amp.GradScaler) -> None:
    scaler.scale(torch.zeros(()))  # makes the scale tensor


def put_grads(params: list[Any], step: int, scale: float, bad: float | None) -> None:
    for position, param in enumerate(params):
        param.grad = (new_grad(param, step, position).double() * scale).to(param.dtype)
    if bad is not None:
        params[-1].grad.flatten()[-1] = bad


def run(
    make: Callable[[list[Parameter]], Any],
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype = torch.float32,
    unscale: bool = False,
) -> tuple[Any, list[Any]]:
    """Six steps, two of them with an element that is not finite; no step may change a gradient."""
    params = new_params(dtype, SHAPES)
    optimizer = make(params)
    if type(scaler) is not GradScaler:
        inner(optimizer)._step_supports_amp_scaling = True
    start_scale(scaler)
    history: list[Any] = []
    for step in range(6):
        bad = {0: math.inf, 3: math.nan}.get(step)
        put_grads(params, step, scaler.get_scale(), bad)
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(inner(optimizer))
        grads = [(param.grad.clone(), param.grad, param.grad._version) for param in params]
        scaler.step(optimizer)
        scaler.update()
        for param, (kept, grad, version) in zip(params, grads, strict=True):
            assert param.grad is grad
            assert_same_bits(grad, kept, "gradient")
            if type(scaler) is GradScaler and not unscale:
                assert grad._version == version
        for old, new in zip(before, snapshot(inner(optimizer)), strict=True) if bad is not None else ():
            for name in old:
                assert_same_bits(old[name], new[name], f"{name} of a step that was skipped")
            assert float(new.get("step", 0)) == float(old.get("step", 0))
        history.append((scaler.get_scale(), inner(optimizer).last_grad_norm if bad is None else None))
    return optimizer, history


def assert_same_runs(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> None:
    assert one[1] == other[1]
    assert_same_snapshots(snapshot(inner(one[0])), snapshot(inner(other[0])))


# Beside torch's -------------------------------------------------------------------------------------------------


@each_implementation
@each_dtype
@each_clip
def test_same_bits_as_torchs_scaler(clip: str, dtype: torch.dtype, backend: str) -> None:
    def make(params: list[Parameter]) -> AdamW:
        return AdamW(params, 0.01, backend=backend, grad_clip=CLIPS[clip])

    options = {"init_scale": SCALE, "growth_interval": 2}
    assert_same_runs(
        run(make, GradScaler("cpu", **options), dtype), run(make, torch.amp.GradScaler("cpu", **options), dtype)
    )


@each_implementation
@each_rule
def test_same_bits_as_torchs_scaler_for_every_rule(rule: str, backend: str) -> None:
    def make(params: list[Parameter]) -> Any:
        return RULES[rule](params, backend=backend)

    assert_same_runs(run(make, GradScaler("cpu", SCALE)), run(make, torch.amp.GradScaler("cpu", SCALE)))


@each_backend
def test_the_gradients_are_read_and_not_unscaled(backend: str, no_unscaling: None, all_native: None) -> None:
    run(lambda params: AdamW(params, backend=backend, grad_clip=CLIPS["global norm"]), GradScaler("cpu", SCALE))


@each_implementation
def test_same_as_torchs_optimizer_under_torchs_scaler(backend: str) -> None:
    mine, my_scales = run(lambda params: AdamW(params, 0.01, backend=backend), GradScaler("cpu", 1000.0))
    theirs = new_params(torch.float32, SHAPES)
    reference = torch.optim.AdamW(theirs, 0.01, foreach=False)
    scaler = torch.amp.GradScaler("cpu", 1000.0)
    start_scale(scaler)
    scales = []
    for step in range(6):
        put_grads(theirs, step, scaler.get_scale(), {0: math.inf, 3: math.nan}.get(step))
        scaler.step(reference)
        scaler.update()
        scales.append(scaler.get_scale())
    assert [scale for scale, _ in my_scales] == scales
    for one, other in zip(snapshot(mine), snapshot(reference), strict=True):
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_not_rounded_once_more(dtype: torch.dtype) -> None:
    """With plain gradient descent the state after the division shows: ours is the exact quotient, rounded at the
    store; after unscale_ it is off by the rounding of the gradient."""
    values = torch.linspace(0.9, 1.9, 1001).to(dtype)
    exact = values.double() / 3.0
    results = {}
    for scaler in (GradScaler("cpu", 3.0), torch.amp.GradScaler("cpu", 3.0)):
        param = Parameter(torch.zeros(1001, dtype=dtype))
        optimizer = SGD([param], 1.0, 0.9, state_dtype=torch.float32)
        start_scale(scaler)
        param.grad = values.clone()
        if type(scaler) is not GradScaler:
            param.grad = (values.float() / 3.0).to(dtype)  # what unscale_ leaves; torch refuses it for float16
            scaler = torch.amp.GradScaler("cpu", enabled=False)
        scaler.step(optimizer)
        results[type(scaler)] = optimizer.state[param]["momentum_buffer"].double()
    unit = torch.finfo(dtype).eps / 2
    bound = {GradScaler: 2.0**-23, torch.amp.GradScaler: 1.01 * unit}
    for kind, result in results.items():
        assert ((result - exact).abs() <= bound[kind] * exact).all()
    assert ((results[torch.amp.GradScaler] - exact).abs() > unit / 4 * exact).any()


@pytest.mark.parametrize("source", [GradScaler, torch.amp.GradScaler])
def test_state_dict_is_torchs(source: Any) -> None:
    target = torch.amp.GradScaler if source is GradScaler else GradScaler
    _, history = run(AdamW, scaler := source("cpu", SCALE, growth_interval=2))
    other = target("cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == history[-1][0]
    assert run(AdamW, other)[1] == run(AdamW, scaler)[1]
    assert pickle.loads(pickle.dumps(other)).state_dict() == other.state_dict()


def test_arguments_and_their_errors_are_torchs() -> None:
    scaler = GradScaler(device="cpu", init_scale=2.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.state_dict() == {
        "scale": 2.0,
        "growth_factor": 3.0,
        "backoff_factor": 0.25,
        "growth_interval": 5,
        "_growth_tracker": 0,
    }
    with pytest.raises(AssertionError, match="growth factor"):
        GradScaler("cpu", growth_factor=1.0)


def test_disabled_is_the_optimizer_alone() -> None:
    (param,), (twin,) = (new_params(shapes=[(5,)]) for _ in range(2))
    scaler = GradScaler("cpu", enabled=False)
    one, other = AdamW([param]), AdamW([twin])
    param.grad, twin.grad = new_grad(param, 0), new_grad(twin, 0)
    assert scaler.scale(param) is param
    scaler.step(one)
    scaler.update()
    other.step()
    assert_same_snapshots(snapshot(one), snapshot(other))


# What is not finite ---------------------------------------------------------------------------------------------


def found(optimizer: Any) -> bool:
    scaler = GradScaler("cpu", 4.0)
    start_scale(scaler)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() == 2.0


@each_implementation
@each_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_every_element_is_looked_at(bad: float, dtype: torch.dtype, backend: str) -> None:
    """Around the lanes and the tiles of the loops, and where a clip would have hidden it."""
    for numel, place in [(1, 0), (63, 62), (64, 0), (65, 64), (511, 511 - 64), (513, 512), (1500, 700)]:
        param = Parameter(torch.ones(numel, dtype=dtype))
        param.grad = torch.ones_like(param)
        param.grad[place] = bad
        optimizer = AdamW([param], backend=backend, grad_clip=CLIPS["value"])
        assert found(optimizer), (numel, place)
        assert torch.equal(param, torch.ones_like(param))


@pytest.mark.usefixtures("two_threads")
@each_backend
def test_the_threads_pieces_are_looked_at(backend: str) -> None:
    param, small = Parameter(torch.zeros(500_000)), Parameter(torch.zeros(3))
    for place in (0, 131_071, 131_072, 499_999, None):
        param.grad, small.grad = torch.ones_like(param), torch.ones_like(small)
        if place is not None:
            param.grad[place] = math.inf
        assert found(AdamW([small, param], backend=backend)) == (place is not None)


@each_implementation
@pytest.mark.parametrize(
    ("dtype", "large"),
    [
        (torch.float32, 3e38),
        (torch.float32, 3e19),
        (torch.bfloat16, 3e38),
        (torch.float64, 1e300),
        (torch.float16, 6e4),
    ],
    ids=str,
)
@each_clip
def test_large_gradients_are_finite(clip: str, dtype: torch.dtype, large: float, backend: str) -> None:
    """Their squares are not."""
    param = Parameter(torch.zeros(100, dtype=dtype))
    param.grad = torch.full_like(param, large)
    optimizer = AdamW([param], backend=backend, grad_clip=CLIPS[clip])
    assert not found(optimizer)
    assert optimizer.state[param]["step"] == 1


@each_implementation
def test_a_parameter_that_is_not_clipped_counts_too(backend: str) -> None:
    params = [(name, Parameter(torch.zeros(3))) for name in "ab"]
    for _, param in params:
        param.grad = torch.ones_like(param)
    params[1][1].grad[1] = math.inf
    clip = ClipGradByGlobalNorm(1.0, need_clip=lambda name, param: name == "a")
    assert found(AdamW(params, backend=backend, grad_clip=clip))


def test_rows_of_the_witness_count_too() -> None:
    """Complex numbers, and layouts that the native backend leaves to it, beside rows that it takes."""
    for bad in (None, 0, 1, 2):
        params = [
            Parameter(torch.zeros(4, dtype=torch.complex64)),
            Parameter(torch.zeros(4, 4)),
            Parameter(torch.zeros(5)),
        ]
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = torch.ones(4, 4).t() * 2
        params[2].grad = torch.ones_like(params[2])
        if bad is not None:
            params[bad].grad.flatten()[-1].fill_(math.nan) if bad else params[0].grad.imag.fill_(math.inf)
            params[1].grad[3, 3] = math.nan if bad == 1 else 2
        optimizer = AdamW(params, grad_clip=CLIPS["global norm"])
        assert found(optimizer) == (bad is not None)
        assert all(torch.equal(param, torch.zeros_like(param)) == (bad is not None) for param in params)


@each_implementation
@pytest.mark.parametrize("bad", [False, True])
def test_sparse_gradients(bad: bool, backend: str, no_unscaling: None) -> None:
    param = Parameter(torch.ones(6, 4))
    values = torch.ones(3, 4)
    values[2, 1] = math.inf if bad else 1.0
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), values, param.shape, check_invariants=True)
    optimizer = AdamW([param], lazy_mode=True, backend=backend, grad_clip=CLIPS["global norm"])
    grad = param.grad
    assert found(optimizer) == bad
    assert param.grad is grad
    assert not grad.is_coalesced()
    assert torch.equal(grad._values(), values)
    assert [bool((row == 1).all()) for row in param] == [True, bad, True, True, bad, True]


@each_implementation
@pytest.mark.parametrize("master", ["float32", "split"])
def test_masters_stay_with_their_parameters(master: str, backend: str) -> None:
    def make(params: list[Parameter]) -> AdamW:
        return AdamW(params, 0.01, backend=backend, master_weights=master)

    assert_same_runs(
        run(make, GradScaler("cpu", SCALE), torch.bfloat16),
        run(make, torch.amp.GradScaler("cpu", SCALE), torch.bfloat16),
    )


# Several optimizers, and those that go torch's way ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_several_optimizers_share_one_scale(bad: int | None) -> None:
    """Each skips its own step; the scale falls once. The third is torch's own."""
    params = [Parameter(torch.ones(4)) for _ in range(3)]
    optimizers = [AdamW([params[0]]), LARC(SGD([params[1]], 0.1)), torch.optim.AdamW([params[2]])]
    scaler = GradScaler("cpu", 4.0)
    start_scale(scaler)
    for index, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
        param.grad = torch.full((4,), math.inf if index == bad else 4.0)
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (4.0 if bad is None else 2.0)
    assert [torch.equal(param, torch.ones(4)) for param in params] == [index == bad for index in range(3)]
    assert [param.grad[0].item() for param in params] == [
        math.inf if index == bad else grad for index, grad in enumerate((4.0, 4.0, 1.0))
    ]


@each_implementation
@pytest.mark.parametrize("scaler", [GradScaler, torch.amp.GradScaler])
def test_unscaling_by_the_user_is_torchs(scaler: Any, backend: str) -> None:
    """And is clipped by torch.nn.utils, and stepped as it stands then."""
    params = new_params(shapes=SHAPES)
    twins = new_params(shapes=SHAPES)
    mine, other = (AdamW(group, 0.1, backend=backend) for group in (params, twins))
    amp = scaler("cpu", SCALE)
    start_scale(amp)
    for step in range(3):
        put_grads(params, step, SCALE, None)
        put_grads(twins, step, 1.0, None)
        amp.unscale_(mine)
        with pytest.raises(RuntimeError, match="already been called"):
            amp.unscale_(mine)
        for param, twin in zip(params, twins, strict=True):
            assert_same_bits(param.grad, twin.grad)
        for group in (params, twins):
            torch.nn.utils.clip_grad_norm_(group, 0.5)
        amp.step(mine)
        amp.update()
        other.step()
    assert_same_snapshots(snapshot(mine), snapshot(other))


def test_an_optimizer_that_leaves_scaling_to_the_scaler() -> None:
    """What a framework that clips between unscaling and step asks for."""
    (param,), (twin,) = (new_params(shapes=[(5,)]) for _ in range(2))
    one, other = AdamW([param]), AdamW([twin])
    one._step_supports_amp_scaling = False
    scaler = GradScaler("cpu", 8.0)
    start_scale(scaler)
    param.grad, twin.grad = torch.full((5,), 8.0), torch.ones(5)
    scaler.step(one)
    scaler.update()
    other.step()
    assert_same_bits(param.grad, twin.grad)
    assert_same_snapshots(snapshot(one), snapshot(other))
    param.grad = torch.full((5,), math.inf)
    scaler.step(one)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same_snapshots(snapshot(one), snapshot(other))


# torch's protocol: who takes the scale out of the gradients ----------------------------------------------------------

FUSED = {"AdamW": AdamW, "Adam": Adam, "AdamWDL": AdamWDL, "SGD": lambda params, **o: SGD(params, 0.1, 0.9, **o)}


@pytest.mark.parametrize("kind", FUSED)
def test_the_protocol_is_offered_as_torch_offers_it(kind: str) -> None:
    """With fused=True alone, and in every copy; this library's scaler leaves the gradients scaled either way."""
    for fused in (None, False, True):
        optimizer = FUSED[kind]([Parameter(torch.ones(3))], fused=fused)
        copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        around = [LARC(each) for each in (*copies, optimizer)]
        for each in (optimizer, *copies, *around):
            assert each._step_supports_amp_scaling is bool(fused)
            assert each._step_finds_inf
    for optimizer in (NovoGrad([Parameter(torch.ones(3))]), LAMB([Parameter(torch.ones(3))])):
        assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_torchs_scaler_unscales_as_for_torchs_optimizer(kind: str, clipped: bool, any_backend: str) -> None:
    """Gradients, steps and scales are those of the stock optimizer, with a clip of torch's between."""
    stock = {"AdamW": torch.optim.AdamW, "SGD": lambda params, **o: torch.optim.SGD(params, 0.1, 0.9, **o)}[kind]
    histories = []
    for make in (lambda params: FUSED[kind](params, backend=any_backend), lambda params: stock(params, foreach=False)):
        params = new_params(torch.float32, SHAPES)
        optimizer, scaler = make(params), torch.amp.GradScaler("cpu", SCALE)
        start_scale(scaler)
        history: list[Any] = []
        for step in range(5):
            put_grads(params, step, scaler.get_scale(), {0: math.inf, 3: math.nan}.get(step))
            if clipped:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 0.5, foreach=False)
            scaler.step(optimizer)
            scaler.update()
            history += [scaler.get_scale(), *(param.grad.clone() for param in params)]
        histories.append((history, [param.detach().clone() for param in params]))
    for one, other in zip(histories[0][0], histories[1][0], strict=True):
        assert one == other if isinstance(one, float) else torch.equal(bits(one), bits(other))
    for one, other in zip(histories[0][1], histories[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("ours", [False, True])
def test_scaling_goes_on_after_a_default_checkpoint(ours: bool, fused: bool | None, kind: str) -> None:
    """It holds fused=None, over which torch's own AdamW(fused=True) stumbles."""
    (param,), (twin,) = (new_params(shapes=[(5,)]) for _ in range(2))
    optimizer, plain = FUSED[kind]([param], fused=fused), FUSED[kind]([twin])
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer._step_supports_amp_scaling is bool(fused)
    scaler = (GradScaler if ours else torch.amp.GradScaler)("cpu", 8.0)
    start_scale(scaler)
    for step in range(3):
        twin.grad = new_grad(twin, step)
        param.grad = twin.grad * scaler.get_scale()
        if step == 1:
            param.grad[2] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            plain.step()
    assert scaler.get_scale() == 4.0
    assert_same_snapshots(snapshot(optimizer), snapshot(plain))


def test_larc_around_an_optimizer_of_torchs() -> None:
    param = Parameter(torch.ones(4))
    scaler = GradScaler("cpu", 8.0)
    start_scale(scaler)
    param.grad = torch.full((4,), 8.0)
    optimizer = LARC(torch.optim.SGD([param], 0.1), eta=1.0, mode="scale")
    scaler.step(optimizer)
    assert torch.equal(param.grad, torch.ones(4))
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.9))


class Wrapped(Tensor):
    """A tensor that is not plain memory, as DTensor is."""

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: NotImplemented)  # type: ignore[assignment]


def test_tensor_subclasses_go_torchs_way() -> None:
    """Their other parts may be with other processes: this one's alone decide nothing."""
    plain, wrapped = Parameter(torch.ones(2)), torch.ones(2).as_subclass(Wrapped)
    plain.grad = torch.ones(2)
    optimizer = AdamW([plain])
    assert grad_scaler.finds_inf_itself(optimizer)
    optimizer.param_groups[0]["params"].append(wrapped)
    assert not grad_scaler.finds_inf_itself(optimizer)


# Misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_misuse_raises_as_torchs_does(kind: Any) -> None:
    param = Parameter(torch.ones(2))
    optimizer, scaler = AdamW([param]), kind("cpu")
    param.grad = torch.ones(2)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    start_scale(scaler)
    with pytest.raises(RuntimeError, match="Closure use"):
        scaler.step(optimizer, closure=lambda: 0.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    param.grad = None
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(optimizer)
    scaler.step(AdamW([param], fused=True))
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    param = Parameter(torch.ones(2))
    optimizer, scaler = AdamW([param], 0.1), GradScaler("cpu", 4.0)
    start_scale(scaler)
    param.grad = torch.full((2,), 4.0)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        scaler.step(optimizer)
    assert not optimizer.finds_inf
    assert not {"grad_scale", "found_inf", "finds_inf"} & set(vars(optimizer))
    optimizer.param_groups[0]["lr"] = 0.1
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[param]["step"] == 1


def test_a_scale_of_the_users_own_is_multiplied() -> None:
    param = Parameter(torch.ones(2))
    optimizer, scaler = SGD([param], 0.5), GradScaler("cpu", 4.0)
    start_scale(scaler)
    param.grad = torch.full((2,), 8.0)
    optimizer.grad_scale = torch.tensor(2.0)
    scaler.step(optimizer)
    assert torch.equal(param, torch.full((2,), 0.5))
    assert "grad_scale" not in vars(optimizer)


def test_a_closure_is_seen_before_the_check() -> None:
    param = Parameter(torch.ones(2))
    optimizer, scaler = AdamW([param]), GradScaler("cpu", 4.0)
    start_scale(scaler)
    param.grad = torch.full((2,), 4.0)

    def closure() -> float:
        param.grad.fill_(math.inf)
        return 3.0

    assert scaler.step(optimizer, closure) == 3.0
    assert torch.equal(param, torch.ones(2))


# With autocast, and in two threads ------------------------------------------------------------------------------------


def losses(make_scaler: Any) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    inputs, targets = torch.randn(16, 4), torch.randn(16, 1)
    optimizer = AdamW(model.parameters(), 1e-2, grad_clip=ClipGradByGlobalNorm(1.0))
    scaler = make_scaler("cpu", 2.0**20)  # the first backward passes overflow float16
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = torch.nn.functional.mse_loss(model(inputs).float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        history.append((loss.item(), scaler.get_scale()))
    return history


def test_training_under_autocast_is_that_of_torchs_scaler() -> None:
    ours = losses(GradScaler)
    assert ours == losses(torch.amp.GradScaler)
    assert ours[-1][1] < 2.0**20  # some steps were skipped
    assert ours[-1][0] < ours[0][0]


def test_two_scalers_in_two_threads() -> None:
    def train(results: list[Any]) -> None:
        results.append(run(lambda params: AdamW(params), GradScaler("cpu", SCALE)))

    results: list[Any] = []
    threads = [threading.Thread(target=train, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_same_runs(*results)


def test_a_scale_that_has_fallen_to_zero_skips_the_step() -> None:
    """As with torch's scaler, after more infinities than float32 has halves."""
    param = Parameter(torch.ones(2))
    optimizer = AdamW([param])
    scaler = GradScaler("cpu", init_scale=1.0, backoff_factor=1e-30)
    for _ in range(4):
        param.grad = scaler.scale(torch.ones(2)) * float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0
    assert param.tolist() == [1.0, 1.0]
