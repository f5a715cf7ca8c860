"""Parameters of FSDP's first kind (FullyShardedDataParallel): shards that are no DTensors and know no whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_snapshots, inner, new_grad, new_params, set_grads, snapshot
from support.ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn import Parameter

from fused_optim import (
    LAMB,
    LARC,
    LARS,
    SGD,
    AdamW,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    GradScaler,
    Lion,
    NovoGrad,
    grad_scaler,
)

# What needs norms of whole tensors, and the word for it in the message.
NORMED: dict[str, tuple[str, Callable[..., Any]]] = {
    "global norm": (
        "ClipGradByGlobalNorm",
        lambda params, **o: AdamW(params, grad_clip=ClipGradByGlobalNorm(1.0), **o),
    ),
    "measured": (
        "ClipGradByGlobalNorm",
        lambda params, **o: AdamW(params, grad_clip=ClipGradByGlobalNorm(math.inf), **o),
    ),
    "norm": ("ClipGradByNorm", lambda params, **o: SGD(params, 0.1, grad_clip=ClipGradByNorm(1.0), **o)),
    "NovoGrad": ("NovoGrad", lambda params, **o: NovoGrad(params, **o)),
    "LARC": ("LARC", lambda params, **o: LARC(SGD(params, 0.1, **o))),
    "LARC around torch's": ("LARC", lambda params, **o: LARC(torch.optim.SGD(params, 0.1))),
    "LARS": ("LARS", lambda params, **o: LARS(params, 0.1, **o)),
    "LAMB": ("LAMB", lambda params, **o: LAMB(params, max_grad_norm=None, **o)),
    "LAMB's clip": ("ClipGradByGlobalNorm", lambda params, **o: LAMB(params, exclude=["*"], **o)),
}
PLAIN: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, **o: AdamW(params, lr=1e-2, **o),
    "SGD, value": lambda params, **o: SGD(params, 0.1, 0.9, grad_clip=ClipGradByValue(0.01), **o),
    "Lion": lambda params, **o: Lion(params, lr=1e-3, **o),
    "LAMB, excluded": lambda params, **o: LAMB(params, max_grad_norm=None, exclude=["*"], **o),
}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))


def sharded(orig: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=orig)


def backward(model: nn.Module, step: int, *, share: bool, scale: Callable[[Tensor], Tensor] | None = None) -> None:
    batch = numbers((8, 7), step)
    batch = batch.chunk(WORLD)[dist.get_rank()] if share else batch
    loss = model(batch).square().mean()
    (loss if scale is None else scale(loss)).backward()


def refused(orig: bool) -> None:
    model = sharded(orig)
    for what, make in NORMED.values():
        for backend in ("cpu", "eager"):
            with pytest.raises(ValueError, match=rf"flattened and cut up .* and {what} needs the norms of whole"):
                make(model.named_parameters(), backend=backend)


@pytest.mark.parametrize("orig", [False, True])
def test_norms_of_flat_shards_are_refused(orig: bool, ranks: Ranks) -> None:
    ranks.run(refused, orig)


def trained(name: str, orig: bool, backend: str) -> None:
    alone, model = network(), sharded(orig)
    twin = PLAIN[name](alone.named_parameters(), backend=backend)
    ours = PLAIN[name](model.named_parameters(), backend=backend)
    for step in range(4):
        for optimizer, of, share in ((twin, alone, False), (ours, model, True)):
            optimizer.zero_grad()
            backward(of, step, share=share)
            optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        for expected, found in zip(alone.parameters(), model.module.parameters() if orig else [], strict=orig):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if not orig:
            full = torch.cat([param.detach().flatten() for param in alone.parameters()])
            torch.testing.assert_close(model._flat_param[: full.numel()].detach(), full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("orig", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_elementwise_steps_are_those_of_one_process(name: str, orig: bool, backend: str, ranks: Ranks) -> None:
    ranks.run(trained, name, orig, backend)


def scaled(kind: str, orig: bool, backend: str) -> list[Any]:
    """Four steps, in one of which a rank's shard has an infinity: the scales, and whether this rank's shard moved."""
    model = sharded(orig)
    params = list(model.parameters())
    optimizer: Any = torch.optim.AdamW(params, 1e-2)
    if kind != "torch":
        optimizer = AdamW(params, 1e-2, backend=backend, fused=True if kind == "fused" else None)
    scaler = ShardedGradScaler("cpu", init_scale=64.0)
    history: list[Any] = []
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step, share=True, scale=scaler.scale)
        if step == 1 and dist.get_rank() == 1:
            next(param.grad for param in params if param.grad is not None and param.grad.numel()).view(-1)[0] = math.inf
        before = [param.detach().clone() for param in params]
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True) if old.numel()]
        history.append((scaler.get_scale(), all(moved), any(moved)))
    steps = {float(state["step"]) for state in optimizer.state.values()}
    return [*history, steps]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("orig", [False, True])
@pytest.mark.parametrize("kind", ["default", "fused"])
def test_an_infinity_in_one_shard_stops_every_rank(kind: str, orig: bool, backend: str, ranks: Ranks) -> None:
    """As with torch's AdamW: weights and scales stay the same everywhere."""
    ours, theirs = ranks.run(scaled, kind, orig, backend), ranks.run(scaled, "torch", orig, backend)
    assert ours == theirs
    for history in ours:
        assert [scale for scale, _, _ in history[:4]] == [64.0, 32.0, 32.0, 32.0]
        assert [(whole, some) for _, whole, some in history[:4]] == [
            (True, True),
            (False, False),
            (True, True),
            (True, True),
        ]


# In one process, with FSDP's mark on plain parameters --------------------------------------------------------------


def flattened(shapes: Any = ((5,), (3, 4))) -> list[tuple[str, Parameter]]:
    params = new_params(shapes=shapes)
    for param in params:
        param._fsdp_flattened = True
    return list(zip("ab", params, strict=True))


@pytest.mark.parametrize("kind", NORMED)
def test_the_text_names_parameter_option_and_remedy(kind: str) -> None:
    what, make = NORMED[kind]
    with pytest.raises(ValueError, match="fully_shard") as caught:
        make(flattened())
    assert str(caught.value).startswith("'a' (param_groups[0]['params'][0]) is flattened and cut up by FullySharded")
    assert f"and {what} needs" in str(caught.value)
    assert ("clip_grad_norm_()" in str(caught.value)) == what.startswith("Clip")


@pytest.mark.parametrize("kind", NORMED)
def test_a_model_that_is_wrapped_later(kind: str, any_backend: str) -> None:
    """After the optimizer was made: the step refuses, and nothing has changed."""
    _, make = NORMED[kind]
    params = new_params(shapes=[(5,), (3, 4)])
    optimizer = make(list(zip("ab", params, strict=True)), backend=any_backend)
    set_grads(params, 0)
    params[1]._fsdp_flattened = True
    before, grads = snapshot(inner(optimizer)), [param.grad for param in params]
    with pytest.raises(ValueError, match=r"'b' .* is flattened"):
        optimizer.step()
    assert_same_snapshots(snapshot(inner(optimizer)), before)
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    params[1]._fsdp_flattened = False
    optimizer.step()
    assert not torch.equal(before[1]["param"], params[1])


def test_what_takes_no_part_in_a_norm_may_be_flat(any_backend: str) -> None:
    (a, b), (c, d) = new_params(shapes=[(5,), (3, 4)]), new_params(shapes=[(5,), (3, 4)])
    b._fsdp_flattened = d._fsdp_flattened = True
    clip = ClipGradByGlobalNorm(1e-3, need_clip=lambda name, param: name == "a")
    for optimizer, params in (
        (AdamW([("a", a), ("b", b)], grad_clip=clip, backend=any_backend), (a, b)),
        (LARC(SGD([("a", c), ("b", d)], 0.1, backend=any_backend), exclude=["b"]), (c, d)),
    ):
        set_grads(params, 0)
        optimizer.step()
        assert inner(optimizer).last_grad_norm is None or inner(optimizer).last_grad_norm > 0


def test_a_flat_group_that_is_added_is_refused() -> None:
    (param,) = new_params(shapes=[(5,)])
    optimizer = NovoGrad([("c", param)])
    optimizer.add_param_group({"params": flattened()})
    param.grad = torch.ones(5)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'a' .* NovoGrad needs the norms"):
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)


def test_this_librarys_scaler_leaves_flat_shards_to_torchs_way() -> None:
    """It cannot know of an infinity in another process's shard; ShardedGradScaler's unscaling does."""
    named = flattened()
    optimizer = AdamW(named, fused=True)
    optimizer._step_supports_amp_scaling = True
    assert not grad_scaler.finds_inf_itself(optimizer)
    assert not optimizer._step_supports_amp_scaling
    scaler = GradScaler("cpu", 4.0)
    scaler.scale(torch.zeros(()))
    for step in range(2):
        for position, (_, param) in enumerate(named):
            param.grad = new_grad(param, step, position) * 4
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(named[0][1].grad, new_grad(named[0][1], step))
    assert optimizer.state[named[0][1]]["step"] == 2
