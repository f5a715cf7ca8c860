"""8-bit states, masters of 24 bits and stochastic rounding of shards: the bits of whole tensors, however many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import triton_interpreter
from support.ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from fused_optim import SGD, AdamW, Lion
from fused_optim.backends import choice, extension
from fused_optim.tensors import is_sharded, local

from .test_sharded import meshes, numbers
from .test_sharded_checkpoints import mesh_of, where

# Uneven shards; more processes than rows; rows that are no groups; a vector; a whole number of rows each.
SHAPES = ((130, 64), (3, 2048), (70, 65), (13,), (128, 96))
OPTIONS: dict[str, dict[str, Any]] = {
    "8bit": {"state_dtype": "8bit"},
    "8bit, split8": {"state_dtype": "8bit", "master_weights": "split8", "seed": 5},
    "stochastic": {"rounding": "stochastic"},
    "8bit, stochastic": {"state_dtype": {"exp_avg": "8bit"}, "rounding": "stochastic"},
}


def part_of(whole: Tensor, param: Any) -> Tensor:
    """What this process has of a whole tensor that is cut along dimension 0."""
    return local(distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None))


def assert_parts(whole: dict[str, Any], param: Any, state: dict[str, Any]) -> None:
    for key, value in whole.items():
        found = state[key]
        if not isinstance(value, Tensor) or value.ndim == 0:
            assert float(found) == float(value)
            continue
        assert not is_sharded(param) or found.placements == param.placements
        expected = part_of(value, param) if is_sharded(param) else value
        assert torch.equal(local(found).view(torch.uint8), expected.contiguous().view(torch.uint8)), key


def step_both(optimizer: Any, twin: Any, step: int) -> None:
    for index, (param, whole) in enumerate(zip(*(o.param_groups[0]["params"] for o in (optimizer, twin)))):
        whole.grad = numbers(tuple(whole.shape), 100 * step + index).to(whole.dtype)
        param.grad = whole.grad.clone()
        if is_sharded(param):
            param.grad = distribute_tensor(whole.grad, param.device_mesh, param.placements, src_data_rank=None)
    optimizer.step()
    twin.step()


def compare(optimizer: Any, twin: Any) -> None:
    for param, whole in zip(*(o.param_groups[0]["params"] for o in (optimizer, twin))):
        assert_parts({"param": whole.detach(), **twin.state[whole]}, param, {"param": param, **optimizer.state[param]})


def shards_equal_the_whole(name: str, kind: str, place: str, backend: str) -> None:
    mesh = meshes()[(2, 2) if place == "HSDP" else (WORLD,)]
    placements = (Replicate(), Shard(0)) if place == "HSDP" else (Shard(0),)
    make = {"AdamW": AdamW, "SGD": lambda params, **o: SGD(params, 0.1, 0.9, **o), "Lion": Lion}[kind]
    options = dict(OPTIONS[name])
    if kind == "SGD" and isinstance(options.get("state_dtype"), dict):
        options["state_dtype"] = {"momentum_buffer": "8bit"}
    wholes = [Parameter(numbers(shape, index).bfloat16()) for index, shape in enumerate(SHAPES)]
    spread = [Parameter(distribute_tensor(w.detach().clone(), mesh, placements, src_data_rank=None)) for w in wholes]
    witness = "eager" if backend == "triton" else "cpu"  # which the plan in Python cannot serve
    optimizer, twin = make(spread, backend=backend, **options), make(wholes, backend=witness, **options)
    for step in range(3):
        step_both(optimizer, twin, step)
    compare(optimizer, twin)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("place", ["FSDP", "HSDP"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("name", OPTIONS)
def test_shards_along_dimension_0_have_the_bits_of_the_whole(
    name: str, kind: str, place: str, backend: str, ranks: Ranks
) -> None:
    ranks.run(shards_equal_the_whole, name, kind, place, backend)


def interpreted_shards_equal_the_whole(name: str, kind: str, compiled_plan: bool) -> None:
    triton_interpreter.patch_once()
    said: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice.logger, "warning", lambda *line: said.append(line))
        if not compiled_plan:
            patch.setattr(extension, "_C", None)
        shards_equal_the_whole(name, kind, "FSDP", "triton")
    assert not said  # of an eager path that serves


@pytest.mark.interpreted
@pytest.mark.parametrize("compiled_plan", [True, False], ids=["compiled plan", "python plan"])
@pytest.mark.parametrize("kind", ["AdamW", "Lion"])
def test_triton_steps_shards_along_dimension_0_with_the_bits_of_the_whole(
    kind: str, compiled_plan: bool, ranks: Ranks
) -> None:
    ranks.run(interpreted_shards_equal_the_whole, "8bit, split8", kind, compiled_plan)


def cut_both_ways() -> None:
    """Shards that would cut groups apart keep wider states, and step like any other."""
    mesh = meshes()[WORLD,]
    whole = numbers((64, 128), 0)
    param = Parameter(distribute_tensor(whole, mesh, (Shard(1),), src_data_rank=None))
    optimizer = AdamW([param], state_dtype="8bit")
    param.grad = distribute_tensor(numbers((64, 128), 1), mesh, (Shard(1),), src_data_rank=None)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_shards_along_another_dimension_keep_wider_states(ranks: Ranks) -> None:
    ranks.run(cut_both_ways)


def model_on(mesh: DeviceMesh | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 130), nn.Linear(2048, 3, bias=False), nn.Linear(96, 128)).bfloat16()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model


def states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def reshard(name: str, saving: int, loading: int, folder: str) -> None:
    """Trained on some ranks, saved, loaded on others and trained on: the bits of one uninterrupted process."""
    rank, groups = dist.get_rank(), {world: mesh_of(world) for world in (2, WORLD)}
    options = OPTIONS[name]
    if rank < saving:
        model, alone = model_on(groups.get(saving)), model_on(None)
        optimizer, twin = (AdamW(one.parameters(), **options) for one in (model, alone))
        for step in range(3):
            step_both(optimizer, twin, step)
        dcp.save(states(model, optimizer), checkpoint_id=folder, **where(saving))
    dist.barrier()
    if rank < loading:
        model, alone = model_on(groups.get(loading)), model_on(None)
        optimizer, twin = (AdamW(one.parameters(), **options) for one in (model, alone))
        found = states(model, optimizer)
        dcp.load(found, checkpoint_id=folder, **where(loading))
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        for step in range(3):
            for index, whole in enumerate(alone.parameters()):
                whole.grad = numbers(tuple(whole.shape), 100 * step + index).to(whole.dtype)
            twin.step()
        for step in range(3, 6):
            step_both(optimizer, twin, step)
        compare(optimizer, twin)
    dist.barrier()


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_goes_on_bit_for_bit_with_other_ranks(
    name: str, saving: int, loading: int, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(reshard, name, saving, loading, str(tmp_path / "checkpoint"))
