"""What only a GPU shows: launches, graphs, streams, what waits, memory. Results are those of test_phases.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from cases import (
    RULES,
    assert_near,
    assert_same_bits,
    assert_same_results,
    each_adam,
    each_dtype,
    each_rule,
    eighths,
    inner,
    new_params,
    params_of,
    set_grads,
    snapshot,
    step_exactly,
    train,
)
from torch.nn import Parameter

from fused_optim import AdamW, ClipGradByGlobalNorm, GradScaler
from fused_optim.backends import extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

RAGGED = tuple((n,) for n in (0, 1, 3, 7, 9, 257, 1023, 1024, 1025, 4097, 8193, 32769, 100003))


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """What a test that fails may leave behind is not the next one's."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_stream(torch.cuda.default_stream())


@contextmanager
def without_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_adam
def test_the_witness_agrees(case: Any, backend: str, all_native: None) -> None:
    optimizers = [case.make(new_params(device="cuda"), backend=name) for name in (backend, "eager")]
    for optimizer in optimizers:
        train(optimizer, params_of(optimizer), 3)
    assert_near(*optimizers)


def test_runs_give_the_same_bits(backend: str, all_native: None) -> None:
    optimizers = []
    for _ in range(2):
        params = new_params(torch.float32, RAGGED, "cuda")
        optimizers.append(AdamW(params, backend=backend, grad_clip=ClipGradByGlobalNorm(0.5)))
        train(optimizers[-1], params, 5)
    assert_same_results(*optimizers)
    exact = torch.cat([param.grad.double().flatten() for param in params_of(optimizers[0])]).norm()
    torch.testing.assert_close(optimizers[0].last_grad_norm.double(), exact, rtol=1e-6, atol=0)


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def launches_of(optimizer: Any, backend: str) -> int:
    """How many kernels have been launched so far."""
    if backend == "cuda":
        assert extension._C is not None
        return extension._C.cuda_launches()
    ((_, _, phases),) = inner(optimizer).plan.native._devices
    return phases.launches


def exact_params(shapes: Any, dtype: torch.dtype, device: str) -> list[Parameter]:
    return [Parameter(eighths(tuple(shape), dtype, i).to(device)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("rule", "most"),
    [("SGD no momentum", 3), ("NovoGrad decay", 5), ("LARC default", 5), ("LARS optax", 5), ("LAMB default", 7)],
)
def test_launches_of_rules_with_norms(rule: str, most: int, backend: str) -> None:
    optimizer = RULES[rule](
        exact_params([(1 + i % 50,) for i in range(2000)] + [(70000,)], torch.float32, "cuda"), backend=backend
    )
    step_exactly(optimizer)
    before = launches_of(optimizer, backend)
    step_exactly(optimizer, 200)
    assert launches_of(optimizer, backend) - before <= most


@pytest.mark.parametrize("rule", ["NovoGrad decay", "LARC default", "LARS decay", "LAMB default"])
def test_norms_are_replayed_and_wait_for_nothing(rule: str, backend: str) -> None:
    mine, other = (
        RULES[rule](exact_params(RAGGED, torch.float32, "cuda"), capturable=True, backend=backend) for _ in range(2)
    )
    for optimizer in (mine, other):
        step_exactly(optimizer)
    with without_waiting():
        mine.step()
        assert mine.last_norms is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        other.step()
    assert_same_results(inner(mine), inner(other))


@pytest.mark.parametrize(("clip", "most"), [(None, 3), (ClipGradByGlobalNorm(1.0), 5)])
def test_launches(clip: Any, most: int, backend: str, all_native: None) -> None:
    params = new_params(torch.float32, [(1 + i % 50,) for i in range(2000)] + [(70000,)], "cuda")
    groups = [{"params": [param]} for param in params]
    optimizer = AdamW(groups, backend=backend, grad_clip=clip)
    train(optimizer, params, 2)
    set_grads(params, 3)
    before = launches_of(optimizer, backend)
    optimizer.step()
    assert launches_of(optimizer, backend) - before <= most


def test_nothing_waits_for_the_device(backend: str, all_native: None) -> None:
    params = new_params(device="cuda")
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = AdamW(params, lr=lr, backend=backend, grad_clip=ClipGradByGlobalNorm(1.0))
    train(optimizer, params, 1)
    set_grads(params, 1)
    optimizer.grad_scale = torch.tensor(2.0, device="cuda")
    optimizer.found_inf = torch.tensor(0.0, device="cuda")
    with without_waiting():
        optimizer.step()
        assert optimizer.last_grad_norm is not None


def test_grad_scaler(backend: str) -> None:
    params = new_params(device="cuda")
    optimizer = AdamW(params, backend=backend, fused=True)
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


def test_our_grad_scaler_waits_for_nothing(backend: str, all_native: None) -> None:
    params, twins = new_params(device="cuda"), new_params(device="cuda")
    clip = ClipGradByGlobalNorm(1.0)
    optimizers = [AdamW(group, backend=backend, grad_clip=clip, fused=True) for group in (params, twins)]
    scalers = [GradScaler("cuda", init_scale=1024.0), torch.amp.GradScaler("cuda", init_scale=1024.0)]
    for scaler in scalers:
        scaler.scale(torch.zeros((), device="cuda"))
    for step, bad in enumerate((False, True, False)):
        for group in (params, twins):
            set_grads(group, step, scale=1024.0)
            if bad:
                group[-1].grad.flatten()[0] = float("inf")
        torch.cuda.synchronize()
        with without_waiting() if step else nullcontext():
            for scaler, optimizer in zip(scalers, optimizers, strict=True):
                scaler.step(optimizer)
                scaler.update()
        assert_same_results(*optimizers)
    assert [scaler.get_scale() for scaler in scalers] == [512.0, 512.0]
    assert optimizers[0].state[params[0]]["step"].item() == 2


SLEEP = 400_000_000  # cycles: 0.2 s or more, and far more than a host needs for a step


@pytest.mark.parametrize("first", [False, True])
def test_a_step_returns_while_the_device_is_busy(first: bool, backend: str) -> None:
    """torch's debug mode sees what torch itself waits for; the kernels of ours are launched by another runtime."""
    warm = new_params(device="cuda")
    train(AdamW(warm, backend=backend), warm, 2)  # Triton compiles at its first step
    params = new_params(torch.float32, [(1,)] * (20_000 if backend == "cuda" else 100), "cuda")
    optimizer = AdamW(params, backend=backend)
    if not first:
        train(optimizer, params, 1)
    kept = [param.grad for param in params]  # so that all addresses are new: words for several launches
    for param in params:
        param.grad = torch.ones_like(param)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    behind = torch.cuda.Event()
    behind.record()
    optimizer.step()
    assert not behind.query()
    torch.cuda.synchronize()
    assert len(kept) == len(params)


def test_a_stream_of_ones_own(backend: str) -> None:
    """Gradients are written on the stream of their step behind a sleep, and nothing else is waited for."""
    ours, twin = new_params(device="cuda"), new_params(device="cuda")
    mine, other = AdamW(ours, backend=backend), AdamW(twin, backend=backend)
    for optimizer in (mine, other):
        train(optimizer, params_of(optimizer), 1)
    torch.cuda.synchronize()
    streams = (torch.cuda.Stream(), torch.cuda.default_stream())
    grads = []
    for step in range(4):
        with torch.cuda.stream(streams[step % 2]):
            grads.append([torch.full_like(param, float("nan")) for param in ours])
            torch.cuda._sleep(SLEEP // 4)
            for param, grad in zip(ours, grads[-1], strict=True):
                param.grad = grad.fill_((step + 1) / 8)
            mine.step()
    torch.cuda.synchronize()
    for of_step in grads:
        for param, grad in zip(twin, of_step, strict=True):
            param.grad = grad
        other.step()
        torch.cuda.synchronize()
    assert_same_results(mine, other)


def test_graphs(backend: str) -> None:
    lr = torch.tensor(1e-2, device="cuda")
    ours, twin = new_params(device="cuda"), new_params(device="cuda")
    mine = AdamW(ours, lr=lr, backend=backend, capturable=True, grad_clip=ClipGradByGlobalNorm(1.0))
    other = AdamW(twin, lr=float(lr), backend=backend, grad_clip=ClipGradByGlobalNorm(1.0))
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


def test_a_capture_before_the_first_step_is_refused(backend: str) -> None:
    params = new_params(device="cuda")
    set_grads(params, 0)
    optimizer = AdamW(params, backend=backend, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="not ready"), torch.cuda.graph(graph):
        optimizer.step()
    assert not optimizer.state


# compute-sanitizer runs these: every kernel and every way of loading, on few elements.
@pytest.mark.parametrize("rule", ["SGD no momentum", "NovoGrad decay", "LARS optax", "LAMB default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rules_for_the_sanitizer(rule: str, dtype: torch.dtype, backend: str) -> None:
    optimizer = RULES[rule](exact_params(((0,), (7,), (1025,), (40000,)), dtype, "cuda"), backend=backend)
    step_exactly(optimizer)
    torch.cuda.synchronize()


@pytest.mark.parametrize("master", [None, "float32", "split"])
def test_clip_and_masters_for_the_sanitizer(master: str | None, backend: str) -> None:
    params = exact_params(((0,), (7,), (1025,), (40000,)), torch.bfloat16, "cuda")
    optimizer = AdamW(params, master_weights=master, grad_clip=ClipGradByGlobalNorm(1.0), backend=backend)
    for step in range(2):
        for i, param in enumerate(params):  # behind an odd element: misaligned
            room = torch.empty(param.numel() + 1, dtype=param.dtype, device="cuda")
            param.grad = room[1:].copy_(eighths(tuple(param.shape), param.dtype, step + i))
        optimizer.step()
    torch.cuda.synchronize()


def test_memory_high_water_mark(backend: str) -> None:
    params = [Parameter(torch.zeros(1 << 24, device="cuda"))]
    optimizer = AdamW(params, backend=backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["SGD all", "LARC default"])
def test_misaligned_gradients_give_the_same_bits(rule: str, dtype: torch.dtype, backend: str) -> None:
    optimizers = []
    for offset in (0, 1):
        params = exact_params(((7,), (1024,), (4099,), (40000,)), dtype, "cuda")
        optimizer = RULES[rule](params, backend=backend)
        for step in range(2):
            for i, param in enumerate(params):
                room = torch.empty(param.numel() + 8, dtype=dtype, device="cuda")
                param.grad = room[offset : offset + param.numel()].copy_(eighths(tuple(param.shape), dtype, step + i))
                assert param.grad.data_ptr() % 16 == offset * dtype.itemsize
            optimizer.step()
        optimizers.append(inner(optimizer))
    assert_same_results(*optimizers)


def test_the_first_step_with_all_memory_in_torchs_cache(backend: str) -> None:
    params = [Parameter(torch.ones(1, device="cuda")) for _ in range(20_000)]  # a table of 8 MB
    for param in params:
        param.grad = torch.ones_like(param)
    held = []
    size = 1 << 32
    while size >= 1 << 21:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    held.clear()
    assert torch.cuda.mem_get_info()[0] < 1 << 22
    AdamW(params, backend=backend).step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert all(bool((param < 1).all()) for param in params[::1000])


IN_A_FRESH_PROCESS = """
import sys
import torch
from fused_optim import AdamW, ClipGradByGlobalNorm

backend, ends = sys.argv[1:]
options = dict(backend=backend, capturable=True, grad_clip=ClipGradByGlobalNorm(1.0))
param, twin = (torch.nn.Parameter(torch.ones(70_000, device="cuda")) for _ in range(2))
for one in (param, twin):
    one.grad = torch.full_like(one, 0.5)
states = AdamW([torch.nn.Parameter(torch.ones(70_000))], backend="cpu")
for one in states.param_groups[0]["params"]:
    one.grad = torch.full_like(one, 0.25)
states.step()
optimizers = [AdamW([one], **options) for one in (param, twin)]
for optimizer in optimizers:
    optimizer.load_state_dict({**states.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
if backend == "triton":  # which refuses a capture before its first step
    for optimizer in optimizers:
        optimizer.step()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizers[0].step()
graph.replay()
optimizers[1].step()
torch.cuda.synchronize()
assert torch.equal(param, twin) and bool((param != 1).all())
if ends == "without graph":
    del graph
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizers[0].step()
print("done")
"""


@pytest.mark.parametrize("ends", ["with graph", "without graph"])
def test_a_process_whose_first_launch_is_captured_and_that_ends_with_all_alive(ends: str, backend: str) -> None:
    """Modules load lazily, the first launch is the reduce phase of a capture; at the end optimizer and graph live."""
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, backend, ends]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert "CUDA error" not in result.stderr


def test_a_graphs_table_goes_with_the_graph() -> None:
    params = [Parameter(torch.ones(1, device="cuda")) for _ in range(50_000)]  # a table of 20 MB
    optimizer = AdamW(params, backend="cuda", capturable=True)
    train(optimizer, params, 1)
    free = []
    for _ in range(6):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graph.replay()
        torch.cuda.synchronize()
        del graph
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] - free[-1] < 40 << 20, free


@pytest.mark.slow
def test_more_than_2_to_31_elements(backend: str) -> None:
    numel = (1 << 31) + 1025
    param = Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.full_like(param, 0.5)
    optimizer = AdamW([param], lr=1e-2, backend=backend, grad_clip=ClipGradByGlobalNorm(float("inf")))
    optimizer.step()
    ends = param.detach()[[0, 1 << 30, (1 << 31) - 1, 1 << 31, numel - 1]]
    assert torch.equal(ends, ends[:1].expand_as(ends))
    assert ends[0] != 0
    torch.testing.assert_close(optimizer.last_grad_norm.item(), 0.5 * numel**0.5, rtol=1e-5, atol=0)


@each_rule
@each_dtype
def test_cuda_and_triton_give_the_same_bits(rule: str, dtype: torch.dtype, all_native: None) -> None:
    optimizers = []
    for name in ("cuda", "triton"):
        optimizer = RULES[rule](exact_params(RAGGED, dtype, "cuda"), backend=name, device="cuda")
        step_exactly(optimizer)
        if not RULES[rule].sums:
            train(optimizer, params_of(optimizer), 2)
        optimizers.append(optimizer)
    # The norm of a direction is no exact sum. In float64 the scalars' logarithms differ by what expm1's forms leave.
    if RULES[rule].directions or dtype == torch.float64:
        assert_near(*optimizers)
    else:
        assert_same_results(*map(inner, optimizers))


def test_captures_take_a_table_that_is_ready() -> None:
    """Two in a row; a third without a step between them is refused, and works after one."""
    params = new_params(device="cuda")
    optimizer = AdamW(params, backend="triton", capturable=True)
    train(optimizer, params, 1)
    graphs = []
    for capture in range(3):
        graph = torch.cuda.CUDAGraph()
        if capture == 2:
            with pytest.raises(RuntimeError, match="take one step"), torch.cuda.graph(graph):
                optimizer.step()
            optimizer.step()
            graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        graphs.append(graph)
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    assert optimizer.state[params[0]]["step"].item() == 5
