"""Wrappers that subclass an optimizer's class, as Lightning's and Fabric's: they answer as the optimizer itself."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim.state import masters

pytestmark = pytest.mark.requires(modules=("pytorch_lightning",))


def lightning(optimizer: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_lightning.core.optimizer import LightningOptimizer
    return LightningOptimizer(optimizer)


def fabric(optimizer: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric.strategies import SingleDeviceStrategy
        from lightning_fabric.wrappers import _FabricOptimizer
    return _FabricOptimizer(optimizer, SingleDeviceStrategy())


def copying(optimizer: Any) -> Any:
    """As older Lightnings and others did."""
    wrapper = object.__new__(type("Copying" + type(optimizer).__name__, (type(optimizer),), {}))
    wrapper.__dict__.update(optimizer.__dict__)
    return wrapper


each_wrapper = pytest.mark.parametrize("wrap", [lightning, fabric, copying])


def stepped(wrap: Callable[[Any], Any], *, before: bool) -> tuple[Any, Any]:
    """An optimizer that has taken a step, and its wrapper, made before that or after it."""
    named = [(name, Parameter(torch.full((8,), 1.0).bfloat16())) for name in ("weight", "bias")]
    optimizer = fused_optim.AdamW(
        named,
        lr=1e-3,
        backend="eager",
        lr_scale={"bias": 0.5},
        grad_clip=fused_optim.ClipGradByGlobalNorm(1.0),
        master_weights="float32",
    )
    wrapper = wrap(optimizer) if before else None
    for _, param in named:
        param.grad = torch.full_like(param, 3.0)
    optimizer.step()
    return optimizer, wrap(optimizer) if wrapper is None else wrapper


@each_wrapper
@pytest.mark.parametrize("before", [True, False])
def test_a_wrapper_answers_as_the_optimizer(wrap: Callable[[Any], Any], before: bool) -> None:
    optimizer, wrapper = stepped(wrap, before=before)
    assert isinstance(wrapper, fused_optim.AdamW)
    assert float(wrapper.last_grad_norm) == float(optimizer.last_grad_norm) == 12.0
    assert wrapper.backend == optimizer.backend == "eager"
    saved, expected = wrapper.state_dict(), optimizer.state_dict()
    assert saved["fused_optim_scales"] == expected["fused_optim_scales"] == {"lr_scale": {1: 0.5}}
    assert all(torch.equal(saved["state"][i]["master_param"], expected["state"][i]["master_param"]) for i in range(2))
    assert repr(wrapper).splitlines()[1:] == repr(optimizer).splitlines()[1:]
    texts = []
    for described in (optimizer, wrapper):
        texts.append(io.StringIO())
        fused_optim.describe(described, file=texts[-1])
    one, two = (text.getvalue().splitlines()[1:] for text in texts)
    assert one == two


@each_wrapper
@pytest.mark.parametrize("before", [True, False])
def test_what_is_asked_of_a_wrapper_is_done(wrap: Callable[[Any], Any], before: bool) -> None:
    optimizer, wrapper = stepped(wrap, before=before)
    param = optimizer.param_groups[0]["params"][0]
    assert not torch.equal(optimizer.state[param]["master_param"], param.detach().float())
    wrapper.refresh_masters()
    assert torch.equal(optimizer.state[param]["master_param"], param.detach().float())
    later = Parameter(torch.ones(4).bfloat16())
    wrapper.add_param_group({"params": [later], "param_names": ["later"]})
    later.grad = torch.ones_like(later)
    optimizer.step()
    assert masters.KEYS["float32"] in optimizer.state[later]
    assert float(wrapper.last_grad_norm) == float(optimizer.last_grad_norm)


@each_wrapper
def test_a_wrapper_of_larc(wrap: Callable[[Any], Any]) -> None:
    params = [Parameter(torch.ones(4))]
    optimizer = fused_optim.LARC(fused_optim.SGD(params, lr=0.1, backend="eager"))
    wrapper = wrap(optimizer)
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(wrapper.last_norms.trust_ratio, optimizer.last_norms.trust_ratio)
    assert wrapper.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
