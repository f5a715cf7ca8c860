"""The CUDA backend on a GPU: `pytest -m gpu`. The table of cases is held to the witness and to the cpu backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    assert_same_bits,
    assert_same_results,
    each_case,
    each_dtype,
    each_variant,
    new_grad,
    new_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor
from torch.nn import Parameter

from fused_optim import AdamW, ClipGradByGlobalNorm, extension

pytestmark = pytest.mark.gpu

RAGGED = tuple((n,) for n in (0, 1, 3, 7, 9, 257, 1023, 1024, 1025, 4097, 8193, 32769, 100003))


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.cuda() if isinstance(value, Tensor) else value

    return {key: move(value) for key, value in options.items()}


def assert_near(ours: torch.optim.Optimizer, twin: torch.optim.Optimizer) -> None:
    """Equal but for the double-precision logarithms and exponentials in prepare, which differ by an ulp."""
    for mine, theirs in zip(snapshot(ours), snapshot(twin), strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value.cpu(), theirs[key].cpu())


@each_variant
@each_dtype
def test_every_rule_and_dtype(case: Any, variant: str, dtype: torch.dtype, all_native: None) -> None:
    ours, twin = new_params(dtype, RAGGED, "cuda"), new_params(dtype, RAGGED)
    mine = case.optimizer(ours, **on_gpu(case.options(variant)), backend="cuda")
    other = case.make(twin, variant, backend="cpu")
    for optimizer in (mine, other):
        train(optimizer, params_of(optimizer), 3)
    assert mine.backend == "cuda"
    assert_near(mine, other)


@each_case
def test_the_witness_agrees(case: Any, all_native: None) -> None:
    optimizers = [case.make(new_params(device="cuda"), backend=backend) for backend in ("cuda", "eager")]
    for optimizer in optimizers:
        train(optimizer, params_of(optimizer), 3)
    assert_near(*optimizers)


@pytest.mark.parametrize("master", ["float32", "split"])
def test_master_weights(master: str, all_native: None) -> None:
    optimizers = []
    for device, backend in (("cuda", "cuda"), ("cpu", "cpu")):
        params = new_params(torch.bfloat16, RAGGED, device)
        optimizers.append(AdamW(params, master_weights=master, backend=backend))
        train(optimizers[-1], params, 3)
    assert_near(*optimizers)


def test_runs_give_the_same_bits(all_native: None) -> None:
    optimizers = []
    for _ in range(2):
        params = new_params(torch.float32, RAGGED, "cuda")
        optimizers.append(AdamW(params, backend="cuda", grad_clip=ClipGradByGlobalNorm(0.5)))
        train(optimizers[-1], params, 5)
    assert_same_results(*optimizers)
    exact = torch.cat([param.grad.double().flatten() for param in params_of(optimizers[0])]).norm()
    torch.testing.assert_close(optimizers[0].last_grad_norm.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_gradients_as_bucket_views(offset: int, all_native: None) -> None:
    results = []
    for shift in (0, offset):
        params = new_params(torch.float32, RAGGED, "cuda")
        optimizer = AdamW(params, backend="cuda")
        for position, param in enumerate(params):
            room = torch.zeros(param.numel() + 4, device="cuda")
            param.grad = room[shift : shift + param.numel()].copy_(new_grad(param, 0, position))
        optimizer.step()
        results.append(optimizer)
    assert_same_results(*results)


@pytest.mark.parametrize(("clip", "most"), [(None, 3), (ClipGradByGlobalNorm(1.0), 5)])
def test_launches(clip: Any, most: int, all_native: None) -> None:
    params = new_params(torch.float32, [(1 + i % 50,) for i in range(2000)] + [(70000,)], "cuda")
    groups = [{"params": [param]} for param in params]
    optimizer = AdamW(groups, backend="cuda", grad_clip=clip)
    train(optimizer, params, 2)
    set_grads(params, 3)
    before = extension._C.cuda_launches()
    optimizer.step()
    assert extension._C.cuda_launches() - before <= most


def test_nothing_waits_for_the_device(all_native: None) -> None:
    params = new_params(device="cuda")
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = AdamW(params, lr=lr, backend="cuda", grad_clip=ClipGradByGlobalNorm(1.0))
    train(optimizer, params, 1)
    set_grads(params, 1)
    optimizer.grad_scale = torch.tensor(2.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        assert optimizer.last_grad_norm is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grad_scaler() -> None:
    params = new_params(device="cuda")
    optimizer = AdamW(params, backend="cuda")
    train(optimizer, params, 1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = snapshot(optimizer)
    for bad in (True, False):
        set_grads(params, 2, scale=1024.0)
        if bad:
            params[-1].grad.flatten()[0] = float("inf")
        scaler.scale(torch.zeros((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
        if bad:
            for mine, old in zip(snapshot(optimizer), before, strict=True):
                for key, value in mine.items():
                    assert_same_bits(value, old[key], key)
    assert optimizer.state[params[0]]["step"].item() == 2


def test_a_stream_of_ones_own() -> None:
    ours, twin = new_params(device="cuda"), new_params(device="cuda")
    mine, other = AdamW(ours, backend="cuda"), AdamW(twin, backend="cuda")
    stream = torch.cuda.Stream()
    for step in range(4):
        set_grads(ours, step)
        set_grads(twin, step)
        torch.cuda.synchronize()
        if step % 2:
            with torch.cuda.stream(stream):
                mine.step()
        else:
            mine.step()
        other.step()
    torch.cuda.synchronize()
    assert_same_results(mine, other)


def test_graphs() -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours, twin = new_params(device="cuda"), new_params(device="cuda")
    mine = AdamW(ours, lr=lr, backend="cuda", capturable=True, grad_clip=ClipGradByGlobalNorm(1.0))
    other = AdamW(twin, lr=1e-2, backend="cuda", grad_clip=ClipGradByGlobalNorm(1.0))
    for optimizer in (mine, other):
        train(optimizer, params_of(optimizer), 1)
    for params in (ours, twin):
        set_grads(params, 2)
        params[3].grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for step in range(3):
        if step == 1:
            lr.fill_(3e-3)
            other.param_groups[0]["lr"] = float(lr)
        if step == 2:  # an eager step between replays leaves the graph's table alone
            kept = [param.grad for param in ours]
            for params in (ours, twin):
                set_grads(params, 5)
            mine.step()
            other.step()
            for param, grad in zip(twin, kept, strict=True):
                param.grad = None if grad is None else grad.clone()
        graph.replay()
        other.step()
    assert_same_results(mine, other)


def test_a_capture_before_the_first_step_is_refused() -> None:
    params = new_params(device="cuda")
    set_grads(params, 0)
    optimizer = AdamW(params, backend="cuda", capturable=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="not ready"), torch.cuda.graph(graph):
        optimizer.step()
    assert not optimizer.state


def test_memory_high_water_mark() -> None:
    params = [Parameter(torch.zeros(1 << 24, device="cuda"))]
    optimizer = AdamW(params, backend="cuda")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    numel = (1 << 31) + 1025
    param = Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    optimizer = AdamW([param], lr=1e-2, backend="cuda", grad_clip=ClipGradByGlobalNorm(float("inf")))
    optimizer.step()
    ends = param.detach()[[0, 1 << 30, (1 << 31) - 1, 1 << 31, numel - 1]]
    assert torch.equal(ends, ends[:1].expand_as(ends))
    assert ends[0] != 0
    torch.testing.assert_close(optimizer.last_grad_norm.item(), 0.5 * numel**0.5, rtol=1e-5, atol=0)
