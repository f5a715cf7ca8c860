"""Parameters and gradients in memory, made to the shapes of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from .shapes import Model

PIECE = 1 << 20  # elements; random numbers are drawn once and repeated, since a billion of them take a minute


@dataclass(frozen=True)
class Material:
    """What one optimizer steps. Parameters lie in [-1, 1], gradients have a standard deviation of 0.01."""

    model: Model
    params: list[list[Parameter]]  # by group

    def groups(self, hyper: dict[str, Any]) -> list[dict[str, Any]]:
        """Param groups with learning rates and weight decays of their own."""
        return [
            {
                "params": params,
                "lr": hyper["lr"] * group.lr_scale,
                "weight_decay": hyper["weight_decay"] * group.weight_decay_scale,
            }
            for group, params in zip(self.model.groups, self.params)
        ]

    @property
    def flat(self) -> list[Parameter]:
        return [param for params in self.params for param in params]


def _filled(numel: int, piece: torch.Tensor, dtype: torch.dtype, offset: int) -> torch.Tensor:
    made = torch.empty(numel, dtype=dtype, device=piece.device)
    start = offset % len(piece)
    for part in made.split(len(piece)):
        first = min(len(part), len(piece) - start)
        part[:first].copy_(piece[start : start + first])
        part[first:].copy_(piece[: len(part) - first])
    return made


def make_material(model: Model, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Material:
    """The same numbers for the same arguments, up to rounding also across dtypes."""
    generator = torch.Generator().manual_seed(seed)
    longest = min(PIECE, max(1, model.numel))
    values = torch.empty(longest).uniform_(-1, 1, generator=generator).to(device)
    grads = (0.01 * torch.randn(longest, generator=generator)).to(device)
    params, offset = [], 0
    for group in model.groups:
        params.append([])
        for shape in group.tensors.values():
            numel = torch.Size(shape).numel()
            param = Parameter(_filled(numel, values, dtype, offset).view(shape))
            param.grad = _filled(numel, grads, dtype, offset).view(shape)
            offset += numel
            params[-1].append(param)
    return Material(model, params)
