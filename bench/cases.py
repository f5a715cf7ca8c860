"""The cases that `step` times: an optimizer of this library, and a peer with the same work before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.nn import Parameter

import fused_optim

from .peers.peer import class_of
from .peers.timm import timm

Groups = list[dict[str, Any]]


class Stepper(Protocol):
    """An optimizer, or what stands for one."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Case:
    """What is stepped beside whom."""

    name: str
    peer: str
    ours: Callable[[], Stepper]
    theirs: Callable[[], Stepper]
    default_device: str | None = None  # torch.set_default_device while stepping
    bytes_per_element: int | None = None  # what the memory must move at least, where that is the limit
    cold: bool = False  # before each step the caches are used for other things, as a training does


def new_groups(groups: int, tensors: int, numel: int, dtype: torch.dtype = torch.float32) -> Groups:
    """Param groups of equal tensors, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(groups):
        params = [Parameter(torch.randn(numel, generator=generator).to(dtype)) for _ in range(tensors)]
        for param in params:
            param.grad = torch.randn(numel, generator=generator).to(dtype)
        made.append({"params": params})
    return made


def elements_of(optimizer: Any) -> int:
    return sum(param.numel() for group in optimizer.param_groups for param in group["params"])


def adamw(
    name: str,
    groups: int,
    tensors: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    cold: bool = False,
) -> Case:
    def make() -> Groups:
        return new_groups(groups, tensors, numel, dtype)

    return Case(
        name,
        "torch.optim.AdamW(fused=True)",
        lambda: fused_optim.AdamW(make()),
        lambda: torch.optim.AdamW(make(), fused=True),
        device,
        cold=cold,
    )


class Clipped:
    """torch's way to clip by the global norm."""

    def __init__(self) -> None:
        self.optimizer = torch.optim.AdamW(new_groups(1, 8, 8_000_000), fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()


def clipped() -> fused_optim.AdamW:
    return fused_optim.AdamW(new_groups(1, 8, 8_000_000), grad_clip=fused_optim.ClipGradByGlobalNorm(1.0))


def clamp(params: list[Parameter]) -> None:
    with torch.no_grad():
        for param in params:
            param.clamp_(-1e3, 1e3)


class Clamped:
    """Master weights beside parameters that the training clamps after each step, as CLIP does its logit scale."""

    def __init__(self) -> None:
        self.param_groups = new_groups(1, 8, 8_000_000, torch.bfloat16)
        self.optimizer = fused_optim.AdamW(self.param_groups[0]["params"], master_weights="float32")

    def step(self) -> None:
        self.optimizer.step()
        clamp(self.param_groups[0]["params"])


class ClampedCopies:
    """The same by hand: float32 copies for torch's optimizer, from which the parameters are rounded."""

    def __init__(self) -> None:
        self.params = new_groups(1, 8, 8_000_000, torch.bfloat16)[0]["params"]
        self.copies = [Parameter(param.detach().float()) for param in self.params]
        self.optimizer = torch.optim.AdamW(self.copies, fused=True)

    def step(self) -> None:
        for param, copy in zip(self.params, self.copies, strict=True):
            assert param.grad is not None
            copy.grad = param.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for param, copy in zip(self.params, self.copies, strict=True):
                param.copy_(copy)
        clamp(self.params)


class Infinities:
    """A step in which a GradScaler finds an infinity, and the one after it."""

    def __init__(self, scaler: torch.amp.GradScaler, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        self.param_groups = new_groups(1, 1000, 16)
        self.optimizer = make(self.param_groups)
        self.scaler = scaler
        self.param = self.param_groups[0]["params"][0]
        self.grads = [torch.full((16,), float("inf")), torch.ones(16)]

    def step(self) -> None:
        for grad in self.grads:
            self.param.grad = grad
            self.scaler.scale(torch.ones(()))
            self.scaler.step(self.optimizer)
            self.scaler.update(1.0)


LAYERS, RATE, KINDS = 24, 0.9, ("weight", "bias")


def deep_model() -> list[tuple[str, Parameter]]:
    """1,000 tensors of 24 layers, their embedding and their head: per layer 20 weights and 20 biases."""
    params = [param for group in new_groups(1, 1000, 16) for param in group["params"]]
    names = [f"encoder.layers.{k}.{i}.{kind}" for k in range(LAYERS) for i in range(20) for kind in KINDS]
    names += [f"{place}.{i}.{kind}" for place in ("embedding", "head") for i in range(10) for kind in KINDS]
    return list(zip(names, params, strict=True))


def layer_wise() -> fused_optim.AdamWDL:
    return fused_optim.AdamWDL(
        deep_model(),
        layerwise_decay=RATE,
        n_layers=LAYERS,
        apply_decay_param_fun=lambda name: name.endswith("weight"),
    )


def a_group_a_layer() -> torch.optim.AdamW:
    """torch has a param group for each learning rate and decay: 52."""
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, param in deep_model():
        ratio = fused_optim.layerwise_lr_decay(RATE, None, LAYERS, SimpleNamespace(name=name))
        groups.setdefault((1e-3 * ratio, 1e-2 if name.endswith("weight") else 0.0), []).append(param)
    named = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    return torch.optim.AdamW(named, fused=True)


def speech_model() -> list[Parameter]:
    return list(new_groups(1, 200, 64 * 1024)[0]["params"])


def convolutions() -> list[Parameter]:
    """Twelve pairs of a 1x1 and a depthwise convolution, as inputs in channels_last leave them: weights are contiguous,
    and each gradient has other strides where a dimension has size 1."""
    shapes = {(64, 64, 1, 1): (64, 1, 64, 64), (64, 1, 3, 3): (9, 1, 3, 1)}
    params = [Parameter(torch.randn(shape)) for _ in range(12) for shape in shapes]
    for param in params:
        shape = tuple(param.shape)
        param.grad = torch.empty_strided(shape, shapes[shape]).copy_(torch.randn(shape))
    return params


def matrices(shapes: Iterable[tuple[int, int]]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def small_matrices() -> list[Parameter]:
    """As many as a model of 41 blocks has, in proportions of a transformer's, so small that the host's time shows."""
    return matrices([(12, 4), (4, 4), (16, 4), (4, 16)] * 40 + [(8, 4), (4, 8)] * 2)


def blocks_of_gpt2() -> list[Parameter]:
    return matrices([(3 * 768, 768), (768, 768), (4 * 768, 768), (768, 4 * 768)] * 2)


MOMENTUM: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
LAMB: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "max_grad_norm": None}

CASES = {
    case.name: case
    for case in (
        adamw("150 tensors, 1 group", 1, 150, 16),
        adamw("465 groups of 1 tensor", 465, 1, 16),
        adamw("1000 tensors, 50 groups", 50, 20, 16),
        adamw("150 tensors, 1 group, default device set", 1, 150, 16, device="cpu"),
        adamw("465 groups of 1 tensor, default device set", 465, 1, 16, device="cpu"),
        adamw("1000 tensors, 50 groups, default device set", 50, 20, 16, device="cpu"),
        adamw("150 tensors, 1 group, cold caches", 1, 150, 16, cold=True),
        adamw("1000 tensors, 50 groups, cold caches", 50, 20, 16, cold=True),
        adamw("1500 tensors, 1 group, cold caches", 1, 1500, 16, cold=True),
        adamw("8 x 8M float32", 1, 8, 8_000_000),
        adamw("8 x 8M bfloat16", 1, 8, 8_000_000, torch.bfloat16),
        Case("8 x 8M float32, global-norm clip", "clip_grad_norm_ + torch.optim.AdamW(fused=True)", clipped, Clipped),
        Case(
            "24 convolutions under channels_last",
            "torch.optim.AdamW(fused=True)",
            lambda: fused_optim.AdamW(convolutions()),
            lambda: torch.optim.AdamW(convolutions(), fused=True),
        ),
        Case(
            "8 x 8M bfloat16, masters, clamped",
            "torch.optim.AdamW(fused=True) of float32 copies",
            Clamped,
            ClampedCopies,
        ),
        Case(
            "1000 tensors, two steps, one with an infinity",
            "torch.amp.GradScaler, torch.optim.AdamW(fused=True)",
            lambda: Infinities(fused_optim.GradScaler("cpu", init_scale=1.0), fused_optim.AdamW),
            lambda: Infinities(
                torch.amp.GradScaler("cpu", init_scale=1.0), lambda groups: torch.optim.AdamW(groups, fused=True)
            ),
        ),
        Case(
            "24 layers, layer-wise decay",
            "fused_optim.AdamW, one learning rate",
            layer_wise,
            lambda: fused_optim.AdamW(deep_model()),
        ),
        Case(
            "24 layers, layer-wise decay and mask",
            "torch.optim.AdamW(fused=True), a group a layer and decay",
            layer_wise,
            a_group_a_layer,
        ),
        Case(
            "NovoGrad, 200 x 64K float32",
            "timm NvNovoGrad",
            lambda: fused_optim.NovoGrad(speech_model(), 1e-3, weight_decay=1e-3),
            lambda: timm("nvnovograd", "NvNovoGrad")(speech_model(), lr=1e-3, weight_decay=1e-3),
            bytes_per_element=20,
        ),
        Case(
            "LARC(SGD), 200 x 64K float32",
            "timm Lars(trust_clip=True)",
            lambda: fused_optim.LARC(fused_optim.SGD(speech_model(), **MOMENTUM), eta=0.001, variant="apex"),
            lambda: timm("lars", "Lars")(speech_model(), trust_clip=True, **MOMENTUM),
            bytes_per_element=20,
        ),
        Case(
            "LAMB, 200 x 64K float32",
            "timm Lamb",
            lambda: fused_optim.LAMB(speech_model(), **LAMB),
            lambda: timm("lamb", "Lamb")(speech_model(), **LAMB),
            bytes_per_element=28,
        ),
        Case(
            "Muon, 164 small matrices in 6 shapes",
            "torch.optim.Muon",
            lambda: fused_optim.Muon(small_matrices()),
            lambda: torch.optim.Muon(small_matrices()),
        ),
        Case(
            "Muon, 2 blocks of GPT-2 small",
            "torch.optim.Muon",
            lambda: fused_optim.Muon(blocks_of_gpt2()),
            lambda: torch.optim.Muon(blocks_of_gpt2()),
        ),
        Case(
            "Muon, 2 blocks of GPT-2 small, beside timm",
            "timm Muon",
            lambda: fused_optim.Muon(blocks_of_gpt2(), ns_coefficients="quintic"),
            lambda: timm("muon", "Muon")(blocks_of_gpt2(), weight_decay=0.1, nesterov=True),
        ),
        Case(
            "Muon, 2 blocks of GPT-2 small, beside pytorch_optimizer",
            "pytorch_optimizer Muon",
            lambda: fused_optim.Muon(blocks_of_gpt2()),
            lambda: class_of("pytorch_optimizer", "Muon", "pip install --no-deps pytorch_optimizer")(
                [{"params": blocks_of_gpt2(), "use_muon": True}], lr=1e-3, weight_decay=0.1
            ),
        ),
        Case(
            "Muon, 2 blocks of GPT-2 small, beside dion",
            "dion Muon",
            lambda: fused_optim.Muon(blocks_of_gpt2(), ns_coefficients="polar_express"),
            lambda: class_of("dion", "Muon", "pip install git+https://github.com/microsoft/dion")(
                blocks_of_gpt2(), lr=1e-3, mu=0.95, weight_decay=0.1, nesterov=True
            ),
        ),
    )
}
