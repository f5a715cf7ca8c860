"""Times the steps of DTensor parameters in several processes, ours and torch's in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

import fused_optim

from .measure import row_of_pairs

TENSORS, ELEMENTS = 465, 16  # rf-detr's parameters, one a group there; so small that only the host's cost is left
STEPS = 10  # of ours in a block, beside one of torch's


def _params(mesh: Any) -> list[Parameter]:
    from torch.distributed.tensor import Shard, distribute_tensor

    params = []
    for _ in range(TENSORS):
        param, grad = (distribute_tensor(torch.randn(ELEMENTS), mesh, [Shard(0)], src_data_rank=None) for _ in "pg")
        params.append(Parameter(param))
        params[-1].grad = grad
    return params


def _pairs(mesh: Any) -> list[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """A name, our step, the name and the step of torch's way to do the same."""
    clipped = _params(mesh)
    torchs = torch.optim.AdamW(clipped, fused=True)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        torchs.step()

    clip = fused_optim.ClipGradByGlobalNorm(1.0)
    plain = torch.optim.AdamW(_params(mesh), fused=True)
    peer = "torch.optim.AdamW(fused=True)"
    return [
        ("AdamW", peer, fused_optim.AdamW(_params(mesh)).step, plain.step),
        (
            "AdamW, global-norm clip",
            f"clip_grad_norm_ + {peer}",
            fused_optim.AdamW(_params(mesh), grad_clip=clip).step,
            clip_and_step,
        ),
    ]


def _seconds(step: Callable[[], Any], steps: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def _measure(rank: int, processes: int, rounds: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    figures = []
    for name, peer, ours, theirs in _pairs(init_device_mesh("cpu", (processes,))):
        for step in (ours, theirs):
            _seconds(step, 2)
        measured = [(_seconds(ours, STEPS), _seconds(theirs, 1)) for _ in range(rounds)]
        case = f"{name}, {TENSORS} DTensors in {processes} processes"
        figures.append(row_of_pairs(case, peer, "cpu", measured))
    if rank == 0:
        torch.save(figures, Path(folder) / "figures")
    dist.barrier()
    dist.destroy_process_group()


def time_sharded(processes: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of each case, as the first process sees them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, (processes, rounds, folder), nprocs=processes)  # type: ignore[attr-defined]
        figures: list[dict[str, Any]] = torch.load(Path(folder) / "figures")
        return figures
