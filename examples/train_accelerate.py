"""Train with Hugging Face accelerate: accumulation, clipping, a schedule and a resume, beside torch's AdamW.

The two optimizers must end with the same weights but for rounding, and a run that is continued from a checkpoint with
those of the uninterrupted one. So must a run under this library's GradScaler, which accelerate takes over. Random data,
on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_optim

CLIP_NORM = 0.5
MAX_DIFFERENCE = 1e-6  # of any two weights, which are of the size of 1

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Run:
    """A model, prepared by accelerate with its optimizer, loader and schedule."""

    def __init__(self, make_optimizer: MakeOptimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        data = TensorDataset(torch.randn(96, 16), torch.randint(0, 4, (96,)))
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.accelerator.scaler = scaler  # before prepare: the optimizer's wrapper takes it
        optimizer = make_optimizer(model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, DataLoader(data, batch_size=8), schedule
        )

    def train(self, epochs: int, clip: bool = True) -> None:
        for _ in range(epochs):
            for inputs, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = F.cross_entropy(self.model(inputs), labels)
                    self.accelerator.backward(loss)
                    if clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()

    def difference(self, other: Run) -> float:
        pairs = zip(self.model.parameters(), other.model.parameters())
        return max((one - two).abs().max().item() for one, two in pairs)


def ours(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return fused_optim.AdamW(params, lr=1e-2)


def ours_with_clip(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return fused_optim.AdamW(params, lr=1e-2, grad_clip=fused_optim.ClipGradByGlobalNorm(CLIP_NORM))


def torchs(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="before the checkpoint, and once more after it")
    epochs = parser.parse_args().epochs
    results: dict[str, float] = {}

    stock = Run(torchs)
    stock.train(2 * epochs)
    run = Run(ours)
    run.train(epochs)
    with tempfile.TemporaryDirectory() as folder:
        run.accelerator.save_state(folder)
        run.train(epochs)
        results["fused_optim beside torch"] = run.difference(stock)
        resumed = Run(ours)
        resumed.accelerator.load_state(folder)
        resumed.train(epochs)
        results["resumed beside uninterrupted"] = resumed.difference(run)
    scaled = Run(ours_with_clip, fused_optim.GradScaler("cpu", init_scale=1024.0))
    scaled.train(2 * epochs, clip=False)  # the optimizer clips inside its step
    results["GradScaler and grad_clip beside torch"] = scaled.difference(stock)

    for name, difference in results.items():
        print(f"{'ok    ' if difference <= MAX_DIFFERENCE else 'MISSED'} {name}: largest difference {difference:.1e}")
    return 0 if max(results.values()) <= MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
