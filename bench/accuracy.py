"""How far a step is from exact: the largest error of a parameter against the same optimizer in float64."""

from __future__ import annotations

import logging

import torch
from torch.nn import Parameter

from .contenders import EAGER, Contender, ours
from .material import Material, make_material
from .optimizers import Recipe
from .shapes import Group, Model

STEPS = 3
# Two groups with factors of their own; small, odd and larger than an 8-bit optimizer's threshold of 4,096.
MODEL = Model(
    "accuracy",
    (
        Group(1.0, 1.0, {"0.weight": (96, 64), "1.weight": (7, 5)}),
        Group(0.5, 0.0, {"0.bias": (1001,), "1.bias": (3,)}),
    ),
)


def max_error(recipe: Recipe, contender: Contender, dtype: torch.dtype, device: torch.device) -> float:
    """The largest absolute difference of a parameter from float64's after three steps; parameters lie in [-1, 1]."""
    model = contender.model(MODEL)
    material = make_material(model, dtype, device)
    exact = Material(model, [[_as_float64(param) for param in params] for params in material.params])
    stepper = contender.make(material)
    logger = logging.getLogger("fused_optim")
    level = logger.level
    logger.setLevel(logging.ERROR)  # float64 by the eager path is what is asked for
    try:
        reference = ours(recipe, EAGER).make(exact)
        grads = [param.grad.clone() for param in material.flat if param.grad is not None]
        for _ in range(STEPS):
            for param, grad in zip(material.flat, grads):
                param.grad.copy_(grad)  # type: ignore[union-attr]  # some write into it
            stepper.step()
            reference.step()
    finally:
        logger.setLevel(level)
    pairs = zip(material.flat, exact.flat)
    return max(float((param.double() - true).detach().abs().max()) for param, true in pairs)


def _as_float64(param: Parameter) -> Parameter:
    double = Parameter(param.detach().double())
    assert param.grad is not None
    double.grad = param.grad.double()
    return double
