"""The table of rules with norms, and of the elementwise ones beside AdamW: what the CUDA backend is tested with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import snapshot

from fused_optim import LAMB, LARC, LARS, SGD, AdamW, Lion, NovoGrad

MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.125}
# Each rule of csrc/rules, each place of weight decay, each norm: name: made of params and options.
RULES: dict[str, Any] = {
    "sgd": lambda params, **o: SGD(params, 0.1, weight_decay=0.125, **o),
    "momentum": lambda params, **o: SGD(params, **MOMENTUM, dampening=0.1, maximize=True, **o),
    "nesterov": lambda params, **o: SGD(params, **MOMENTUM, nesterov=True, **o),
    "lion": lambda params, **o: Lion(params, weight_decay=0.1, **o),
    **{
        f"novograd {variant}": lambda params, variant=variant, **o: NovoGrad(
            params, 0.1, weight_decay=0.125, variant=variant, **o
        )
        for variant in ("paper", "openseq2seq", "apex", "timm", "kozistr", "optax", "tfa")
    },
    "novograd amsgrad": lambda params, **o: NovoGrad(params, 0.1, amsgrad=True, **o),
    "novograd largest": lambda params, **o: NovoGrad(params, 0.1, variant="apex", norm_type=0, **o),
    "larc": lambda params, **o: LARC(SGD(params, **MOMENTUM, **o)),
    "larc adamw": lambda params, **o: LARC(AdamW(params, weight_decay=0.125, **o), mode="scale"),
    "larc novograd": lambda params, **o: LARC(NovoGrad(params, 0.1, weight_decay=0.125, **o)),
    "lars timm": lambda params, **o: LARS(params, **MOMENTUM, **o),
    "lars optax": lambda params, **o: LARS(params, **MOMENTUM, variant="optax", **o),
    "lars kozistr": lambda params, **o: LARS(params, **MOMENTUM, variant="kozistr", **o),
    "lamb": lambda params, **o: LAMB(params, **o),
    "lamb clipped ratio": lambda params, **o: LAMB(params, trust_clip=True, always_adapt=True, **o),
    "lamb without ratio": lambda params, **o: LAMB(params, weight_decay=0, bias_correction=False, **o),
}
WITH_DIRECTION = ("lamb", "lamb clipped ratio")
each_rule = pytest.mark.parametrize("rule", RULES)


def eighths(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers whose squares add up exactly, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-16, 17, shape, generator=generator) / 8).to(dtype)


def inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LARC) else optimizer


def step_exactly(optimizer: Any, seed: int = 100) -> None:
    for i, param in enumerate(params_of(optimizer)):
        param.grad = eighths(tuple(param.shape), param.dtype, seed + i).to(param.device)
    optimizer.step()


def assert_near(ours: Any, twin: Any) -> None:
    """As near as sums of squares in two orders bring them."""
    for mine, theirs in zip(snapshot(inner(ours)), snapshot(inner(twin)), strict=True):
        if "param_remainder" in mine:  # bits of one number that only together are near
            for one in (mine, theirs):
                upper = one["param"].view(torch.int16).to(torch.int32) << 16
                one["param"] = (upper + one.pop("param_remainder")).view(torch.float32)
        for key, value in mine.items():
            torch.testing.assert_close(
                value.cpu(), theirs[key].cpu(), equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
            )


def params_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]
