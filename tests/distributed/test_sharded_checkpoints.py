"""Checkpoints by torch.distributed.checkpoint: other numbers of ranks, torch's AdamW, interruptions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import WORLD, Ranks
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fused_optim import AdamW
from fused_optim.state import masters
from fused_optim.tensors import local

from .test_sharded import MAKERS, full, inner, numbers

OPTIMIZERS: dict[str, Any] = {
    **{name: MAKERS[name] for name in ("AdamW", "Adam, amsgrad", "NovoGrad", "LAMB", "SGD, value", "Lion")},
    "torch": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "float32 masters": lambda params: AdamW(params, lr=1e-2, master_weights="float32"),
    "split masters": lambda params: AdamW(params, lr=1e-2, master_weights="split"),
}


MESHES: dict[int, DeviceMesh] = {}


def mesh_of(world: int) -> DeviceMesh:
    """Of the first ranks; every rank calls it."""
    if world not in MESHES:
        MESHES[world] = DeviceMesh("cpu", list(range(world)))
    return MESHES[world]


def network(mesh: DeviceMesh | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)).to(dtype)
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """The same gradients on every rank, whatever the number of them."""
    for step in steps:
        optimizer.zero_grad()
        model(numbers((4, 6), step).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if "masters" in name else torch.float32


def state_of(model: nn.Module, optimizer: Any, *, flat: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(
    model: nn.Module, optimizer: Any, path: str, *, flat: bool = False, partial: bool = False, **where: Any
) -> None:
    state = state_of(model, optimizer, flat=flat)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=partial), **where)
    set_model_state_dict(model, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def where(world: int) -> dict[str, Any]:
    return {"no_dist": True} if world == 1 else {"process_group": mesh_of(world).get_group()}


def reshard(saver: str, loader: str, saving: int, loading: int, folder: str, flat: bool) -> None:
    path = f"{folder}/checkpoint"
    rank, dtype = dist.get_rank(), dtype_of(saver)
    meshes = {world: mesh_of(world) for world in (2, WORLD)}
    if rank < saving:
        model = network(meshes.get(saving), dtype)
        optimizer = OPTIMIZERS[saver](model.parameters())
        train(model, optimizer, range(3))
        dcp.save(state_of(model, optimizer, flat=flat), checkpoint_id=path, **where(saving))
    dist.barrier()
    if rank < loading:
        model, alone = network(meshes.get(loading), dtype), network(None, dtype)
        optimizer, twin = OPTIMIZERS[loader](model.parameters()), OPTIMIZERS[saver](alone.parameters())
        load(model, optimizer, path, flat=flat, **where(loading))
        train(alone, twin, range(6))
        train(model, optimizer, range(3, 6))
        compare(alone, twin, model, optimizer)
    dist.barrier()


def compare(alone: nn.Module, twin: Any, model: nn.Module, optimizer: Any) -> None:
    for whole, param in zip(alone.parameters(), model.parameters()):
        tolerance = 1e-6 if whole.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(full(param), whole.detach(), rtol=tolerance, atol=tolerance)
        expected, found = inner(twin).state[whole], inner(optimizer).state[param]
        for key, value in expected.items():
            if value.dtype != torch.int16:  # gloo has none
                torch.testing.assert_close(full(found[key]), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "torch"])
def test_a_checkpoint_goes_on_with_other_ranks(
    name: str, saving: int, loading: int, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(reshard, name, name, saving, loading, str(tmp_path), saving == WORLD == loading)


@pytest.mark.parametrize(("saver", "loader"), [("AdamW", "torch"), ("torch", "AdamW")])
@pytest.mark.parametrize("flat", [False, True])
def test_torchs_adamw_and_ours_load_each_other_strictly(
    saver: str, loader: str, flat: bool, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(reshard, saver, loader, 4, 2, str(tmp_path), flat)


def masters_and_torch(kind: str, folder: str) -> None:
    mesh = mesh_of(WORLD)
    key = {"float32 masters": "master_param", "split masters": "param_remainder"}[kind]
    models, optimizers = {}, {}
    for name in ("torch", kind):
        models[name] = network(mesh, torch.bfloat16)
        optimizers[name] = OPTIMIZERS[name](models[name].parameters())
        train(models[name], optimizers[name], range(3 if name == "torch" else 2))
        dcp.save(state_of(models[name], optimizers[name]), checkpoint_id=f"{folder}/{name}")
    # From torch: there is no master in the checkpoint, and that of another parameter must not stay.
    load(models[kind], optimizers[kind], f"{folder}/torch", partial=True)
    for theirs, param in zip(models["torch"].parameters(), models[kind].parameters()):
        state = optimizers[kind].state[param]
        assert torch.equal(full(param), full(theirs))
        assert float(state["step"]) == 3
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(full(state["exp_avg"]), full(optimizers["torch"].state[theirs]["exp_avg"]).float())
        parts = {key: local(state[key])}  # what is left of a master that was another number's counts nowhere
        seen = masters.read(local(param), parts, key)
        assert torch.equal(masters.round_ties_away(seen, torch.bfloat16), local(param))
    train(models[kind], optimizers[kind], range(3, 5))
    # To torch: the masters are left behind.
    load(models["torch"], optimizers["torch"], f"{folder}/{kind}")
    assert all(key not in state for state in optimizers["torch"].state.values())
    train(models["torch"], optimizers["torch"], range(2, 4))


@pytest.mark.parametrize("kind", ["float32 masters", "split masters"])
def test_master_weights_from_torch_and_to_torch(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(masters_and_torch, kind, str(tmp_path))


def save_while_training(folder: str) -> None:
    mesh = mesh_of(WORLD)
    model, again = network(mesh, torch.float32), network(mesh, torch.float32)
    optimizer, other = AdamW(model.parameters(), lr=1e-2), AdamW(again.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    train(again, other, range(3))
    beside = dist.new_group(backend="gloo")  # its collectives must not meet those of the training
    saved = dcp.async_save(state_of(model, optimizer), checkpoint_id=f"{folder}/checkpoint", process_group=beside)
    train(model, optimizer, range(3, 30))
    saved.result()
    fresh = network(mesh, torch.float32)
    loaded = AdamW(fresh.parameters(), lr=1e-2)
    load(fresh, loaded, f"{folder}/checkpoint")
    for param, expected in zip(fresh.parameters(), again.parameters()):
        assert torch.equal(full(param), full(expected))
        for key, value in other.state[expected].items():
            assert torch.equal(full(loaded.state[param][key]), full(value)), key


def test_an_asynchronous_save_is_of_one_moment(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_while_training, str(tmp_path))


class Killed(FileSystemWriter):
    """Its process dies in the middle of a save."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            os._exit(1)
        return super().write_data(plan, planner)


def save_and_die(folder: str) -> None:
    model = network(mesh_of(WORLD), torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    dcp.save(state_of(model, optimizer), checkpoint_id=f"{folder}/3")
    train(model, optimizer, range(3, 4))
    dcp.save(state_of(model, optimizer), storage_writer=Killed(f"{folder}/4"))


def resume(path: str) -> None:
    model, alone = network(mesh_of(WORLD), torch.float32), network(None, torch.float32)
    optimizer, twin = AdamW(model.parameters(), lr=1e-2), AdamW(alone.parameters(), lr=1e-2)
    load(model, optimizer, path)
    train(model, optimizer, range(3, 6))
    train(alone, twin, range(6))
    compare(alone, twin, model, optimizer)


@pytest.mark.program
@pytest.mark.xdist_group("ranks")
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    ranks = Ranks()
    try:
        with pytest.raises(AssertionError, match="the process has died"):
            ranks.run(save_and_die, str(tmp_path))
        assert not (tmp_path / "4" / ".metadata").exists()
        ranks.run(resume, str(tmp_path / "3"))
    finally:
        ranks.stop()


def save_without(what: str, folder: str) -> None:
    model = network(mesh_of(WORLD), torch.float32)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(1))
    state = state_of(model, optimizer)
    if what == "state":
        states = state["optimizer"]["state"]
        kept = {key: value for key, value in states["1.weight"].items() if key != "exp_avg_sq"}
        state["optimizer"] = {**state["optimizer"], "state": {**states, "1.weight": kept}}
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
    if what == "shard" and dist.get_rank() == 0:
        os.remove(f"{folder}/checkpoint/__2_0.distcp")
    dist.barrier()
    train(model, optimizer, range(1, 2))
    before = [full(param).clone() for param in model.parameters()]
    missing = {"state": r"optimizer\.state\.1\.weight\.exp_avg_sq", "shard": r"__2_0\.distcp"}[what]
    with pytest.raises(dcp.api.CheckpointException, match=missing):
        load(model, optimizer, f"{folder}/checkpoint")
    if what == "state":  # a shard is missed when torch has read others into the parameters
        assert all(torch.equal(full(param), old) for param, old in zip(model.parameters(), before))


@pytest.mark.parametrize("what", ["state", "shard"])
def test_a_checkpoint_that_lacks_something_is_refused_on_every_rank(what: str, ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_without, what, str(tmp_path))


def state_dict_of_a_new_optimizer(name: str) -> None:
    """torch takes a step with a learning rate of 0 to make the states: it changes nothing else."""
    model = network(mesh_of(WORLD), torch.float32)
    before = [full(param).clone() for param in model.parameters()]
    optimizer = MAKERS[name](model.parameters())
    get_optimizer_state_dict(model, inner(optimizer))
    assert all(torch.equal(full(param), old) for param, old in zip(model.parameters(), before))


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_before_the_first_step_changes_no_parameter(name: str, ranks: Ranks) -> None:
    ranks.run(state_dict_of_a_new_optimizer, name)
