"""One optimizer a parameter, stepped during the backward pass, gives what one for all gives after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import RULES, assert_same_bits, each_implementation, inner
from torch import Tensor, nn

from fused_optim import AdamW, ClipGradByNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script, which torch calls at this import
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

STEPS = 4
# The elementwise ones, those with norms, and one with a trust ratio around it.
TRIED = ("SGD no momentum", "SGD all", "Lion decay", "NovoGrad decay", "LARS decay", "LAMB without ratio", "LARC AdamW")


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 300), nn.LayerNorm(300), nn.ReLU(), nn.Linear(300, 3))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(5, 6, generator=generator)).square().sum().backward()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(mine, theirs, name)


def train_after_backward(make: Callable[..., Any]) -> nn.Module:
    model = new_model()
    optimizer = make(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return model


def makers(backend: str) -> dict[str, Callable[..., Any]]:
    def adamw(params: Iterable[Tensor]) -> AdamW:
        return AdamW(params, 0.01, weight_decay=0.1, backend=backend)

    def clipped(params: Iterable[Tensor]) -> AdamW:
        return AdamW(params, 0.01, grad_clip=ClipGradByNorm(0.1), backend=backend)

    rules = {
        name: lambda params, make=RULES[name], o={} if "LAMB" not in name else {"max_grad_norm": None}: make(
            params, backend=backend, **o
        )
        for name in TRIED
    }
    return {"adamw": adamw, "adamw, clipped tensor by tensor": clipped, **rules}


@each_implementation
@pytest.mark.parametrize("name", makers(""))
def test_hooks_after_accumulation(name: str, backend: str) -> None:
    make = makers(backend)[name]
    model = new_model()
    optimizers = {param: make([param]) for param in model.parameters()}

    def step_and_free(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(step_and_free)
    for step in range(STEPS):
        backward(model, step)
        assert all(param.grad is None for param in optimizers)
    assert_same(model, train_after_backward(make))


@each_implementation
def test_torchs_optimizer_in_backward(backend: str) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "backend": backend}
    model = new_model()
    _apply_optimizer_in_backward(AdamW, model.parameters(), options)
    optimizers = _get_in_backward_optimizers(model)
    assert [type(optimizer) for optimizer in optimizers] == [AdamW] * 6
    for step in range(STEPS):
        backward(model, step)
        assert all(param.grad is None for param in model.parameters())
    assert_same(model, train_after_backward(lambda params: AdamW(params, **options)))
    assert {int(state["step"]) for optimizer in optimizers for state in inner(optimizer).state.values()} == {STEPS}


def test_checkpoints_of_optimizers_in_backward() -> None:
    """Each is an optimizer like any other: a run that is resumed equals the uninterrupted one."""

    def start(model: nn.Module) -> list[AdamW]:
        _apply_optimizer_in_backward(AdamW, model.parameters(), {"lr": 0.01})
        return _get_in_backward_optimizers(model)

    whole, resumed = new_model(), new_model()
    first = start(whole)
    for step in range(2):
        backward(whole, step)
    resumed.load_state_dict(whole.state_dict())
    for mine, saved in zip(start(resumed), first, strict=True):
        mine.load_state_dict(saved.state_dict())
    for step in (2, 3):
        backward(whole, step)
        backward(resumed, step)
    assert_same(whole, resumed)
