"""DTensor parameters, on four processes: every optimizer and placement equals one process with whole tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Collector
from cuda_on_host.backend import cuda_phases
from cuda_on_host.build import OnHost, compile_module
from ranks import WORLD, Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

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


SHIM = Path(__file__).resolve().parent.parent / "build" / "cuda_on_host"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    compile_module(SHIM, sanitize=False)
    started = Ranks()
    yield started
    started.stop()


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


def train_spread(name: str, place: str, backend: str) -> None:
    collector = Collector()
    logging.getLogger("fused_optim").addHandler(collector)
    wholes, spreads = both(torch.float32, place)
    with cuda_phases(shim()) if backend == "cuda" else nullcontext():
        alone = MAKERS[name](wholes, backend="eager" if backend == "eager" else "cpu")
        ours = MAKERS[name](spreads, backend=backend)
        for step in range(20):
            set_both(wholes, spreads, place, step)
            alone.step()
            ours.step()
        assert backend == "eager" or collector.lines == []
    for whole, param in zip(wholes, spreads):
        expected, found = inner(alone).state[whole], inner(ours).state[param]
        assert list(expected) == list(found)
        torch.testing.assert_close(full(param), whole.detach(), rtol=1e-6, atol=1e-6)
        assert_same_everywhere(full(param))
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


def train_everywhere(name: str) -> None:
    for place in PLACEMENTS:
        for backend in BACKENDS:
            try:
                train_spread(name, place, backend)
            except AssertionError as error:
                raise AssertionError(f"{place}, {backend}: {error}") from error


@pytest.mark.parametrize("name", MAKERS)
def test_spread_parameters_are_stepped_as_whole_ones(name: str, ranks: Ranks) -> None:
    ranks.run(train_everywhere, name)
