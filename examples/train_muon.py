"""Train a small vision transformer on handwritten digits with Muon, beside AdamW.

Muon has the weights within the blocks; the patch embedding, the positions, norms, biases and the head are AdamW's, in
the same optimizer. Query, key and value are a fused weight, whose heads are matrices by themselves. Final losses,
accuracies on images that were not trained on, and the median time of a step are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from train_digits import Digits, VisionTransformer, load_data, shuffled_batches

import fused_optim

HEADS = 4
MIN_ACCURACY = 0.95


def make_muon(model: VisionTransformer, backend: str | None, **options: object) -> Optimizer:
    groups = fused_optim.muon_groups(model, adamw=["patch_embedding.*", "position"])
    fused = {name: 3 * HEADS for name, _ in model.named_parameters() if name.endswith("qkv.weight")}
    return fused_optim.Muon(groups, lr=3e-3, heads=fused, backend=backend, **options)  # type: ignore[arg-type]


OPTIMIZERS = {
    # AdamW's learning rate and weight decay serve for both kinds of groups.
    "Muon": lambda model, backend: make_muon(
        model, backend, adjust_lr_fn="match_rms_adamw", weight_decay=1e-2, adamw_betas=(0.9, 0.999)
    ),
    "AdamW": lambda model, backend: fused_optim.AdamW(model.parameters(), lr=3e-3, backend=backend),
}


class Run:
    """A model with its optimizer, and what was measured in training it."""

    def __init__(self, name: str, seed: int, device: str, backend: str | None, steps: int) -> None:
        torch.manual_seed(seed)
        self.name = name
        self.model = VisionTransformer(heads=HEADS).to(device)
        self.optimizer = OPTIMIZERS[name](self.model, backend)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.step_times: list[float] = []  # ms
        self.accuracy = 0.0

    def train(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        self.optimizer.step()
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        self.step_times.append(1e3 * (time.perf_counter() - before))
        self.scheduler.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, data: Digits) -> None:
        self.model.eval()
        self.accuracy = (self.model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def print_table(runs: list[Run], console: Console) -> None:
    table = Table(title="Digits")
    table.add_column("optimizer")
    for heading in ("loss after 1/4", "final loss", "accuracy", "step, ms"):
        table.add_column(heading, justify="right")
    for run in runs:
        quarter = statistics.mean(run.losses[len(run.losses) // 4 :][:22])
        final = statistics.mean(run.losses[-22:])
        numbers = (f"{quarter:.4f}", f"{final:.4f}", f"{100 * run.accuracy:.1f} %")
        table.add_row(run.name, *numbers, f"{statistics.median(run.step_times):.3f}")
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "triton", "eager"), default="auto")
    parser.add_argument("--epochs", type=int, default=8, help="of 22 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of the batches")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    data = load_data(arguments.seed, torch.device(arguments.device))
    backend = None if arguments.backend == "auto" else arguments.backend
    generator = torch.Generator().manual_seed(arguments.seed)
    batches = [batch for _ in range(arguments.epochs) for batch in shuffled_batches(data, generator)]
    try:
        runs = [Run(name, arguments.seed, arguments.device, backend, len(batches)) for name in OPTIMIZERS]
    except (RuntimeError, ValueError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    for images, labels in track(batches, "training", console=console):
        for run in runs:
            run.train(images, labels)
    for run in runs:
        run.test(data)
    print_table(runs, console)
    learnt = all(run.accuracy >= MIN_ACCURACY for run in runs)
    console.print(f"{'ok    ' if learnt else 'MISSED'} every accuracy is at least {100 * MIN_ACCURACY:g} %")
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
