"""The CUDA phases on the host as the backend "cuda", for CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_optim.backends import choice, extension
from fused_optim.tensors import describe_tensor

from .build import OnHost


def as_device_memory(tensor: torch.Tensor) -> Any:
    facts = describe_tensor(tensor)
    return facts and (facts[0], 2, *facts[2:])


@contextmanager
def cuda_phases(shim: OnHost) -> Iterator[None]:
    """Within, backend="cuda" takes CPU tensors, through a reader that calls them device memory."""

    def make_plan(**options: Any) -> Any:
        if not cuda.chosen:
            return real.Plan(**options)
        return shim.module.Plan(
            **{
                **options,
                "exchange_api": None,
                "tensor_shim": None,
                "describe": as_device_memory,
                "current_stream": lambda index: 0,
            }
        )

    real = extension._C
    cuda = SimpleNamespace(chosen=False)
    choose = choice.choose

    def choose_here(device: torch.device, forced: str | None = None) -> tuple[str, str | None]:
        cuda.chosen = forced == "cuda"
        return ("cuda", None) if forced == "cuda" else choose(device, forced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_C", SimpleNamespace(**{**vars(real), "Plan": make_plan}))
        patch.setattr(choice, "choose", choose_here)
        patch.setattr(choice, "check_forced", lambda backend, devices: None)
        yield
