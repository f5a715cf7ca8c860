"""DTensor parameters, on four processes: every optimizer and placement equals one process with whole tensors."""

from __future__ import annotations

import gc
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Collector
from cuda_on_host.backend import cuda_phases
from cuda_on_host.build import OnHost, compile_module
from support import triton_interpreter
from support.ranks import WORLD, Ranks
from support.sources import ROOT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fused_optim
from fused_optim import (
    LAMB,
    LARC,
    LARS,
    SGD,
    Adam,
    AdamW,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    Lion,
    NovoGrad,
)
from fused_optim.backends import extension

Make = Callable[..., Any]

MAKERS: dict[str, Make] = {
    "AdamW": lambda params, **o: AdamW(params, lr=1e-2, **o),
    "Adam, amsgrad": lambda params, **o: Adam(params, lr=1e-2, amsgrad=True, weight_decay=0.1, **o),
    "AdamW, global norm": lambda params, **o: AdamW(params, lr=1e-2, grad_clip=ClipGradByGlobalNorm(0.5), **o),
    "AdamW, norm": lambda params, **o: AdamW(params, lr=1e-2, grad_clip=ClipGradByNorm(0.5), **o),
    "SGD, value": lambda params, **o: SGD(params, lr=1e-2, momentum=0.9, grad_clip=ClipGradByValue(0.1), **o),
    "Lion": lambda params, **o: Lion(params, lr=1e-3, **o),
    "NovoGrad": lambda params, **o: NovoGrad(params, lr=1e-2, weight_decay=1e-2, **o),
    "NovoGrad, global norm": lambda params, **o: NovoGrad(params, lr=1e-2, grad_clip=ClipGradByGlobalNorm(0.5), **o),
    "NovoGrad, maximum": lambda params, **o: NovoGrad(params, lr=1e-2, variant="apex", norm_type=0, **o),
    "LARC(SGD)": lambda params, **o: LARC(SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-2, **o), eta=0.02),
    "LARC(SGD), apex": lambda params, **o: LARC(SGD(params, lr=1e-2, weight_decay=1e-2, **o), variant="apex"),
    "LARS": lambda params, **o: LARS(params, lr=1e-2, weight_decay=1e-2, **o),
    "LAMB": lambda params, **o: LAMB(params, lr=1e-2, **o),
    "LAMB, no clip": lambda params, **o: LAMB(params, lr=1e-2, max_grad_norm=None, **o),
}

# Fewer rows than processes, so that some have none; uneven ones; nothing at all; one number; a matrix cut both ways.
SHAPES = ((3, 5), (9, 4), (0, 3), (1,), (16, 8), (7,))

# By name: the shape of the mesh, and each parameter's placements.
PLACEMENTS: dict[str, tuple[tuple[int, ...], Callable[[int, int], tuple[Any, ...]]]] = {
    "FSDP": ((WORLD,), lambda i, ndim: (Shard(0),)),
    "HSDP": ((2, 2), lambda i, ndim: (Replicate(), Shard(0))),
    "tensor parallel": ((WORLD,), lambda i, ndim: (Shard(ndim - 1) if i % 2 else Shard(0) if i % 4 else Replicate(),)),
    "2-D": ((2, 2), lambda i, ndim: (Shard(0), Shard(ndim - 1) if ndim > 1 else Replicate())),
}

BACKENDS = ("cpu", "eager", "cuda")


SHIM = ROOT / "build" / "cuda_on_host"


@cache
def shim() -> OnHost:
    return OnHost(compile_module(SHIM, sanitize=False))


def inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LARC) else optimizer


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def meshes() -> dict[tuple[int, ...], DeviceMesh]:
    """Made once a process: each makes process groups."""
    global MESHES
    if not MESHES:
        MESHES = {shape: init_device_mesh("cpu", shape) for shape in ((WORLD,), (2, 2))}
    return MESHES


MESHES: dict[tuple[int, ...], DeviceMesh] = {}


def spread(whole: Tensor, place: str, index: int) -> Tensor:
    shape, placements = PLACEMENTS[place]
    return distribute_tensor(whole.clone(), meshes()[shape], placements(index, whole.dim()), src_data_rank=None)


def both(dtype: torch.dtype, place: str) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters whole and spread."""
    wholes = [numbers(shape, index).to(dtype) for index, shape in enumerate(SHAPES)]
    spreads = [Parameter(spread(whole, place, index)) for index, whole in enumerate(wholes)]
    return [Parameter(whole) for whole in wholes], spreads


@cache
def grads_of(place: str, step: int) -> list[tuple[Tensor, Tensor]]:
    wholes = [numbers(shape, 100 * (step + 1) + index) for index, shape in enumerate(SHAPES)]
    return [(whole, spread(whole, place, index)) for index, whole in enumerate(wholes)]


def set_both(wholes: list[Parameter], spreads: list[Parameter], place: str, step: int) -> None:
    for whole, param, (grad, part) in zip(wholes, spreads, grads_of(place, step)):
        whole.grad, param.grad = grad.to(whole.dtype), part.to(param.dtype)


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same_everywhere(tensor: Tensor) -> None:
    gathered = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(gathered, tensor.contiguous())
    assert all(torch.equal(tensor, other) for other in gathered)


@contextmanager
def without_extension() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_C", None)
        yield


def train_spread(name: str, place: str, backend: str, steps: int, compiled_plan: bool = True) -> None:
    collector = Collector()
    logging.getLogger("fused_optim").addHandler(collector)
    wholes, spreads = both(torch.float32, place)
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        alone = MAKERS[name](wholes, backend="eager" if backend == "eager" else "cpu")
        ours = MAKERS[name](spreads, backend=backend)
        for step in range(steps):
            set_both(wholes, spreads, place, step)
            alone.step()
            with nullcontext() if compiled_plan else without_extension():
                ours.step()
        assert backend == "eager" or collector.lines == []
    values = [full(param) for param in spreads]
    assert_same_everywhere(torch.cat([value.flatten() for value in values]))
    for whole, param, value in zip(wholes, spreads, values):
        expected, found = inner(alone).state[whole], inner(ours).state[param]
        assert list(expected) == list(found)
        torch.testing.assert_close(value, whole.detach(), rtol=1e-6, atol=1e-6)
        for key, value in expected.items():
            assert isinstance(found[key], DTensor) == (value.shape == whole.shape and value.dim() > 0), key
            torch.testing.assert_close(full(found[key]), value, rtol=1e-6, atol=1e-6)
    if inner(ours).last_grad_norm is not None:
        torch.testing.assert_close(inner(ours).last_grad_norm, inner(alone).last_grad_norm, rtol=1e-6, atol=0)
        assert_same_everywhere(inner(ours).last_grad_norm)
    if inner(alone).last_norms is not None:
        for found, expected in zip(inner(ours).last_norms[1:], inner(alone).last_norms[1:]):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
            assert_same_everywhere(found.nan_to_num(-1))
    logging.getLogger("fused_optim").removeHandler(collector)


def train_everywhere(name: str, steps: int) -> None:
    for place in PLACEMENTS:
        for backend in BACKENDS:
            try:
                train_spread(name, place, backend, steps)
            except AssertionError as error:
                raise AssertionError(f"{place}, {backend}: {error}") from error


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MAKERS)
def test_spread_parameters_are_stepped_as_whole_ones(name: str, steps: int, ranks: Ranks) -> None:
    ranks.run(train_everywhere, name, steps)


def train_interpreted(name: str, compiled_plan: bool) -> None:
    triton_interpreter.patch_once()
    for place in ("FSDP", "2-D"):
        train_spread(name, place, "triton", steps=2, compiled_plan=compiled_plan)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "compiled_plan"),
    [
        ("AdamW, global norm", True),
        ("NovoGrad, maximum", False),
        ("LARC(SGD), apex", True),
        ("LAMB", False),
        *(
            pytest.param(name, compiled_plan, marks=pytest.mark.slow)
            for name, compiled_plan in (
                ("AdamW, global norm", False),
                ("NovoGrad, maximum", True),
                ("LARC(SGD), apex", False),
                ("LAMB", True),
            )
        ),
    ],
)
def test_triton_steps_spread_parameters_as_whole_ones(name: str, compiled_plan: bool, ranks: Ranks) -> None:
    ranks.run(train_interpreted, name, compiled_plan)


# FSDP2 -----------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3), nn.Linear(3, 3, bias=False))


def fully_sharded() -> nn.Sequential:
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=meshes()[(WORLD,)])
    return fully_shard(model, mesh=meshes()[(WORLD,)])


def backward(model: nn.Module, step: int, *, share: bool) -> None:
    batch = numbers((8, 7), step)
    batch = batch.chunk(WORLD)[dist.get_rank()] if share else batch
    model(batch).square().mean().backward()


def train_fsdp(name: str) -> None:
    alone, model = network(), fully_sharded()
    twin, ours = MAKERS[name](alone.parameters()), MAKERS[name](model.parameters())
    for step in range(5):
        for optimizer, network_of, share in ((twin, alone, False), (ours, model, True)):
            optimizer.zero_grad()
            backward(network_of, step, share=share)
            optimizer.step()
    for expected, found in zip(alone.parameters(), model.parameters()):
        torch.testing.assert_close(full(found), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "AdamW, global norm", "NovoGrad", "LARC(SGD)", "LAMB"])
def test_fully_shard_trains_as_one_process(name: str, ranks: Ranks) -> None:
    ranks.run(train_fsdp, name)


def step_in_backward() -> None:
    alone, model = network(), fully_sharded()
    twin = AdamW(alone.parameters(), lr=1e-2)
    optimizers = {param: AdamW([param], lr=1e-2) for param in model.parameters()}

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    for step in range(3):
        twin.zero_grad()
        backward(alone, step, share=False)
        twin.step()
        backward(model, step, share=True)
    for expected, found in zip(alone.parameters(), model.parameters()):
        torch.testing.assert_close(full(found), expected.detach(), rtol=1e-6, atol=1e-6)


def test_fully_sharded_parameters_step_in_backward(ranks: Ranks) -> None:
    ranks.run(step_in_backward)


def scaled_gradients(ours: bool, backend: str) -> None:
    """An infinity in one rank's shard stops the step of all."""
    kind = fused_optim.GradScaler if ours else torch.amp.GradScaler
    model = fully_sharded()
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        optimizer = AdamW(model.parameters(), backend=backend, grad_clip=ClipGradByGlobalNorm(1.0))
        scaler = kind("cpu", init_scale=64.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(numbers((2, 7), step)).square().mean()).backward()
            if step == 1 and dist.get_rank() == 1:
                next(model.parameters()).grad._local_tensor.view(-1)[0] = float("inf")
            before = [full(param).clone() for param in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(full(param), old) for param, old in zip(model.parameters(), before)]
            assert all(moved) if step != 1 else not any(moved)
            assert scaler.get_scale() == (64.0 if step == 0 else 32.0)
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ours", [False, True])
def test_an_infinity_in_one_shard_stops_every_rank(ours: bool, backend: str, ranks: Ranks) -> None:
    ranks.run(scaled_gradients, ours, backend)


def larc_of_torch() -> None:
    alone, model = network(), fully_sharded()
    twin = LARC(torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9), eta=0.02)
    ours = LARC(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), eta=0.02)
    for step in range(3):
        for optimizer, network_of, share in ((twin, alone, False), (ours, model, True)):
            optimizer.zero_grad()
            backward(network_of, step, share=share)
            optimizer.step()
    for expected, found in zip(alone.parameters(), model.parameters()):
        torch.testing.assert_close(full(found), expected.detach(), rtol=1e-6, atol=1e-6)


def test_larc_around_torchs_sgd_has_the_norms_of_the_whole(ranks: Ranks) -> None:
    ranks.run(larc_of_torch)


def offloaded() -> None:
    alone, model = network(), network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=meshes()[(WORLD,)], offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, mesh=meshes()[(WORLD,)], offload_policy=CPUOffloadPolicy(pin_memory=False))
    twin, ours = AdamW(alone.parameters(), lr=1e-2), AdamW(model.parameters(), lr=1e-2)
    assert ours.backend == "cpu"
    for step in range(3):
        for optimizer, network_of, share in ((twin, alone, False), (ours, model, True)):
            optimizer.zero_grad()
            backward(network_of, step, share=share)
            optimizer.step()
    for expected, found in zip(alone.parameters(), model.parameters()):
        torch.testing.assert_close(full(found), expected.detach(), rtol=1e-6, atol=1e-6)


def test_offloaded_shards_are_stepped_on_the_cpu(ranks: Ranks) -> None:
    ranks.run(offloaded)


# Cost ------------------------------------------------------------------------------------------------------------


class DTensorOperations(TorchDispatchMode):
    """Counts the operations that meet a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(kind is DTensor for kind in types)
        return func(*args, **(kwargs or {}))


def cost_of_steps(name: str, place: str) -> None:
    wholes, spreads = both(torch.float32, place)
    optimizer = MAKERS[name](spreads, backend="cpu")
    set_both(wholes, spreads, place, 0)
    optimizer.step()
    reductions = []
    all_reduce = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch, DTensorOperations() as operations:
        patch.setattr(dist, "all_reduce", lambda tensor, *a, **k: reductions.append(1) or all_reduce(tensor, *a, **k))
        optimizer.step()
    assert operations.count == 0
    assert len(reductions) == {"AdamW": 0, "AdamW, global norm": 1, "NovoGrad": 1, "LAMB": 2}[name]
    optimizer.step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) <= before


@pytest.mark.parametrize("place", ["FSDP", "2-D"])
@pytest.mark.parametrize("name", ["AdamW", "AdamW, global norm", "NovoGrad", "LAMB"])
def test_a_step_has_no_dtensor_operations_one_collective_and_no_leak(name: str, place: str, ranks: Ranks) -> None:
    ranks.run(cost_of_steps, name, place)


def one_without_gradients(name: str, backend: str) -> None:
    wholes, spreads = both(torch.float32, "FSDP")
    idle = dist.get_rank() == WORLD - 1
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        optimizer = MAKERS[name](spreads, backend=backend)
        for step in range(2):
            set_both(wholes, spreads, "FSDP", step)
            square = sum(float(param.grad.to_local().square().sum()) for param in spreads)
            if idle:
                for param in spreads:
                    param.grad = None
            optimizer.step()
            squares = [torch.zeros(()) for _ in range(WORLD)]
            dist.all_gather(squares, torch.tensor(square))
            norm = inner(optimizer).last_grad_norm
            torch.testing.assert_close(norm, sum(squares[:-1]).sqrt(), rtol=1e-6, atol=0)
    assert bool(inner(optimizer).state) != idle


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW, global norm", "LAMB"])
def test_a_process_without_gradients_takes_part_in_the_exchanges(name: str, backend: str, ranks: Ranks) -> None:
    ranks.run(one_without_gradients, name, backend)


def cut_twice(backend: str) -> None:
    """As FSDP leaves a parameter that tensor parallelism has sharded along the same dimension."""
    mesh, placements = meshes()[(2, 2)], [_StridedShard(0, split_factor=2), Shard(0)]
    whole = Parameter(numbers((8, 3), 0))
    param = Parameter(distribute_tensor(whole.detach().clone(), mesh, placements, src_data_rank=None))
    twin, ours = (MAKERS["LAMB"]([one], backend=backend) for one in (whole, param))
    for step in range(3):
        whole.grad = numbers((8, 3), step + 1)
        param.grad = distribute_tensor(whole.grad, mesh, placements, src_data_rank=None)
        twin.step()
        ours.step()
    torch.testing.assert_close(full(param), whole.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.last_grad_norm, twin.last_grad_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_every_process_counts_in_norms_of_parameters_that_are_cut_twice(backend: str, ranks: Ranks) -> None:
    ranks.run(cut_twice, backend)


# Gradients, states and parameters that lie otherwise -------------------------------------------------------------


def partial_gradients(backend: str) -> None:
    collector = Collector()
    logging.getLogger("fused_optim").addHandler(collector)
    mesh = meshes()[(WORLD,)]
    for placement in (Replicate(), Shard(0)):
        whole = Parameter(numbers((8, 3), 0))
        param = Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement], src_data_rank=None))
        twin = AdamW([whole], grad_clip=ClipGradByGlobalNorm(0.1))
        ours = AdamW([param], grad_clip=ClipGradByGlobalNorm(0.1), backend=backend)
        for step in range(3):
            whole.grad = numbers((8, 3), step + 1)
            part = whole.grad / WORLD
            param.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
            twin.step()
            ours.step()
            assert param.grad.placements == (placement,)
            assert torch.equal(part, whole.grad / WORLD)
        torch.testing.assert_close(full(param), whole.detach(), rtol=1e-6, atol=1e-6)
    assert len([line for line in collector.lines if "lay as (Partial(sum),)" in line]) == 2
    logging.getLogger("fused_optim").removeHandler(collector)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_partial_gradients_are_added_up_and_said_so(backend: str, ranks: Ranks) -> None:
    ranks.run(partial_gradients, backend)


def expect(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=text):
        call()


def disagreeing(what: str) -> None:
    last = dist.get_rank() == WORLD - 1
    shapes = [(8, 3), (4,), (5, 5)]
    if last and what == "missing":
        del shapes[2]
    if last and what == "order":
        shapes.reverse()
    params = [Parameter(spread(numbers(shape, 0), "FSDP", index)) for index, shape in enumerate(shapes)]
    scale = 0.5 if last and what == "scale" else 1.0
    optimizer = NovoGrad(params, lr_scale=[1.0, scale, 1.0][: len(params)])
    before = [param._local_tensor.clone() for param in params]
    for index, param in enumerate(params):
        param.grad = spread(numbers(shapes[index], 1), "FSDP", index)
    place = {"missing": 2, "order": 0, "scale": 1}[what]
    expect(RuntimeError, rf"different parameters in this optimizer: rank 0 has .*\[{place}\] of shape", optimizer.step)
    assert all(torch.equal(param._local_tensor, old) for param, old in zip(params, before))
    assert not optimizer.state


@pytest.mark.parametrize("what", ["missing", "order", "scale"])
def test_ranks_that_disagree_are_told_everywhere(what: str, ranks: Ranks) -> None:
    ranks.run(disagreeing, what)


def bad_placements() -> None:
    mesh = meshes()[(WORLD,)]
    partial = Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False))
    partial.grad = partial.detach().clone()
    expect(ValueError, r"\[0\] is a DTensor with the placement Partial", AdamW([partial]).step)

    param = Parameter(spread(torch.ones(8, 3), "FSDP", 0))
    param.grad = spread(torch.ones(8, 3), "HSDP", 0)
    optimizer = AdamW([param])
    expect(RuntimeError, r"the gradient of .*\[0\].* is on DeviceMesh", optimizer.step)
    assert not optimizer.state
    param.grad = spread(torch.ones(8, 3), "FSDP", 0)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(8, 3)
    expect(RuntimeError, r"'exp_avg' of .*\[0\].* is whole, the parameter a DTensor", optimizer.step)
    # On the same mesh in another way: moved, once.
    optimizer.state[param]["exp_avg"] = distribute_tensor(torch.ones(8, 3), mesh, [Replicate()], src_data_rank=None)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].placements == (Shard(0),)
    torch.testing.assert_close(full(optimizer.state[param]["exp_avg"]), torch.ones(8, 3))


def test_placements_that_cannot_be_stepped_are_refused(ranks: Ranks) -> None:
    ranks.run(bad_placements)


def master_weights(master: str, backend: str) -> None:
    wholes, spreads = both(torch.bfloat16, "FSDP")
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        twin = AdamW(wholes, lr=1e-2, master_weights=master, backend="cpu")
        ours = AdamW(spreads, lr=1e-2, master_weights=master, backend=backend)
        for step in range(4):
            if step == 2:  # somebody else writes: the masters follow
                with torch.no_grad():
                    for param in (*wholes, *spreads):
                        param.mul_(0.5)
            set_both(wholes, spreads, "FSDP", step)
            twin.step()
            ours.step()
    key = {"float32": "master_param", "split": "param_remainder"}[master]
    for index, (whole, param) in enumerate(zip(wholes, spreads)):
        assert torch.equal(full(param), whole.detach())
        # Part by part: gloo has no int16.
        expected, found = spread(twin.state[whole][key], "FSDP", index), ours.state[param][key]
        assert torch.equal(found._local_tensor, expected._local_tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master", ["float32", "split"])
def test_master_weights_are_spread_too(master: str, backend: str, ranks: Ranks) -> None:
    ranks.run(master_weights, master, backend)


def odd_gradients() -> None:
    """A local gradient of another layout goes to the witness on one rank, and all ranks still agree on the norm."""
    wholes, spreads = both(torch.float32, "FSDP")
    twin, ours = MAKERS["LAMB"](wholes, backend="cpu"), MAKERS["LAMB"](spreads, backend="cpu")
    for step in range(3):
        set_both(wholes, spreads, "FSDP", step)
        if dist.get_rank() == 1:
            part = spreads[1].grad._local_tensor
            spreads[1].grad = DTensor.from_local(
                part.t().contiguous().t(), meshes()[(WORLD,)], [Shard(0)], shape=(9, 4), stride=(4, 1), run_check=False
            )
        twin.step()
        ours.step()
    for whole, param in zip(wholes, spreads):
        torch.testing.assert_close(full(param), whole.detach(), rtol=1e-6, atol=1e-6)


def test_one_ranks_fallback_shares_the_norms(ranks: Ranks) -> None:
    ranks.run(odd_gradients)


def test_describe_shows_the_bytes_of_this_process(ranks: Ranks) -> None:
    assert set(ranks.run(describe_spread)) == {True}


def describe_spread() -> bool:
    param = Parameter(spread(torch.ones(16, 8), "FSDP", 0))
    optimizer = AdamW([param])
    before, after = io.StringIO(), io.StringIO()
    fused_optim.describe(optimizer, file=before)
    param.grad = spread(torch.ones(16, 8), "FSDP", 0)
    optimizer.step()
    fused_optim.describe(optimizer, file=after)
    return before.getvalue() == after.getvalue() and f"{16 * 8 * 2 * 4 // WORLD + 4} bytes of state" in after.getvalue()
