"""Triton without a GPU: kernels are compiled as for one, and every launch stops in front of it.

Everything is the product (plan, table, launcher, triton's own cache and binder) but the driver, which stands for a GPU.
It serves where only the host's part is asked for: what is compiled and when, and what a launch costs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """A GPU that takes every kernel and runs none."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.loaded: list[str] = []  # names of the kernels that were compiled and loaded
        self.launched = 0
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {
                "max_shared_mem": 232448,
                "max_num_regs": 65536,
                "multiprocessor_count": 132,
                "warpSize": target.warp_size,
            },
            unload_module=lambda module: None,
        )

    def _load(self, name: str, *_: Any) -> tuple[Any, ...]:
        self.loaded.append(name)
        return (0, 0, 0, 0, 1024)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*_: Any, **__: Any) -> None:
            self.launched += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu


def pretend(target: str) -> Driver:
    """From now on backend="triton" takes CPU tensors, and its kernels are compiled for a target.

    Call it before the first kernel of this process.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    from fused_optim.kernels import phases, refresh

    assert not refresh.INTERPRETED
    phases.rules()  # imports all kernels
    refresh.INTERPRETED = True  # tables in ordinary memory, no streams, no captures
    os.environ["TRITON_INTERPRET"] = "1"  # CPU tensors are triton's
    active = Driver(TARGETS[target])
    driver.set_active(active)
    return active


def compiled(kernel: Any) -> list[Any]:
    """What a kernel of this process has been compiled to."""
    assert isinstance(kernel, triton.runtime.JITFunction)
    return [one for entry in kernel.device_caches.values() for one in entry[0].values()]
