"""The optimizers of this library as the harness makes them: one set of hyperparameters each, the peers' too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import fused_optim

from .material import Material

Hyper = dict[str, Any]


class Stepper(Protocol):
    """An optimizer, or what stands for one."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made, beside which hyperparameters its peers are made with too."""

    name: str
    hyper: Hyper
    ours: Callable[[Material, Hyper, Hyper], Stepper]  # material, hyperparameters, options of ours such as backend
    # What a step reads a second time, where a tensor does not stay in the cache between norms and update.
    read_twice: tuple[str, ...] = ()


def _plain(name: str, **fixed: Any) -> Callable[[Material, Hyper, Hyper], Stepper]:
    def make(material: Material, hyper: Hyper, options: Hyper) -> Stepper:
        return getattr(fused_optim, name)(material.groups(hyper), **hyper, **fixed, **options)

    return make


def _adamwdl(material: Material, hyper: Hyper, options: Hyper) -> Stepper:
    """One group; the factors of the model's groups come by name."""
    named = {
        name: (param, group.lr_scale, group.weight_decay_scale)
        for group, params in zip(material.model.groups, material.params)
        for name, param in zip(group.tensors, params)
    }
    return fused_optim.AdamWDL(
        [(name, param) for name, (param, _, _) in named.items()],
        **hyper,
        layerwise_decay=0.9,
        set_param_lr_fun=lambda rate, names, layers, param: named[param.name][1],
        apply_decay_param_fun=lambda name: named[name][2] != 0,
        **options,
    )


def _larc(material: Material, hyper: Hyper, options: Hyper) -> Stepper:
    inner = fused_optim.SGD(material.groups(hyper), **hyper, **options)
    return fused_optim.LARC(inner, eta=0.001, variant="apex")


ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
MOMENTUM = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("AdamW", {**ADAM, "weight_decay": 1e-2}, _plain("AdamW")),
        Recipe("Adam", {**ADAM, "weight_decay": 0.0}, _plain("Adam")),
        Recipe("AdamWDL", {**ADAM, "weight_decay": 1e-2}, _adamwdl),
        Recipe("SGD", MOMENTUM, _plain("SGD")),
        Recipe(
            "NovoGrad",
            {"lr": 1e-3, "betas": (0.95, 0.98), "eps": 1e-8, "weight_decay": 1e-3},
            _plain("NovoGrad"),
            read_twice=("grad",),
        ),
        Recipe("LARC", MOMENTUM, _larc, read_twice=("param", "grad")),
        Recipe("LARS", MOMENTUM, _plain("LARS"), read_twice=("param", "grad")),
        Recipe(
            "LAMB",
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2},
            _plain("LAMB", max_grad_norm=None),
            read_twice=("param", "states"),
        ),
        Recipe("Lion", {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1e-2}, _plain("Lion")),
    )
}
