"""Train in two processes: DistributedDataParallel with clipping and GradScaler, and ZeroRedundancyOptimizer.

Each process sees its half of every batch. The run under DDP must end with the bits of one process that steps the mean
of the two halves' gradients; ZeroRedundancyOptimizer, which keeps half of the optimizer's state in each process, and
which is continued from a checkpoint, with those of DDP. Random data, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fused_optim

PROCESSES = 2
CLIP_NORM = 0.5
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.LayerNorm(33), nn.Linear(33, 4))


def make_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(steps)
    ]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    halves: list[int],
    clip_norm: float | None = None,
) -> None:
    """Step the mean gradient of some halves of each batch, of all processes."""
    scaler = fused_optim.GradScaler("cpu", init_scale=2.0**24)  # the first steps overflow float16 and are skipped
    for images, labels in batches:
        optimizer.zero_grad()
        for half in halves:
            with torch.autocast("cpu", torch.float16):
                logits = model(images[half::PROCESSES])
            scaler.scale(F.cross_entropy(logits.float(), labels[half::PROCESSES])).backward()
        for param in model.parameters() if len(halves) > 1 else ():
            param.grad /= len(halves)  # DDP has done so
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
    assert 0 < scaler.get_scale() < 2.0**24


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def train_with_ddp(batches: list[tuple[Tensor, Tensor]], rank: int) -> nn.Module:
    """The optimizer clips inside its step: it has all gradients."""
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    clip = fused_optim.ClipGradByGlobalNorm(CLIP_NORM)
    train(model, fused_optim.AdamW(model.parameters(), **OPTIONS, grad_clip=clip), batches, [rank])
    return model.module


def train_with_zero(batches: list[tuple[Tensor, Tensor]], rank: int, clip_norm: float | None) -> nn.Module:
    """Half of the parameters are with each process's optimizer, so the global norm is taken outside of it."""
    model = DistributedDataParallel(make_model())
    middle = len(batches) // 2

    def make_optimizer() -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fused_optim.AdamW, **OPTIONS)

    optimizer = make_optimizer()
    train(model, optimizer, batches[:middle], [rank], clip_norm)
    optimizer.consolidate_state_dict(to=0)
    checkpoint = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(checkpoint)
    optimizer = make_optimizer()
    optimizer.load_state_dict(checkpoint[0])
    train(model, optimizer, batches[middle:], [rank], clip_norm)
    return model.module


def work(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    batches = make_batches(steps)
    alone = make_model()
    clip = fused_optim.ClipGradByGlobalNorm(CLIP_NORM)
    train(alone, fused_optim.AdamW(alone.parameters(), **OPTIONS, grad_clip=clip), batches, list(range(PROCESSES)))
    results = {"DistributedDataParallel": same(train_with_ddp(batches, rank), alone)}

    alone = make_model()
    optimizer = fused_optim.AdamW(alone.parameters(), **OPTIONS)
    middle = steps // 2
    for part in (batches[:middle], batches[middle:]):
        train(alone, optimizer, part, list(range(PROCESSES)), CLIP_NORM)
    results["ZeroRedundancyOptimizer, with a resume"] = same(train_with_zero(batches, rank, CLIP_NORM), alone)

    for name, keeps in results.items() if rank == 0 else ():
        print(f"{'ok    ' if keeps else 'MISSED'} {name}: the bits of one process")
    dist.destroy_process_group()
    if not all(results.values()):
        sys.exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(work, (folder, arguments.steps), nprocs=PROCESSES)
        except torch.multiprocessing.ProcessExitedException as error:
            print(f"{Path(__file__).name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
