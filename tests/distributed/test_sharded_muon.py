"""Muon's matrices on several processes: brought together in one each, and every process ends as one alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import Collector
from cuda_on_host.backend import cuda_phases
from support import triton_interpreter
from support.ranks import WORLD, Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

import fused_optim
from fused_optim import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue, Muon, muon_groups
from fused_optim.plan import dealt
from fused_optim.rule.orthogonal import Iteration, orthogonalize_, polynomials_of
from fused_optim.tensors import local

from .test_low_memory_shards import assert_parts, states
from .test_sharded import (
    DTensorOperations,
    assert_same_everywhere,
    expect,
    full,
    meshes,
    numbers,
    shim,
    without_extension,
)
from .test_sharded_checkpoints import mesh_of, where

# Matrices of one shape in several parameters, uneven ones, fewer rows than processes; fused heads, of which a process
# has whole ones or parts; experts; convolutions; and what is AdamW's.
SHAPES = ((16, 8), (9, 4), (3, 5), (16, 8), (9, 4), (4, 20), (16, 8), (24, 8), (18, 6), (4, 6, 5), (6, 4, 3, 3))
HEADS = (1, 1, 1, 1, 1, 1, 1, 12, 3, 1, 1)
OTHERS = ((7,), (10, 4), (0, 3))

PLACEMENTS: dict[str, tuple[tuple[int, ...], Callable[[int], tuple[Any, ...]]]] = {
    "FSDP": ((WORLD,), lambda ndim: (Shard(0),)),
    "HSDP": ((2, 2), lambda ndim: (Replicate(), Shard(0))),
    "replicas inside": ((2, 2), lambda ndim: (Shard(0), Replicate())),
    "columns": ((WORLD,), lambda ndim: (Shard(ndim - 1),)),
    "second dimension": ((WORLD,), lambda ndim: (Shard(min(ndim - 1, 1)),)),
    "2-D": ((2, 2), lambda ndim: (Shard(0), Shard(ndim - 1) if ndim > 1 else Replicate())),
    "FSDP over rows": ((2, 2), lambda ndim: (_StridedShard(0, split_factor=2), Shard(0))),
    "rows twice": ((2, 2), lambda ndim: (Shard(0), Shard(0))),
    "replicated": ((WORLD,), lambda ndim: (Replicate(),)),
}
OPTIONS: dict[str, Any] = {"lr": 0.02, "adamw_lr": 3e-3, "ns_dtype": torch.float32}


def spread(whole: Any, place: str) -> Any:
    shape, placements = PLACEMENTS[place]
    return distribute_tensor(whole.clone(), meshes()[shape], placements(whole.dim()), src_data_rank=None)


def both(place: str, dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], list[Parameter]]:
    wholes = [numbers(shape, index).to(dtype) for index, shape in enumerate((*SHAPES, *OTHERS))]
    return [Parameter(whole) for whole in wholes], [Parameter(spread(whole, place)) for whole in wholes]


def muon(params: list[Parameter], **options: Any) -> Muon:
    count = len(SHAPES)
    groups = [{"params": params[:count]}, {"params": params[count:], "use_muon": False}]
    heads = [*HEADS, *(1 for _ in OTHERS)]
    return Muon(groups, **{**OPTIONS, "heads": heads, **options})


def set_both(wholes: list[Parameter], spreads: list[Parameter], place: str, step: int) -> None:
    for index, (whole, param) in enumerate(zip(wholes, spreads, strict=True)):
        grad = numbers(tuple(whole.shape), 100 * (step + 1) + index).to(whole.dtype)
        whole.grad, param.grad = grad, spread(grad, place)


def assert_equal_to(alone: Muon, ours: Muon, tolerance: float = 1e-5) -> None:
    for group, its in zip(alone.param_groups, ours.param_groups, strict=True):
        for whole, param in zip(group["params"], its["params"], strict=True):
            torch.testing.assert_close(full(param), whole.detach(), rtol=tolerance, atol=tolerance)
            assert_same_everywhere(full(param))
            assert list(alone.state[whole]) == list(ours.state[param])
            for key, value in alone.state[whole].items():
                torch.testing.assert_close(full(ours.state[param][key]), value, rtol=tolerance, atol=tolerance)


def train_spread(place: str, backend: str, steps: int, compiled_plan: bool = True, **options: Any) -> None:
    collector = Collector()
    logging.getLogger("fused_optim").addHandler(collector)
    wholes, spreads = both(place)
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        alone = muon(wholes, backend="eager" if backend == "eager" else "cpu", **options)
        ours = muon(spreads, backend=backend, **options)
        for step in range(steps):
            set_both(wholes, spreads, place, step)
            alone.step()
            with nullcontext() if compiled_plan else without_extension():
                ours.step()
    logging.getLogger("fused_optim").removeHandler(collector)
    assert backend == "eager" or collector.lines == [], collector.lines
    assert_equal_to(alone, ours)


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["cpu", "eager", "cuda"])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_four_processes_step_as_one(place: str, backend: str, steps: int, ranks: Ranks) -> None:
    ranks.run(train_spread, place, backend, 20 if (place, backend) == ("FSDP", "cpu") else steps)


def train_interpreted(compiled_plan: bool) -> None:
    triton_interpreter.patch_once()
    train_spread("2-D", "triton", 2, compiled_plan)


@pytest.mark.interpreted
@pytest.mark.parametrize("compiled_plan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_tritons_kernels_step_as_one(compiled_plan: bool, ranks: Ranks) -> None:
    ranks.run(train_interpreted, compiled_plan)


# Parts of the world, and the dealing -----------------------------------------------------------------------------


def part_of_the_world(sizes: tuple[int, ...], members: list[int]) -> None:
    """On a mesh that is not the world; the processes outside of it have nothing."""
    mesh = DeviceMesh("cpu", torch.tensor(members).view(sizes))
    if dist.get_rank() not in members:
        return
    placements = [Shard(0)] if len(sizes) == 1 else [Shard(0), Shard(1)]
    shapes = ((6, 4), (5, 7), (1, 3), (6, 4))
    wholes = [Parameter(numbers(shape, index)) for index, shape in enumerate(shapes)]
    params = [Parameter(distribute_tensor(w.detach().clone(), mesh, placements, src_data_rank=None)) for w in wholes]
    alone, ours = Muon(wholes, **OPTIONS), Muon(params, **OPTIONS)
    for step in range(3):
        for index, (whole, param) in enumerate(zip(wholes, params, strict=True)):
            whole.grad = numbers(tuple(whole.shape), 10 * step + index)
            param.grad = distribute_tensor(whole.grad, mesh, placements, src_data_rank=None)
        alone.step()
        ours.step()
    for whole, param in zip(wholes, params, strict=True):
        expected = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
        torch.testing.assert_close(local(param), local(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "members"), [((2,), [0, 1]), ((2,), [3, 1]), ((1, 3), [3, 0, 2]), ((1,), [2]), ((2, 2), [3, 1, 2, 0])]
)
def test_a_mesh_may_be_a_part_of_the_world(sizes: tuple[int, ...], members: list[int], ranks: Ranks) -> None:
    ranks.run(part_of_the_world, sizes, members)


class Exchanged:
    """Counts the collectives of this process, and the bytes that leave it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls, self.sent, self.reductions = 0, 0, 0
        all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

        def count(received: Any, sent: Any, receives: list[int], sends: list[int], **options: Any) -> Any:
            assert (sum(receives), sum(sends)) == (received.numel(), sent.numel())
            self.calls += 1
            away = sum(sends) - sends[dist.get_rank(options["group"])]
            self.sent += away * sent.element_size()
            return all_to_all(received, sent, receives, sends, **options)

        def reduce(*arguments: Any, **options: Any) -> Any:
            self.reductions += 1
            return all_reduce(*arguments, **options)

        patch.setattr(dist, "all_to_all_single", count)
        patch.setattr(dist, "all_reduce", reduce)

    def everywhere(self) -> int:
        total = torch.tensor(self.sent)
        dist.all_reduce(total)
        return int(total)


def bytes_of_a_step(place: str, shapes: list[tuple[int, ...]], dtype: torch.dtype | None) -> tuple[int, int, int, int]:
    params = [Parameter(spread(numbers(shape, index), place)) for index, shape in enumerate(shapes)]
    optimizer = Muon(params, lr=0.02, ns_dtype=dtype)
    for index, param in enumerate(params):
        param.grad = spread(numbers(shapes[index], index), place)
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch, DTensorOperations() as operations:
        counted = Exchanged(patch)
        optimizer.step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(4):
        optimizer.step()
    gc.collect()
    assert len(gc.get_objects()) <= before
    return counted.calls, counted.reductions, counted.everywhere(), operations.count


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), (torch.float32, 4)])
@pytest.mark.parametrize("place", ["FSDP", "columns", "HSDP", "2-D"])
def test_bytes_and_collectives_of_a_step(place: str, dtype: torch.dtype | None, size: int, ranks: Ranks) -> None:
    """Two collectives a shape and one for the agreement, no operation of a DTensor, and nothing left behind."""
    shapes = [(16, 8), (8, 16), (16, 8), (16, 8), (16, 8), (32, 16)]
    numel = sum(rows * columns for rows, columns in shapes)
    replicas, parts = (2, 2) if place == "HSDP" else (1, WORLD)
    expected = numel * size * (parts - 1) // parts + numel * size * (replicas * parts - 1) // parts
    assert set(ranks.run(bytes_of_a_step, place, shapes, dtype)) == {(2 * 3, 1, expected, 0)}


def turns_of_a_step() -> str:
    """What this process does in turn: sends (s), and multiplies (m)."""
    shapes = [(16, 8), (8, 32), (32, 16)] * WORLD
    params = [Parameter(spread(numbers(shape, index), "FSDP")) for index, shape in enumerate(shapes)]
    optimizer = Muon(params, lr=0.02)
    for index, param in enumerate(params):
        param.grad = spread(numbers(shapes[index], index), "FSDP")
    turns: list[str] = []
    all_to_all = dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda *a, **k: turns.append("s") or all_to_all(*a, **k))
        patch.setattr(dealt, "orthogonalize_", lambda *a: turns.append("m") or orthogonalize_(*a))
        optimizer.step()
    return "".join(turns)


def test_the_next_matrices_are_on_their_way_while_some_are_multiplied(ranks: Ranks) -> None:
    assert set(ranks.run(turns_of_a_step)) == {"ssmssmsms"}


@pytest.mark.parametrize(
    ("place", "shape", "heads", "calls"),
    [
        ("FSDP", (8, 6, 5), 1, 0),  # two experts in each process
        ("FSDP", (3, 6, 5), 1, 0),  # and none in the last
        ("FSDP", (24, 5), 4, 0),  # a head in each
        ("FSDP", (24, 5), 3, 2),
        ("columns", (8, 6, 5), 1, 2),
        ("replicated", (24, 5), 1, 0),
    ],
)
def test_whole_matrices_stay_where_they_are(
    place: str, shape: tuple[int, ...], heads: int, calls: int, ranks: Ranks
) -> None:
    assert set(ranks.run(collectives_of, place, shape, heads)) == {calls}


def collectives_of(place: str, shape: tuple[int, ...], heads: int) -> int:
    param = Parameter(spread(numbers(shape, 0), place))
    optimizer = Muon([param], lr=0.02, heads=[heads])
    param.grad = spread(numbers(shape, 1), place)
    with pytest.MonkeyPatch.context() as patch:
        counted = Exchanged(patch)
        optimizer.step()
    assert counted.reductions == bool(counted.calls)
    return counted.calls


# What others have, and have not ----------------------------------------------------------------------------------


def gradients_here_and_there(backend: str) -> None:
    """A process without a gradient counts as zeros, and its part moves no further than the others say; of another
    matrix nobody has one."""
    params = [Parameter(spread(numbers((16, 8), index), "FSDP")) for index in range(2)]
    optimizer = Muon(params, momentum=0.5, nesterov=False, weight_decay=0.0, backend=backend, **OPTIONS)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for step in range(2):
        grads = [numbers((16, 8), 10 * step + index) for index in range(2)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = spread(grad, "FSDP")
        if step == 0:
            momentum = 0.5 * grads[0]
            optimizer.step()
            continue
        momentum = 0.5 * momentum + 0.5 * grads[0]
        momentum[4:8] = 0.0
        params[1].grad = None
        before = [full(param).clone() for param in params]
        if dist.get_rank() == 1:
            params[0].grad = None
        optimizer.step()
    iteration = Iteration(polynomials_of("jordan", 5), 1e-7, 2**0.5, torch.float32)
    expected = before[0] - 0.02 * orthogonalize_(momentum[None].clone(), iteration)[0]
    if dist.get_rank() == 1:  # which is not stepped
        expected[mine] = before[0][mine]
    torch.testing.assert_close(local(params[0]), expected[mine], rtol=1e-5, atol=1e-6)
    assert torch.equal(full(params[1]), before[1])


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_process_without_a_gradient_takes_part(backend: str, ranks: Ranks) -> None:
    ranks.run(gradients_here_and_there, backend)


def odd_gradients() -> None:
    """A local gradient of another layout goes to the eager path on one rank, whose part all others still get."""
    wholes, spreads = both("FSDP")
    alone, ours = muon(wholes), muon(spreads)
    for step in range(3):
        set_both(wholes, spreads, "FSDP", step)
        if dist.get_rank() == 1:
            part = local(spreads[1].grad)
            spreads[1].grad = DTensor.from_local(
                part.t().contiguous().t(), meshes()[(WORLD,)], [Shard(0)], shape=(9, 4), stride=(4, 1), run_check=False
            )
        alone.step()
        ours.step()
    assert_equal_to(alone, ours)


def test_one_ranks_fallback_takes_part(ranks: Ranks) -> None:
    ranks.run(odd_gradients)


def inactive_matrices() -> int:
    _, spreads = both("FSDP")
    ours = muon(spreads)
    set_both(*both("FSDP"), "FSDP", 0)
    for param in spreads:
        if param.shape == (16, 8) and dist.get_rank() == 0:
            param.grad = spread(numbers((16, 8), 0), "FSDP")
    with pytest.MonkeyPatch.context() as patch:
        counted = Exchanged(patch)
        ours.step()
    return counted.calls


def test_matrices_without_gradients_are_not_exchanged(ranks: Ranks) -> None:
    assert ranks.run(inactive_matrices) == [2] * WORLD


def one_refuses(first: bool, everywhere: bool, backend: str) -> None:
    """And the next step, which nobody refuses, goes on as if nothing had been."""
    wholes, spreads = both("FSDP")
    alone, ours = muon(wholes, backend=backend), muon(spreads, backend=backend)
    for step in range(2):
        set_both(wholes, spreads, "FSDP", step)
        if step == 1 or first:
            right, before = spreads[3].grad, [full(param).clone() for param in spreads]
            elsewhere = spread(full(right), "HSDP")
            refuses = everywhere or dist.get_rank() == 2
            if refuses:
                spreads[3].grad = elsewhere
            text = r"the gradient of .* is on DeviceMesh" if refuses else "rank 2 has refused this step"
            expect(RuntimeError, text, ours.step)
            after = [full(param) for param in spreads]
            assert all(map(torch.equal, after, before))
            for state in ours.state.values():
                assert "step" not in state or float(state["step"]) == step
            spreads[3].grad = right
        alone.step()
        ours.step()
    assert_equal_to(alone, ours)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_one_process_refuses_is_taken_by_none(
    first: bool, everywhere: bool, backend: str, ranks: Ranks
) -> None:
    ranks.run(one_refuses, first, everywhere, backend)


def disagreeing(what: str, step_before: bool) -> None:
    last = dist.get_rank() == WORLD - 1
    shapes = [(8, 3), (4, 8), (5, 5)]
    if last and what == "shape":
        shapes[1] = (4, 7)
    params = [Parameter(spread(numbers(shape, 0), "FSDP")) for shape in shapes]
    heads = [1, 2 if last and what == "heads" else 1, 1]
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:]}], lr=0.02, heads=heads)
    for param, shape in zip(params, shapes):
        param.grad = spread(numbers(shape, 1), "FSDP")
    if step_before:
        optimizer.step()
    before = [local(param).clone() for param in params]
    if last and what == "ns_steps":
        optimizer.param_groups[1]["ns_steps"] = 2
    text = r"different parameters in this optimizer: rank 0 has param_groups\[1\]\['params'\]\[0\] of shape"
    for _ in range(2):
        expect(RuntimeError, text, optimizer.step)
        assert all(torch.equal(local(param), old) for param, old in zip(params, before))
    if what == "ns_steps":
        optimizer.param_groups[1]["ns_steps"] = 5
        optimizer.step()


@pytest.mark.parametrize(
    ("what", "step_before"), [("shape", False), ("heads", False), ("ns_steps", False), ("ns_steps", True)]
)
def test_processes_that_disagree_are_told_everywhere(what: str, step_before: bool, ranks: Ranks) -> None:
    ranks.run(disagreeing, what, step_before)


def refusals() -> None:
    mesh = meshes()[(2, 2)]
    odd = distribute_tensor(numbers((8, 4), 0), mesh, [_StridedShard(0, split_factor=2), Replicate()])
    param = Parameter(odd)
    param.grad = odd.detach().clone()
    expect(ValueError, r"\[0\] is a DTensor with the placements .*_StridedShard.* FSDP", Muon([param]).step)

    part = DTensor.from_local(torch.ones(3, 4), meshes()[(WORLD,)], [Shard(0)], run_check=False)
    by_hand = torch.ones(1 if dist.get_rank() else 9, 4)
    odd = DTensor.from_local(by_hand, meshes()[(WORLD,)], [Shard(0)], shape=part.shape, stride=(4, 1), run_check=False)
    param = Parameter(odd)
    param.grad = odd.detach().clone()
    expect(ValueError, r"\[0\] is a DTensor .* has a part of shape \(.*\), not of shape \(3, 4\)", Muon([param]).step)

    param = Parameter(spread(numbers((8, 4), 0), "FSDP"))
    param.grad = spread(numbers((8, 4), 1), "FSDP")
    optimizer = Muon([param])
    optimizer.param_groups[0]["differentiable"] = True
    before = local(param).clone()
    expect(ValueError, r"\[0\] is sharded and its group is differentiable", optimizer.step)
    assert torch.equal(local(param), before)
    assert not optimizer.state


def test_what_cannot_be_brought_together_is_refused(ranks: Ranks) -> None:
    ranks.run(refusals)


# Beside everything else ------------------------------------------------------------------------------------------

# Products in float64 of directions that travel in float32: of the order of the sums nothing is left after rounding.
EXACT: dict[str, Any] = {"ns_dtype": torch.float64}
BESIDE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "global norm": (torch.float32, {"grad_clip": ClipGradByGlobalNorm(0.5)}),
    "norm": (torch.float32, {"grad_clip": ClipGradByNorm(0.3)}),
    "value": (torch.float32, {"grad_clip": ClipGradByValue(0.2)}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 masters": (torch.bfloat16, {"master_weights": "float32"}),
    "split masters": (torch.bfloat16, {"master_weights": "split"}),
    "scales": (
        torch.float32,
        {
            "lr_scale": [1.0 + index / 8 for index in range(len(SHAPES) + len(OTHERS))],
            "weight_decay_scale": [index % 2 for index in range(len(SHAPES) + len(OTHERS))],
        },
    ),
}


def train_beside(name: str, place: str, backend: str) -> None:
    dtype, options = BESIDE[name]
    wholes, spreads = both(place, dtype)
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        alone = muon(wholes, backend="eager" if backend == "eager" else "cpu", **EXACT, **options)
        ours = muon(spreads, backend=backend, **EXACT, **options)
        for step in range(4):
            set_both(wholes, spreads, place, step)
            alone.step()
            ours.step()
    clips_by_norm = name in ("global norm", "norm")  # whose sums have another order
    params = [(w, p) for g, o in zip(alone.param_groups, ours.param_groups) for w, p in zip(g["params"], o["params"])]
    for whole, param in params:
        for key, value in {"param": whole.detach(), **alone.state[whole]}.items():
            found = local(param.detach() if key == "param" else ours.state[param][key])
            expected = local(spread(value, place)) if value.shape == whole.shape else value
            if clips_by_norm:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found, expected), key
    if alone.last_grad_norm is not None:
        torch.testing.assert_close(ours.last_grad_norm, alone.last_grad_norm, rtol=1e-6, atol=0)
    if alone.last_norms is not None:
        assert ours.last_norms.names == alone.last_norms.names
        torch.testing.assert_close(ours.last_norms.grad_norm, alone.last_norms.grad_norm, rtol=1e-6, atol=0)


def train_beside_everywhere(name: str, place: str) -> None:
    for backend in ("cpu", "eager", "cuda"):
        train_beside(name, place, backend)


@pytest.mark.parametrize("place", ["FSDP", "FSDP over rows", "HSDP"])
@pytest.mark.parametrize("name", BESIDE)
def test_options_are_those_of_one_process(name: str, place: str, ranks: Ranks) -> None:
    ranks.run(train_beside_everywhere, name, place)


LOW_MEMORY: dict[str, dict[str, Any]] = {
    "8bit": {"state_dtype": "8bit"},
    "8bit, split8": {"state_dtype": "8bit", "master_weights": "split8", "seed": 5},
    "8bit, stochastic": {"state_dtype": {"momentum_buffer": "8bit"}, "rounding": "stochastic"},
}


def low_memory(name: str, place: str, backend: str) -> None:
    options = {**EXACT, **LOW_MEMORY[name]}
    wholes = [
        Parameter(numbers(shape, index).bfloat16())
        for index, shape in enumerate(((130, 64), (3, 2048), (70, 65), (128, 96), (130, 64), (5, 32, 64)))
    ]
    params = [Parameter(spread(whole.detach(), place)) for whole in wholes]
    alone, ours = Muon(wholes, lr=0.02, backend="cpu", **options), Muon(params, lr=0.02, backend=backend, **options)
    for step in range(3):
        set_both(wholes, params, place, step)
        alone.step()
        ours.step()
    kinds = {str(local(state["momentum_buffer"]).dtype) for state in ours.state.values()}
    assert "torch.int8" in kinds
    for whole, param in zip(wholes, params, strict=True):
        assert_parts({"param": whole.detach(), **alone.state[whole]}, param, {"param": param, **ours.state[param]})


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("place", ["FSDP", "HSDP"])
@pytest.mark.parametrize("name", LOW_MEMORY)
def test_low_memory_states_have_the_bits_of_one_process(name: str, place: str, backend: str, ranks: Ranks) -> None:
    ranks.run(low_memory, name, place, backend)


def scaled_gradients(ours: bool) -> None:
    """An infinity in one process's shard stops the step of all."""
    kind = fused_optim.GradScaler if ours else torch.amp.GradScaler
    model = model_on(meshes()[(WORLD,)])
    optimizer = Muon(muon_groups(model), lr=0.02)
    scaler = kind("cpu", init_scale=64.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(numbers((2, 12), step)).square().mean()).backward()
        if step == 1 and dist.get_rank() == 1:
            local(next(model.parameters()).grad).view(-1)[0] = float("inf")
        before = [full(param).clone() for param in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(full(param), old) for param, old in zip(model.parameters(), before)]
        assert all(moved) if step != 1 else not any(moved)


@pytest.mark.parametrize("ours", [False, True])
def test_an_infinity_in_one_shard_stops_every_process(ours: bool, ranks: Ranks) -> None:
    ranks.run(scaled_gradients, ours)


# FSDP2 and checkpoints -------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 18), nn.GELU(), nn.Linear(18, 18), nn.Linear(18, 3))


def model_on(mesh: DeviceMesh | None) -> nn.Sequential:
    model = network()
    if mesh is not None:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


NAMED: dict[tuple[str, ...], DeviceMesh] = {}


def named_mesh(*names: str) -> DeviceMesh:
    """Made once a process: each makes process groups."""
    if names not in NAMED:
        NAMED[names] = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    return NAMED[names]


def train_fsdp(kind: str) -> None:
    alone, shares = network(), WORLD
    if kind == "FSDP":
        model = model_on(meshes()[(WORLD,)])
    elif kind == "HSDP":
        model = model_on(named_mesh("replicate", "shard"))
    else:
        mesh, model, shares = named_mesh("data", "tensor"), network(), 2
        parallelize_module(model, mesh["tensor"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        kinds = {type(placement).__name__ for param in model.parameters() for placement in param.placements}
        assert "_StridedShard" in kinds
    twin, ours = (Muon(muon_groups(one), **OPTIONS, grad_clip=ClipGradByGlobalNorm(0.5)) for one in (alone, model))
    for step in range(6):
        for optimizer, one, share in ((twin, alone, False), (ours, model, True)):
            optimizer.zero_grad()
            batch = numbers((8, 12), step)
            one(batch.chunk(shares)[dist.get_rank() * shares // WORLD] if share else batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.last_grad_norm, twin.last_grad_norm, rtol=1e-5, atol=0)
    for expected, found in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(full(found), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["FSDP", "HSDP", "FSDP over tensor parallel"])
def test_fully_shard_trains_as_one_process(kind: str, ranks: Ranks) -> None:
    ranks.run(train_fsdp, kind)


def reshard(saving: int, loading: int, folder: str) -> None:
    """Trained on some ranks, saved, loaded on others and trained on: as one uninterrupted process."""
    rank, groups = dist.get_rank(), {world: mesh_of(world) for world in (2, WORLD)}
    if rank < saving:
        model, alone = model_on(groups.get(saving)), model_on(None)
        optimizer, twin = (Muon(muon_groups(one), **OPTIONS) for one in (model, alone))
        for step in range(3):
            step_both(optimizer, twin, step)
        dcp.save(states(model, optimizer), checkpoint_id=folder, **where(saving))
    dist.barrier()
    if rank < loading:
        model, alone = model_on(groups.get(loading)), model_on(None)
        optimizer, twin = (Muon(muon_groups(one), **OPTIONS) for one in (model, alone))
        found = states(model, optimizer)
        dcp.load(found, checkpoint_id=folder, **where(loading))
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        for step in range(6):
            if step < 3:
                step_both(twin, twin, step)
            else:
                step_both(optimizer, twin, step)
        for whole, param in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(full(param), whole.detach(), rtol=1e-5, atol=1e-5)
    dist.barrier()


def step_both(optimizer: Muon, twin: Muon, step: int) -> None:
    index = 0
    for ours, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for param, whole in zip(ours["params"], theirs["params"], strict=True):
            index += 1
            whole.grad = numbers(tuple(whole.shape), 100 * step + index)
            if isinstance(param, DTensor):
                param.grad = distribute_tensor(whole.grad, param.device_mesh, param.placements, src_data_rank=None)
            else:
                param.grad = whole.grad.clone()
    for one in dict.fromkeys((optimizer, twin)):
        one.step()


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_a_checkpoint_goes_on_with_other_ranks(saving: int, loading: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(reshard, saving, loading, str(tmp_path / "checkpoint"))
