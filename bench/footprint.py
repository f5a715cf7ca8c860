"""What a step costs in memory: the bytes of its storages, those it takes for a while, and its launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fused_optim.backends import extension

from .material import Material
from .optimizers import Recipe, Stepper


def optimizer_of(stepper: Stepper) -> Any:
    """The torch.optim.Optimizer within, whatever is around it."""
    while not hasattr(stepper, "state") and hasattr(stepper, "optimizer"):
        stepper = stepper.optimizer
    return stepper


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every plain tensor in a state: in containers, and in the subclasses that hold low-bit numbers."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


def state_bytes(stepper: Stepper) -> int:
    """The bytes of an optimizer's state; what several parameters share counts once."""
    states = getattr(optimizer_of(stepper), "state", {})
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors_in(list(states.values()))
    }
    return sum(storages.values())


def bytes_of_step(material: Material, states: int, read_twice: tuple[str, ...] = ()) -> int:
    """What a step must read and write: parameters and states both ways, gradients once.

    ``read_twice`` names what is read again, because a norm of it must be known before the update.
    """
    params = sum(param.numel() * param.element_size() for param in material.flat)
    again = {"param": params, "grad": params, "states": states}
    return 3 * params + 2 * states + sum(again[name] for name in read_twice)


def footprint(recipe: Recipe, stepper: Stepper, material: Material) -> dict[str, Any]:
    """Bytes held and moved by one step, and its launches; takes a few steps."""
    device = material.flat[0].device
    states = state_bytes(stepper)
    elements = sum(param.numel() for param in material.flat)
    counted: dict[str, Any] = {
        "state_bytes_per_parameter": states / max(1, elements),
        "bytes_moved": bytes_of_step(material, states),
        "bytes_moved_uncached": bytes_of_step(material, states, recipe.read_twice),
    }
    held = 2 * sum(param.numel() * param.element_size() for param in material.flat) + states
    if device.type == "cuda":
        temporary, launches, kernel_us = _profiled_on_cuda(stepper, device)
        counted |= {"launches": launches, "kernel_us": kernel_us}
    else:
        temporary = _temporary_on_cpu(stepper)
    versions = [param.grad._version for param in material.flat if param.grad is not None]
    stepper.step()
    written = [param.grad._version for param in material.flat if param.grad is not None] != versions
    return {
        **counted,
        "temporary_bytes": temporary,
        "peak_bytes": held + temporary,
        "writes_gradients": written,
    }


def _temporary_on_cpu(stepper: Stepper) -> int:
    """The most that a step takes from torch's allocator at a time, beside what it had."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        stepper.step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    taken = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def _profiled_on_cuda(stepper: Stepper, device: torch.device) -> tuple[int, int, float]:
    """Temporary bytes, kernel launches, and microseconds in kernels of one step."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    counter = None if extension._C is None else extension._C.cuda_launches
    counted = 0 if counter is None else counter()
    stepper.step()
    torch.cuda.synchronize(device)
    temporary = torch.cuda.max_memory_allocated(device) - before
    own = 0 if counter is None else counter() - counted
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        stepper.step()
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in recorded.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)  # a range of the host, drawn on the device's line
    ]
    # Our own counter knows launches that a profiler without CUPTI does not see.
    return temporary, max(own, len(kernels)), sum(event.time_range.elapsed_us() for event in kernels)
