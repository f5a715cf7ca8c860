"""What low-memory states do to single updates: under a gradient that is far too large, and after gradients have fallen.

The optimizers are the shipped ones. Their parameters are set to zero before each step, with a learning rate of one, so
that a parameter then holds the update; a twin with float32 states sees the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim

from .settings import SETTINGS
from .training import SHARE, SPIKE, language

# A master changes nothing of a state.
STATES = {name: options for name, (dtype, options) in SETTINGS.items() if dtype == torch.float32}
EXACT = "float32"
ROWS, ROW = 64, 1024
QUANTILES = (0.05, 0.5, 0.95)


class Shadow:
    """The updates that an optimizer would make of gradients."""

    def __init__(self, like: list[Tensor], options: dict[str, Any]) -> None:
        self.params = [Parameter(torch.zeros_like(one)) for one in like]
        self.optimizer = fused_optim.AdamW(self.params, lr=1.0, weight_decay=0.0, **options)

    def updates(self, grads: list[Tensor]) -> Tensor:
        for param, grad in zip(self.params, grads, strict=True):
            param.detach().zero_()
            param.grad = grad
        self.optimizer.step()
        return torch.cat([param.detach().flatten() for param in self.params])

    def roots(self) -> Tensor:
        """The roots of the averages of squares, as the next step reads them."""
        codes = self.optimizer.state_dict_for_torch()["state"]
        return torch.cat([state["exp_avg_sq"].float().flatten() for state in codes.values()]).sqrt()


def under_spike(steps: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each setting: the largest update before and after a step that is far too large, and the error of updates.

    The gradients are those of the language model in a training with float32 states; in the middle of it one step's are
    10^4 times too large in 1 % of the elements. The error is the root of the mean square of the difference from the
    exact updates, over that of the updates, before that step.
    """
    model, loss_of = language(seed)
    params = list(model.parameters())
    optimizer = fused_optim.AdamW(params, lr=1e-3)
    shadows = {name: Shadow([param.detach() for param in params], options) for name, options in STATES.items()}
    before, after, squares = (dict.fromkeys(STATES, 0.0) for _ in range(3))
    total = 0.0
    spikes = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()  # type: ignore[no-untyped-call]  # torch's
        grads = [param.grad for param in params if param.grad is not None]
        seen = grads
        if step == steps // 2:
            hits = [torch.rand(grad.shape, generator=spikes) < SHARE for grad in grads]
            seen = [torch.where(hit, grad * SPIKE, grad) for hit, grad in zip(hits, grads)]
        updates = {name: shadow.updates(seen).double() for name, shadow in shadows.items()}
        largest = before if step < steps // 2 else after
        for name, update in updates.items():
            largest[name] = max(largest[name], float(update.abs().max()))
            if step < steps // 2:
                squares[name] += float((update - updates[EXACT]).square().sum())
        if step < steps // 2:
            total += float(updates[EXACT].square().sum())
        optimizer.step()
    return {
        name: {
            "largest_update": before[name],
            "largest_update_after_spike": after[name],
            "update_error": (squares[name] / total) ** 0.5,
        }
        for name in STATES
    }


def after_fall(before: int = 1000, after: int = 3000, seed: int = 0) -> dict[str, list[float]]:
    """Of each setting: quantiles of the root of the average of squares over the exact one, after gradients fell.

    Random gradients, whose magnitudes differ from element to element; those of half of the elements fall to a tenth,
    and it is these that are looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp(torch.randn(ROWS, ROW, generator=generator))
    falls = torch.rand(ROWS, ROW, generator=generator) < 0.5
    shadows = {name: Shadow([magnitudes], options) for name, options in STATES.items()}
    for step in range(before + after):
        if step == before:
            magnitudes = torch.where(falls, 0.1 * magnitudes, magnitudes)
        grad = torch.randn(ROWS, ROW, generator=generator) * magnitudes
        for shadow in shadows.values():
            shadow.updates([grad])
    roots = {name: shadow.roots()[falls.flatten()].double() for name, shadow in shadows.items()}
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return {name: (root / roots[EXACT]).quantile(levels).tolist() for name, root in roots.items()}


def rows(steps: int, before: int = 1000, after: int = 3000) -> Iterator[dict[str, Any]]:
    """A row of figures for each setting of states."""
    fallen = after_fall(before, after)
    for name, figures in under_spike(steps).items():
        yield {"setting": name, **figures, "root_ratios_after_fall": fallen[name]}
