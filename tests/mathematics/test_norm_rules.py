"""Rules with per-tensor norms, and those beside AdamW: golden data, float64, corner cases, what contradicts itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    GOLDEN,
    OF_EACH_KIND,
    RULES,
    assert_same_bits,
    device_of,
    each_backend,
    each_implementation,
    each_implementation_daily,
    each_rule,
    new_params,
    snapshot,
    train,
)
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import LAMB, LARC, LARS, SGD, Lion, NovoGrad

Make = Callable[..., torch.optim.Optimizer]


# Backends agree, and both with float64 ----------------------------------------------------------------------------

SIZES = ((), (0,), (1,), (3, 5), (513,), (64, 65), (300, 500))


def trained(rule: str, dtype: torch.dtype, backend: str, steps: int = 4, **options: Any) -> list[dict[str, Tensor]]:
    params = new_params(dtype, SIZES, device_of(backend))
    optimizer = RULES[rule](params, backend=backend, **options)
    train(optimizer, params, steps)
    return snapshot(optimizer)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], scale: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        expected = other[name].to(torch.float64)
        size = float(expected.nan_to_num(0).abs().max()) if expected.numel() else 0.0
        near = torch.allclose(value.to(torch.float64), expected, rtol=scale, atol=size * scale, equal_nan=True)
        assert near, name


@pytest.mark.every("rule")
@each_rule
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_backend_agrees_with_the_witness(rule: str, dtype: torch.dtype, backend: str, all_native: None) -> None:
    exact = not RULES[rule].sums and dtype != torch.float64  # there the witness's root may miss by an ulp
    scale = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    ours = trained(rule, dtype, backend)
    for one, other in zip(ours, trained(rule, dtype, "eager"), strict=True):
        one, other = ({name: value.cpu() for name, value in state.items()} for state in (one, other))
        if exact:
            for name in other:
                assert_same_bits(one[name], other[name], name)
        else:
            assert_close(one, other, scale)


@each_rule
@each_implementation
def test_float32_follows_float64(rule: str, backend: str) -> None:
    """One step from the same numbers: Lion's sign and a zero's neighbourhood apart, rounding is all that differs."""
    narrow, wide = (trained(rule, dtype, backend, steps=1) for dtype in (torch.float32, torch.float64))
    for one, other in zip(narrow, wide, strict=True):
        assert_close(one, other, 2e-6)


@pytest.mark.parametrize("rule", OF_EACH_KIND)
@each_implementation
@pytest.mark.parametrize("count", [2, 3])
def test_same_bits_for_any_number_of_threads(
    rule: str, backend: str, count: int, threads: Callable[[int], None]
) -> None:
    threads(1)
    expected = trained(rule, torch.float32, backend)
    threads(count)
    for one, other in zip(trained(rule, torch.float32, backend), expected, strict=True):
        for name in other:
            assert_same_bits(one[name], other[name], name)


# Corner cases, one by one -----------------------------------------------------------------------------------------


def stepped(make: Make, param: Any, *grads: Any, backend: str, **options: Any) -> tuple[Tensor, torch.optim.Optimizer]:
    """One parameter after a step for each gradient; None: a step without."""
    tensor = Parameter(torch.tensor(param, dtype=torch.float64, device=device_of(backend)))
    optimizer = make([tensor], backend=backend, **options)
    for grad in grads:
        tensor.grad = None if grad is None else torch.tensor(grad, dtype=torch.float64, device=tensor.device)
        optimizer.step()
    return tensor.detach().cpu(), optimizer


def close(tensor: Tensor, expected: list[float]) -> bool:
    return torch.allclose(tensor, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True)


def larc(variant: str | None, mode: str = "clip", lr: float = 0.1, **sgd: Any) -> Make:
    return lambda params, backend: LARC(SGD(params, lr, backend=backend, **sgd), 0.02, mode, variant=variant)


@each_implementation
@pytest.mark.parametrize(
    ("make", "param", "grad", "expected"),
    [
        # |p| = 0: OpenSeq2Seq freezes, apex and the default step unscaled.
        (larc("openseq2seq"), [0.0, 0.0], [3.0, 4.0], [-3e-8, -4e-8]),
        (larc("apex", weight_decay=0.5), [0.0, 0.0], [3.0, 4.0], [-0.3, -0.4]),
        (larc(None), [0.0, 0.0], [3.0, 4.0], [-0.3, -0.4]),
        # |g| = 0: apex does not decay, the others do.
        (larc("apex", weight_decay=0.5), [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),
        (larc(None, weight_decay=0.5), [3.0, 4.0], [0.0, 0.0], [3.0 * 0.95, 4.0 * 0.95]),
        (larc("openseq2seq", weight_decay=0.5), [3.0, 4.0], [0.0, 0.0], [3.0 * 0.95, 4.0 * 0.95]),
        # NaN: the whole tensor.
        (larc("openseq2seq"), [3.0, 4.0], [math.nan, 1.0], [math.nan, math.nan]),
        (larc("apex"), [3.0, 4.0], [math.nan, 1.0], [math.nan, math.nan]),
        (larc(None), [3.0, 4.0], [math.nan, 1.0], [math.nan, math.nan]),
        # Inf: the factor is the floor, or 0, and then the infinite element is NaN.
        (larc("openseq2seq"), [3.0, 4.0], [math.inf, 1.0], [-math.inf, 4.0 - 1e-8]),
        (larc("apex"), [3.0, 4.0], [math.inf, 1.0], [math.nan, 4.0]),
        # lr = 0.
        (larc("openseq2seq", lr=0.0), [3.0, 4.0], [1.0, 1.0], [3.0, 4.0]),
        (larc("openseq2seq", lr=0.0), [0.0, 0.0], [1.0, 1.0], [math.nan, math.nan]),
        # LARS: timm's ratio is 1 where a norm is zero or NaN, with the decay kept; without decay it is plain SGD.
        (lambda p, backend: LARS(p, 0.1, 0.0, 0.5, backend=backend), [3.0, 4.0], [0.0, 0.0], [2.85, 3.8]),
        (lambda p, backend: LARS(p, 0.1, 0.0, 0.5, backend=backend), [0.0, 0.0], [3.0, 4.0], [-0.3, -0.4]),
        (lambda p, backend: LARS(p, 0.1, 0.0, backend=backend), [3.0, 4.0], [3.0, 4.0], [2.7, 3.6]),
        (lambda p, backend: LARS(p, 0.1, 0.0, 0.5, backend=backend), [2.0, 4.0], [math.nan, 1.0], [math.nan, 3.7]),
        # timm clips the ratio of 1 too: at lr = 4 it is 0.25.
        (
            lambda p, backend: LARS(p, 4.0, 0.0, always_adapt=True, trust_clip=True, backend=backend),
            [0.0, 0.0],
            [3.0, 4.0],
            [-3.0, -4.0],
        ),
        # kozistr: one dimension is plain SGD without decay.
        (
            lambda p, backend: LARS(p, 0.1, 0.0, 0.5, variant="kozistr", backend=backend),
            [3.0, 4.0],
            [3.0, 4.0],
            [2.7, 3.6],
        ),
        # LAMB: a ratio of 1 where the parameter is zero.
        (
            lambda p, backend: LAMB(p, 0.1, (0.0, 0.0), 0.0, max_grad_norm=None, backend=backend),
            [0.0, 0.0],
            [3.0, -4.0],
            [-0.1, 0.1],
        ),
        # NovoGrad: a zero first gradient; eps = 0 makes it 0/0.
        (lambda p, backend: NovoGrad(p, 0.1, backend=backend), [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]),
        (lambda p, backend: NovoGrad(p, 0.1, eps=0.0, backend=backend), [3.0, 4.0], [0.0, 0.0], [math.nan, math.nan]),
        (lambda p, backend: NovoGrad(p, 0.1, backend=backend), [3.0, 4.0], [math.nan, 1.0], [math.nan, math.nan]),
        (lambda p, backend: NovoGrad(p, 0.1, backend=backend), [3.0, 4.0], [math.inf, 1.0], [math.nan, 4.0]),
        # Lion: the sign of a NaN is 0, as torch's.
        (lambda p, backend: Lion(p, 0.1, backend=backend), [3.0, 4.0], [math.nan, 1.0], [3.0, 3.9]),
    ],
)
def test_corner(make: Make, param: list[float], grad: list[float], expected: list[float], backend: str) -> None:
    result, _ = stepped(make, param, grad, backend=backend)
    assert close(result, expected), result


NOVOGRADS = {name: make for name, make in RULES.items() if name.startswith("NovoGrad") and name != "NovoGrad zero"}


@pytest.mark.sparingly(zeros=3, dtype=torch.float32)
@each_implementation_daily
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zeros", [1, 3])
@pytest.mark.parametrize("rule", NOVOGRADS)
def test_steps_of_zeros_leave_the_second_moment_to_the_first_gradient(
    rule: str, zeros: int, dtype: torch.dtype, backend: str
) -> None:
    """Their only trace is the step count: what follows is what would have come without them."""
    shapes = [(3,), (4, 2)]
    late, prompt = (new_params(dtype, shapes, device_of(backend)) for _ in range(2))
    delayed, undelayed = (NOVOGRADS[rule](params, backend=backend) for params in (late, prompt))
    for optimizer in (delayed, undelayed):
        optimizer.param_groups[0].update(weight_decay=0.0, bias_correction=False)
    for step in range(zeros):
        for param in late:
            param.grad = torch.zeros_like(param) if step % 2 else torch.full_like(param, -0.0)
        delayed.step()
    train(delayed, late, 3)
    train(undelayed, prompt, 3)
    for one, other in zip(snapshot(delayed), snapshot(undelayed), strict=True):
        assert one.pop("step").item() == other.pop("step").item() + zeros
        for name, value in one.items():
            assert_same_bits(value, other[name], name)


@each_implementation
@pytest.mark.parametrize(
    ("variant", "options", "step"),
    # In comments: what the sources make of it, which start from the zeros.
    [
        ("paper", {}, 0.01),  # 0.0707
        ("paper", {"init_zero": True}, 0.0707),
        ("kozistr", {}, 0.01),  # 0.0707
        ("kozistr", {"grad_averaging": True}, 0.01),  # 0.0035
        ("tfa", {}, 0.01),  # 0.316
        ("tfa", {"grad_averaging": True}, 0.01),  # 0.0316
        ("optax", {}, 0.01),  # 0.0115
        ("apex", {"bias_correction": False}, 0.001),  # 0.0316
        # 0.0074; bias correction counts the step of zeros: 0.1 / 0.19 instead of 0.1 / 0.1, and a root of 2 more.
        ("apex", {}, 0.000235),
        ("timm", {}, 0.01),
        ("openseq2seq", {}, 0.01),
    ],
)
def test_the_first_update_after_a_gradient_of_zeros(
    variant: str, options: dict[str, Any], step: float, backend: str
) -> None:
    result, optimizer = stepped(
        lambda params, backend: NovoGrad(params, 0.01, variant=variant, backend=backend, **options),
        [1.0, 1.0],
        [0.0, 0.0],
        [0.6, 0.8],
        backend=backend,
    )
    assert (1 - result).norm().item() == pytest.approx(step, rel=5e-3)
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq"].item() == pytest.approx(0.02 if options.get("init_zero") else 1.0, rel=1e-12)
    assert state["exp_avg_sq"].dtype == torch.float64
    assert state["exp_avg_sq"].shape == ()
    assert state["step"].item() == 2


@each_implementation
def test_a_first_gradient_whose_square_underflows_is_none_yet(backend: str) -> None:
    """Its second moment is 0 in float32; the next gradient is the first that there is to start from."""
    param = Parameter(torch.ones(2, device=device_of(backend)))
    optimizer = NovoGrad([param], lr=0.01, backend=backend)
    for size in (1e-30, 1.0):
        param.grad = torch.full_like(param, size)
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].item() == 2.0


@each_implementation
def test_a_loaded_state_of_zeros_starts_at_its_first_gradient(backend: str) -> None:
    """As torch.distributed.checkpoint makes one by a step of zeros before it loads."""
    param = Parameter(torch.ones(2, device=device_of(backend)))
    optimizer = NovoGrad([param], lr=0.01, backend=backend)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    other = Parameter(torch.ones(2, device=device_of(backend)))
    resumed = NovoGrad([other], lr=0.01, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    other.grad = torch.tensor([3.0, 4.0], device=other.device)
    resumed.step()
    assert resumed.state[other]["exp_avg_sq"].item() == 25.0


@each_implementation
def test_a_parameter_that_is_decayed_while_its_gradient_is_zeros_is_averaged_from_the_second_step(backend: str) -> None:
    """The published exception is one step's: later steps of zeros are averaged, but for the one that starts v."""
    make = lambda params, backend: NovoGrad(  # noqa: E731
        params, 0.01, (0.5, 0.9), weight_decay=1.0, variant="kozistr", grad_averaging=True, backend=backend
    )
    _, optimizer = stepped(make, [2.0], [0.0], [0.0], backend=backend)
    (state,) = optimizer.state.values()
    assert close(state["exp_avg"], [0.5 * 2.0 + 0.5 * 1.98])


@each_implementation
def test_second_moment_stays_infinite_but_no_nan(backend: str) -> None:
    result, optimizer = stepped(NovoGrad, [3.0, 4.0], [1.0, 1.0], [3e300, 1e300], [1.0, 1.0], backend=backend)
    (state,) = optimizer.state.values()
    assert state["exp_avg_sq"].item() == math.inf
    assert result.isfinite().all()


@each_implementation
def test_second_moment_beyond_float32_is_infinite(backend: str) -> None:
    """The norm is finite, its square is not in float32: nothing is refused in the middle of a step."""
    params = [Parameter(torch.full((2,), start)) for start in (3.0, 4.0)]
    optimizer = NovoGrad(params, lr=0.1, backend=backend)
    for param, size in zip(params, (1.0, 4e19)):
        param.grad = torch.full((2,), size)
    optimizer.step()
    assert optimizer.state[params[1]]["exp_avg_sq"].item() == math.inf
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]
    assert all(param.isfinite().all() for param in params)


@each_implementation
@pytest.mark.parametrize("kind", [NovoGrad, SGD])
def test_infinite_gradient_under_grad_scaler_changes_nothing(kind: Any, backend: str) -> None:
    options = {"momentum": 0.9, "dampening": 0.5} if kind is SGD else {}
    param = Parameter(torch.tensor([3.0, 4.0], device=device_of(backend)))
    optimizer = LARC(kind([param], 0.1, backend=backend, **options))
    scaler = torch.amp.GradScaler(param.device.type, init_scale=4.0)
    for grad in ([math.inf, 1.0], [4.0, 8.0], [8.0, 4.0]):
        scaler.scale(torch.zeros((), device=param.device))  # makes the scale tensor
        param.grad = torch.tensor(grad, device=param.device) * scaler.get_scale() / 4.0
        scaler.step(optimizer)
        scaler.update()
    expected = Parameter(torch.tensor([3.0, 4.0], device=param.device))
    plain = LARC(kind([expected], 0.1, backend=backend, **options))
    for grad in ([1.0, 2.0], [2.0, 1.0]):
        expected.grad = torch.tensor(grad, device=param.device)
        plain.step()
    assert_same_bits(param, expected)
    assert optimizer.state[param]["step"].item() == 2
    assert not hasattr(optimizer.optimizer, "found_inf")


@each_rule
@each_implementation
def test_parameter_without_gradient_is_left_alone(rule: str, backend: str) -> None:
    params = new_params(torch.float32, [(3,), (4, 2)], device_of(backend))
    before = [param.detach().clone() for param in params]
    optimizer = RULES[rule](params, backend=backend)
    train(optimizer, params[:1], 3)
    assert_same_bits(params[1], before[1])
    assert not optimizer.state[params[1]]
    late = RULES[rule](alone := [Parameter(before[1].clone())], backend=backend)
    for step in range(3):
        params[1].grad, params[0].grad = (torch.full_like(before[1], 1.5 - step), None)
        alone[0].grad = params[1].grad.clone()
        optimizer.step()
        late.step()
    assert_same_bits(params[1], alone[0])


# LARC around others, and what it is to schedulers, scalers, checkpoints -------------------------------------------


@pytest.mark.parametrize("variant", [None, "openseq2seq", "apex"])
@pytest.mark.parametrize("mode", ["clip", "scale"])
@pytest.mark.parametrize(
    ("inner", "ours"),
    [
        (
            lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1),
            lambda p: SGD(p, 0.1, 0.9, weight_decay=0.1, backend="eager"),
        ),
        (
            lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
            lambda p: fused_optim.AdamW(p, 0.1, weight_decay=0.1, backend="eager"),
        ),
    ],
)
def test_larc_around_torchs_optimizer(inner: Any, ours: Any, mode: str, variant: str | None) -> None:
    torchs, mine = (
        [(name, Parameter(torch.full((3,), 0.5 + i, dtype=torch.float64))) for i, name in enumerate(("weight", "bias"))]
        for _ in range(2)
    )
    optimizers = [
        LARC(make(params), mode=mode, variant=variant, exclude=[] if variant == "apex" else ["bias"])
        for make, params in ((inner, torchs), (ours, mine))
    ]
    for step in range(4):
        grads = [torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (step + 1)] * 2
        for params in (torchs, mine):
            for (_, param), grad in zip(params, grads):
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for (_, param), grad in zip(torchs, grads):
            assert_same_bits(param.grad, grad)
    for (_, one), (_, other) in zip(torchs, mine):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.1


def test_larc_puts_gradients_back_when_the_inner_step_raises() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("broken")

    param = Parameter(torch.ones(2))
    param.grad = grad = torch.ones(2)
    optimizer = LARC(Broken([param], 0.1, weight_decay=0.5), variant="apex")
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert param.grad is grad
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def _set_decay(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.25


def _let_decay_fall(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] *= 0.5


def _end_decay(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0


def _set_rate(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def _double_grads(optimizer: Any, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = param.grad * 2


def _write_grads(optimizer: Any, *_: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad.mul_(2)


@pytest.mark.parametrize("hook", [_set_decay, _let_decay_fall, _end_decay, _set_rate, _double_grads, _write_grads])
@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
@pytest.mark.parametrize("variant", [None, "apex"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_hooks_of_the_optimizer_inside_larc(kind: str, variant: str | None, register: str, hook: Any) -> None:
    """Around another library's optimizer they see and do what they do around one of this library."""
    results = []
    for make in (getattr(torch.optim, kind), getattr(fused_optim, kind)):
        param = Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        optimizer = LARC(make([param], lr=0.5, weight_decay=0.125), variant=variant)
        getattr(optimizer.optimizer, register)(hook)
        seen = []
        for step in range(3):
            param.grad = torch.tensor([1.0, 2.0 + step], dtype=torch.float64)
            optimizer.step()
            seen += [optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["lr"], *param.grad.tolist()]
        results.append((param.detach(), torch.tensor(seen)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", [None, "apex"])
def test_larc_around_a_step_that_calls_its_parents(variant: str | None) -> None:
    """torch then runs all hooks twice; the gradients are scaled once."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.decays = [group["weight_decay"] for group in self.param_groups]
            super().step(closure)

    results = []
    for make in (Counting, torch.optim.SGD):
        param = Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        optimizer = LARC(make([param], lr=0.5, weight_decay=0.125), variant=variant)
        for _ in range(2):
            param.grad = grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
            optimizer.step()
            assert param.grad is grad
        assert optimizer.param_groups[0]["weight_decay"] == 0.125
        results.append(param)
    assert_same_bits(*results)


def test_larc_leaves_a_decay_that_the_step_itself_has_set() -> None:
    class Scheduled(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["weight_decay"] = 0.75

    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = LARC(Scheduled([param], 0.1, weight_decay=0.5), variant="apex")
    optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.75


class Wrapper(torch.optim.Optimizer):
    """As timm's Lookahead and accelerate's: an optimizer by its class alone, whose step runs no hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure: Any = None) -> None:
        self.inner.step()


@pytest.mark.parametrize("variant", [None, "apex"])
def test_larc_around_a_wrapper_that_runs_no_hooks(variant: str | None) -> None:
    results = []
    for make in (lambda inner: Wrapper(inner), lambda inner: inner):
        param = Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        optimizer = LARC(make(torch.optim.SGD([param], lr=0.5, weight_decay=0.125)), variant=variant)
        param.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
        optimizer.step()
        results.append(param)
    assert_same_bits(*results)


def test_larc_writes_no_gradient() -> None:
    param = Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    version = param.grad._version
    LARC(SGD([param], 0.1)).step()
    assert param.grad._version == version


def test_larc_is_an_optimizer_to_others() -> None:
    params = new_params(shapes=[(3, 2), (4,)])
    optimizer = LARC(SGD(params, 0.1, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, params, 2)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
    assert calls == ["post", "post"]
    assert optimizer.state is optimizer.optimizer.state
    optimizer.zero_grad()
    assert params[0].grad is None
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2
    assert "LARC" in repr(optimizer)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("inner", [SGD, torch.optim.SGD])
def test_copies_of_larc_step_alike(clone: Callable[[LARC], LARC], inner: Any) -> None:
    params = new_params(torch.float64, [(3, 2), (4,)])
    optimizer = LARC(inner(params, 0.1, 0.9), mode="scale")
    train(optimizer, params, 2)
    other = clone(optimizer)
    others = other.param_groups[0]["params"]
    train(optimizer, params, 2, first=2)
    train(other, others, 2, first=2)
    for one, two in zip(params, others):
        assert_same_bits(one, two)


@each_implementation
def test_torchs_sgd_checkpoint_continues_in_larc(backend: str) -> None:
    """And back: the checkpoint is that of SGD alone."""
    params = new_params(torch.float64, [(3, 2)], device_of(backend))
    theirs = torch.optim.SGD(params, 0.1, 0.9, dampening=0.5)
    train(theirs, params, 2)
    mine = [Parameter(param.detach().clone()) for param in params]
    optimizer = LARC(SGD(mine, 0.5, 0.1, backend=backend), 1e9)  # a factor of 1
    optimizer.load_state_dict(theirs.state_dict())
    train(theirs, params, 2, first=2)
    train(optimizer, mine, 2, first=2)
    assert torch.allclose(params[0], mine[0], rtol=1e-12)
    again = [Parameter(param.detach().clone()) for param in mine]
    back = torch.optim.SGD(again, 0.1)
    back.load_state_dict(optimizer.state_dict())
    train(back, again, 1, first=4)
    train(theirs, params, 1, first=4)
    assert torch.allclose(params[0], again[0], rtol=1e-12)


# Other checkpoints, options, norms --------------------------------------------------------------------------------


@each_implementation
def test_timms_novograd_checkpoint_continues(backend: str) -> None:
    golden = np.load(GOLDEN / "novograd_timm_doc_float64.npz")
    shapes = json.loads(str(golden["shapes"]))
    sizes = [math.prod(shape) for shape in shapes]

    def split(flat: np.ndarray) -> list[Tensor]:
        pieces = torch.from_numpy(flat).to(device_of(backend)).split(sizes)
        return [piece.reshape(shape).clone() for piece, shape in zip(pieces, shapes)]

    params = [Parameter(value) for value in split(golden["p0"])]
    timm_group = {"lr": 0.01, "betas": (0.95, 0.98), "eps": 1e-8, "weight_decay": 1e-3, "grad_averaging": False}
    states = {
        i: {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros([])} for i, p in enumerate(params)
    }
    optimizer = NovoGrad(params, variant="timm", backend=backend)
    keys = list(range(len(params)))
    optimizer.load_state_dict({"state": states, "param_groups": [{**timm_group, "amsgrad": False, "params": keys}]})
    for grads in golden["g"]:
        for param, grad in zip(params, split(grads)):
            param.grad = grad
        optimizer.step()
    expected = golden["p"][-1]
    result = torch.cat([param.detach().flatten() for param in params]).cpu().numpy()
    assert np.abs(result - expected).max() <= 1e-9


def test_apexs_novograd_checkpoint_is_refused_with_a_remedy() -> None:
    param = Parameter(torch.ones(2))
    optimizer = NovoGrad([param], variant="apex")
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    group["exp_avg_sq"] = [torch.zeros(0), torch.ones(1)]
    with pytest.raises(ValueError, match=r"apex's FusedNovoGrad.*norm \*\* 2"):
        optimizer.load_state_dict({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [group]})
    assert not optimizer.state


@each_implementation
def test_regrouped_novograd_goes_on_with_the_same_bits(backend: str) -> None:
    params = new_params(shapes=[(3, 2), (4,)], device=device_of(backend))
    optimizer = NovoGrad(params, 0.01, backend=backend)
    train(optimizer, params, 2)
    others = [Parameter(param.detach().clone()) for param in params]
    regrouped = NovoGrad([{"params": [other]} for other in others], 0.01, backend=backend)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    saved["param_groups"] = [{**group, "params": [0]}, {**group, "params": [1]}]
    regrouped.load_state_dict(saved)
    train(optimizer, params, 2, first=2)
    train(regrouped, others, 2, first=2)
    for one, other in zip(params, others):
        assert_same_bits(one, other)


@each_implementation
def test_last_norms(backend: str) -> None:
    named = [
        (name, param) for name, param in zip("abc", new_params(shapes=[(3, 2), (4,), (2,)], device=device_of(backend)))
    ]
    optimizer = LARC(SGD(named, 0.1, backend=backend), exclude=["b"])
    assert optimizer.last_norms is None
    named[0][1].grad = torch.full((3, 2), 2.0, device=device_of(backend))
    named[1][1].grad = torch.full((4,), 3.0, device=device_of(backend))
    before = named[0][1].detach().clone()
    optimizer.step()
    norms = optimizer.last_norms
    assert norms.names == ("a", "b")
    assert norms.grad_norm.cpu().tolist() == pytest.approx([math.sqrt(24), 6.0])
    assert norms.param_norm[0].item() == pytest.approx(before.norm().item())
    assert norms.trust_ratio[1].item() == 1.0
    assert norms.trust_ratio[0].item() == pytest.approx(0.002 * before.norm().item() / (0.1 * math.sqrt(24)), rel=1e-5)
    assert fused_optim.AdamW([named[0][1]], backend=backend).last_norms is None


@each_implementation
@pytest.mark.parametrize(
    ("make", "measured"),
    [
        (lambda p, **o: NovoGrad(p, **o), [True, False, False]),
        (lambda p, **o: NovoGrad(p, variant="apex", norm_type=0, **o), [False, False, False]),
        (lambda p, **o: LAMB(p, **o), [True, True, False]),
        (lambda p, **o: LAMB(p, max_grad_norm=None, **o), [False, True, False]),
    ],
)
def test_last_norms_name_what_is_not_finite_too(make: Make, measured: list[bool], backend: str) -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make([("bad", params[0]), ("good", params[1])], backend=backend)
    params[0].grad, params[1].grad = torch.full((3,), math.nan), torch.ones(3)
    optimizer.step()
    assert optimizer.last_norms.names == ("bad", "good")
    if optimizer.last_grad_norm is not None:  # which the NaN spoils for all
        measured = [False, *measured[1:]]
    assert [bool(norm[1].isfinite()) for norm in optimizer.last_norms[1:3]] == measured[:2]


@pytest.mark.usefixtures("two_threads")
@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_accurate(dtype: torch.dtype, backend: str) -> None:
    param = Parameter(torch.ones(3_000_000, dtype=dtype, device=device_of(backend)))
    optimizer = NovoGrad([param], backend=backend)
    param.grad = (torch.arange(3_000_000, device=param.device) % 1000 / 1000 + 0.1).to(dtype)
    expected = param.grad.to(torch.float64).norm().item()
    optimizer.step()
    assert optimizer.last_norms.grad_norm.item() == pytest.approx(expected, rel=1e-6)


@each_implementation
@pytest.mark.parametrize("value", [6e4, 6e-8])
def test_norm_of_float16_near_its_limits(value: float, backend: str) -> None:
    param = Parameter(torch.ones(5000, dtype=torch.float16, device=device_of(backend)))
    optimizer = NovoGrad([param], backend=backend)
    param.grad = torch.full_like(param, value)
    optimizer.step()
    expected = param.grad.to(torch.float64).norm().item()
    assert optimizer.last_norms.grad_norm.item() == pytest.approx(expected, rel=1e-6)
    assert optimizer.state[param]["exp_avg_sq"].dtype == torch.float32


@each_rule
@each_implementation
def test_scales_are_groups_without_the_groups(rule: str, backend: str) -> None:
    """lr_scale and weight_decay_scale are what two groups with their own lr and weight_decay would be."""
    one, two = (new_params(torch.float64, [(3, 2), (4, 3)], device_of(backend)) for _ in range(2))
    scaled = RULES[rule](one, backend=backend, lr_scale=[1.0, 0.5], weight_decay_scale=[1.0, 3.0])
    grouped = RULES[rule]([{"params": [param]} for param in two], backend=backend)
    group = grouped.param_groups[1]
    group["lr"], group["weight_decay"] = group["lr"] * 0.5, group["weight_decay"] * 3.0
    train(scaled, one, 3)
    train(grouped, two, 3)
    for a, b in zip(one, two):  # "zero eps" divides zero by zero where a gradient is zero
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15, equal_nan=rule.endswith("zero eps"))


@each_rule
@each_implementation
@pytest.mark.parametrize("clip", [fused_optim.ClipGradByNorm(0.5), fused_optim.ClipGradByValue(0.01, -0.02)])
def test_clipped_inside_is_clipped_before(rule: str, clip: Any, backend: str) -> None:
    if rule in ("LARS optax", "LARS kozistr", "LARC apex, NovoGrad") and isinstance(clip, fused_optim.ClipGradByNorm):
        return  # refused, see below
    make = partial(RULES[rule], max_grad_norm=None) if RULES[rule].case.optimizer is LAMB else RULES[rule]
    one, two = (new_params(torch.float64, [(3, 2), (4, 3)], device_of(backend)) for _ in range(2))
    inside, before = make(one, backend=backend, grad_clip=clip), make(two, backend=backend)
    for step in range(3):
        for a, b in zip(one, two):
            grad = torch.linspace(-1, 1, a.numel(), dtype=a.dtype, device=a.device).reshape(a.shape) * (step - 0.5)
            a.grad, norm = grad, grad.norm()
            if isinstance(clip, fused_optim.ClipGradByNorm):
                b.grad = grad * (0.5 / norm) if norm > 0.5 else grad
            else:
                b.grad = grad.clamp(-0.02, 0.01)
            if "maximize" in inside.param_groups[0] and inside.param_groups[0]["maximize"]:
                b.grad = b.grad if isinstance(clip, fused_optim.ClipGradByNorm) else -((-grad).clamp(-0.02, 0.01))
        inside.step()
        before.step()
    for a, b in zip(one, two):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: NovoGrad(p, variant="best"), "variant must be one of .*, got 'best'"),
        (lambda p: NovoGrad(p, decoupled_decay=True), "decoupled_decay=True.*'timm' has"),
        (lambda p: NovoGrad(p, variant="apex", amsgrad=True), "no amsgrad"),
        (lambda p: NovoGrad(p, variant="apex", norm_type=1), "norm_type=1"),
        (lambda p: NovoGrad(p, variant="kozistr", fixed_decay=True), "weight_decouple=True"),
        (lambda p: NovoGrad(p, lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda p: NovoGrad(p, betas=(1.0, 0.5)), "Invalid beta parameter at index 0"),
        (lambda p: LARC(SGD(p), eta=0.0), "eta"),
        (lambda p: LARC(SGD(p), mode="clamp"), "mode='clamp'"),
        (lambda p: LARC(SGD(p), zero_norm="two"), "zero_norm='two'"),
        (lambda p: LARC(SGD(p), variant="timm"), "variant must be one of .*, got 'timm'"),
        (lambda p: LARC(SGD(p), min_update=-1.0), "min_update"),
        (lambda p: LARC(SGD(p, grad_clip=fused_optim.ClipGradByGlobalNorm(1.0))), "LARC and gradient norm clipping"),
        (lambda p: LARC(LARC(SGD(p))), "LARC around LARC"),
        (lambda p: LARC(LAMB(p)), "LARC around LAMB"),
        (lambda p: LARC(NovoGrad(p, variant="apex", norm_type=0), variant="apex"), "norm_type=0"),
        (lambda p: LARS(p, 0.1, grad_clip=fused_optim.ClipGradByGlobalNorm(1.0)), "LARS and gradient norm clipping"),
        (lambda p: LARS(p, 0.1, variant="optax", grad_clip=fused_optim.ClipGradByNorm(1.0)), "clip by value"),
        (lambda p: LARS(p, 0.1, variant="optax", trust_clip=True), "'timm'"),
        (
            lambda p: LARC(NovoGrad(p, grad_clip=fused_optim.ClipGradByNorm(1.0)), variant="apex"),
            "clip by value",
        ),
        (lambda p: LARS(p, 0.1, 0.0, nesterov=True), "Nesterov momentum requires"),
        (lambda p: LARS(p, 0.1, variant="apex"), "variant must be one of .*, got 'apex'"),
        (lambda p: LARS(p, 0.1, trust_coefficient=-1.0), "Invalid trust_coefficient value: -1.0"),
        (lambda p: LARS(p, 0.1, trust_coefficient=math.nan), "Invalid trust_coefficient value: nan"),
        (lambda p: LARS(p, 0.1, math.nan), "Invalid momentum value: nan"),
        (lambda p: LAMB(p, grad_clip=fused_optim.ClipGradByNorm(1.0)), "max_grad_norm=None"),
        (lambda p: LAMB(p, variant="best"), "variant must be one of .*, got 'best'"),
        (lambda p: LAMB(p, max_grad_norm=0.0), "greater than 0"),
        (lambda p: Lion(p, betas=(0.9, 1.0)), "Invalid beta parameter at index 1"),
        (lambda p: LARS(p, 0.1, exclude=["bias"]), "has none"),
    ],
)
def test_contradictions_are_refused(make: Make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make([Parameter(torch.ones(2))])


@pytest.mark.parametrize("make", [lambda p: LARC(p), lambda p: LARS(p, 0.1, exclude="bias")])
def test_wrong_kinds_are_refused(make: Make) -> None:
    with pytest.raises(TypeError):
        make([Parameter(torch.ones(2))])


def test_larc_around_lbfgs_is_refused() -> None:
    with pytest.raises(TypeError, match="LBFGS"):
        LARC(torch.optim.LBFGS([Parameter(torch.ones(2))]))


@each_implementation
def test_trust_coefficient_may_be_a_tensor_that_changes(backend: str) -> None:
    moved = []
    for doubled in (1.0, 2.0):
        param = Parameter(torch.ones(4))
        coefficient = torch.tensor(0.1)
        options: dict[str, Any] = {"trust_coefficient": coefficient, "always_adapt": True}
        optimizer = LARS([param], lr=0.5, momentum=0.0, backend=backend, **options)
        param.grad = torch.ones(4)
        optimizer.step()
        coefficient.mul_(doubled)
        before = param.detach().clone()
        optimizer.step()
        moved.append((before - param.detach())[0].item())
    assert moved[1] == pytest.approx(2 * moved[0])


def test_larc_warns_where_it_does_nothing(fallbacks: list[str]) -> None:
    LARC(NovoGrad([Parameter(torch.ones(2))], variant="openseq2seq"))
    assert len(fallbacks) == 1
    assert "does nothing" in fallbacks[0]


# SGD beside torch's ---------------------------------------------------------------------------------------------------

SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.5, "maximize": True},
    "tensor lr": {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9},
}


@each_implementation
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_sgd_is_torchs(options: dict[str, Any], backend: str) -> None:
    """Parameters, buffers and defaults; the second parameter gets its first gradient late."""
    ours, theirs = (new_params(torch.float64, [(3, 5), (65,)], device_of(backend)) for _ in range(2))
    optimizer = SGD(ours, **{"lr": 0.1, **options}, backend=backend)
    reference = torch.optim.SGD(theirs, **{"lr": 0.1, **options}, foreach=False)
    if "lr" not in options:
        assert optimizer.defaults == {**reference.defaults, "foreach": None}
        assert list(optimizer.param_groups[0]) == list(reference.param_groups[0])
    for step in range(4):
        for params in (ours, theirs):
            train(optimizer if params is ours else reference, params[: 1 if step < 2 else 2], 1, first=step)
    for one, other in zip(ours, theirs):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-15)
        if options.get("momentum"):
            buffers = (o.state[p]["momentum_buffer"] for o, p in ((optimizer, one), (reference, other)))
            assert torch.allclose(*buffers, rtol=1e-13, atol=1e-15)
        else:
            assert not optimizer.state[one]


@each_backend
def test_momentum_may_be_switched_on_and_scheduled(backend: str) -> None:
    """As OneCycleLR does: a new number at each step, which costs no new plan."""
    ours, theirs = (new_params(torch.float64, [(3, 5)], device_of(backend)) for _ in range(2))
    optimizer, reference = SGD(ours, 0.1, backend=backend), torch.optim.SGD(theirs, 0.1, foreach=False)
    plans: list[Any] = []
    for step, momentum in enumerate((0.0, 0.9, 0.8, 0.7)):
        for one, params in ((optimizer, ours), (reference, theirs)):
            one.param_groups[0]["momentum"] = momentum
            train(one, params, 1, first=step)
        plans.append(optimizer.plan)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-13, atol=1e-15)
    assert [plan is plans[-1] for plan in plans] == [False, True, True, True]


def test_sgd_refuses_what_torchs_refuses() -> None:
    for options in ({"lr": -1.0}, {"momentum": -0.5}, {"weight_decay": -0.1}, {"nesterov": True}):
        with pytest.raises(ValueError, match=r"Invalid|Nesterov") as theirs:
            torch.optim.SGD([Parameter(torch.ones(2))], **options)
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            SGD([Parameter(torch.ones(2))], **options)


@each_rule
@each_backend
@pytest.mark.parametrize("clip", [None, fused_optim.ClipGradByValue(0.5)])
def test_split_masters_are_float32_masters(rule: str, clip: Any, backend: str, all_native: None) -> None:
    """Norms are those of the masters, and both kinds give the same run, bit for bit, beside float32 states."""
    options = {} if clip is None or RULES[rule].case.optimizer is LAMB else {"grad_clip": clip}
    whole, split = (
        trained(rule, torch.bfloat16, backend, master_weights=kind, **options) for kind in ("float32", "split")
    )
    for one, other in zip(whole, split, strict=True):
        for name in other.keys() - {"param_remainder"}:
            assert_same_bits(one[name], other[name], name)


@each_rule
def test_master_norms_are_the_witness(rule: str) -> None:
    ours, theirs = (trained(rule, torch.bfloat16, backend, master_weights="float32") for backend in ("cpu", "eager"))
    for one, other in zip(ours, theirs, strict=True):
        assert_close({"master_param": one["master_param"]}, {"master_param": other["master_param"]}, 2e-6)


@pytest.mark.parametrize("variant", [None, "apex"])
@pytest.mark.parametrize("excluded", [False, True])
def test_larc_around_an_optimizer_that_maximizes(variant: str | None, excluded: bool) -> None:
    results = []
    for kind in (torch.optim.SGD, SGD):
        param = Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
        inner = kind([("weight", param)], 0.1, momentum=0.9, weight_decay=0.2, maximize=True)
        # An exempt tensor's decay is taken out by this library, and is in the gradient around another's optimizer.
        optimizer = LARC(inner, variant=variant, exclude=["weight"] if excluded and variant is None else None)
        for _ in range(3):
            param.grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_larc_around_an_optimizer_with_a_learning_rate_of_one_element() -> None:
    param = Parameter(torch.ones(3, 1))
    param.grad = torch.ones(3, 1)
    LARC(torch.optim.SGD([param], torch.tensor([0.1]), foreach=False), mode="clip").step()
    assert param.shape == (3, 1)
    assert (param < 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_larc_around_an_optimizer_of_16_bit_parameters(dtype: torch.dtype) -> None:
    """Norms that float16 cannot hold, and one rounding of the scaled gradient."""
    param = Parameter(torch.full((4096,), 200.0, dtype=dtype))
    param.grad = torch.full_like(param, 300.0)
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(param.grad)

    LARC(Recorder([param], 0.1), eta=0.02, mode="scale", eps=0.0).step()
    expected = torch.full_like(param, 0.02 * 200.0)
    torch.testing.assert_close(seen[0], expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_state_dict_hooks_of_larc_are_those_of_the_inner_optimizer() -> None:
    optimizer = LARC(torch.optim.SGD([Parameter(torch.ones(2))], 0.1))
    called: list[Any] = []
    optimizer.register_state_dict_pre_hook(called.append)
    optimizer.register_state_dict_post_hook(lambda o, state_dict: called.append(o))
    optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: called.append(o))
    optimizer.register_load_state_dict_post_hook(called.append)
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == [optimizer.optimizer] * 4


@each_implementation
def test_a_checkpoint_of_sgd_with_a_parameter_that_had_no_gradient_yet(backend: str) -> None:
    """torch keeps a momentum_buffer of None for it; its first gradient comes undampened."""
    results = []
    for continued in (False, True):
        params = [Parameter(torch.ones(2, dtype=torch.float64, device=device_of(backend))) for _ in range(2)]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5)
        for step in range(4):
            if step == 2:
                state_dict = optimizer.state_dict()
                state_dict["state"][1] = {"momentum_buffer": None}
                if continued:
                    optimizer = SGD(params, 0.1, momentum=0.9, dampening=0.5, backend=backend)
                optimizer.load_state_dict(state_dict)
            for param in params[: 1 if step < 2 else 2]:
                param.grad = torch.full_like(param, 1.0 + step)
            optimizer.step()
        results.append([param.detach() for param in params])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_a_clip_that_only_measures_goes_with_a_trust_ratio() -> None:
    measure = fused_optim.ClipGradByGlobalNorm(math.inf)
    param = Parameter(torch.ones(2))
    param.grad = torch.tensor([3.0, 4.0])
    optimizer = LARC(SGD([param], 0.1, grad_clip=measure))
    optimizer.step()
    assert optimizer.optimizer.last_grad_norm == 5
    LARS([param], 0.1, grad_clip=measure).step()


def test_lamb_of_the_paper_takes_no_threshold() -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=0.5: the variant 'paper' does not clip"):
        LAMB([Parameter(torch.ones(2))], variant="paper", max_grad_norm=0.5)


# How exact norms are ----------------------------------------------------------------------------------------------


def measured_norms(grad: Tensor, param: Tensor, backend: str) -> tuple[float, float, float]:
    """The norms that NovoGrad's, LARC's and LAMB's steps give one tensor: grad, grad and param."""
    found = []
    for make in (
        lambda p: NovoGrad(p, 0.0, backend=backend),
        lambda p: LARC(SGD(p, 0.0, backend=backend)),
        lambda p: LAMB(p, 0.0, max_grad_norm=None, backend=backend),
    ):
        own = Parameter(param.clone())
        own.grad = grad.clone()
        optimizer = make([own])
        optimizer.step()
        found.append(optimizer.last_norms)
    return found[0].grad_norm.item(), found[1].grad_norm.item(), found[2].param_norm.item()


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [6e-8, 3e-5, 1.0, 6e4])
def test_norms_are_exact_near_the_ends_of_float16(size: float, dtype: torch.dtype, backend: str) -> None:
    """Squares of both ends are beyond float16; sums of squares of the larger end are, too."""
    generator = torch.Generator().manual_seed(1)
    values = (0.5 + 0.5 * torch.rand(300_001, generator=generator)) * size
    tensor = values.to(device=device_of(backend), dtype=dtype)
    exact = tensor.double().norm().item()
    for norm in measured_norms(tensor, tensor, backend):
        assert norm == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow
@pytest.mark.xdist_group("large tensors")
@pytest.mark.parametrize("backend", ["cpu"])  # an interpreter would take many minutes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_100_million_elements(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    grad = torch.empty(100_000_000).uniform_(0, 1, generator=generator).to(device_of(backend)).to(dtype)
    param = torch.empty(100_000_000).uniform_(0, 3, generator=generator).to(device_of(backend)).to(dtype)
    exact = [math.sqrt(sum(piece.double().square().sum().item() for piece in t.split(1 << 20))) for t in (grad, param)]
    for norm, expected in zip(measured_norms(grad, param, backend), (exact[0], exact[0], exact[1]), strict=True):
        assert norm == pytest.approx(expected, rel=1e-6)
