"""Train a small convolutional network on handwritten digits with LARC and NovoGrad, beside AdamW and SGD.

The configuration is that of OpenSeq2Seq's speech models: LARC with eta 0.001 around NovoGrad with betas (0.95, 0.98)
and weight decay 1e-3, no other regularisation, biases and scales of norms included. The network is built from 1D
convolutions as they are, and reads an image as a sequence of its rows. Accuracy on images that were not trained on, the
median time of a step, and the trust ratios of the last step are printed.
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
from torch import Tensor, nn
from train_digits import Digits, load_data, shuffled_batches

import fused_optim

OPTIMIZERS = {
    "LARC(NovoGrad)": lambda params, backend: fused_optim.LARC(
        fused_optim.NovoGrad(params, lr=0.02, betas=(0.95, 0.98), weight_decay=1e-3, backend=backend),
        eta=0.001,
        mode="clip",
    ),
    "NovoGrad": lambda params, backend: fused_optim.NovoGrad(
        params, lr=0.02, betas=(0.95, 0.98), weight_decay=1e-3, backend=backend
    ),
    "LARC(SGD)": lambda params, backend: fused_optim.LARC(
        fused_optim.SGD(params, lr=0.1, momentum=0.9, backend=backend), eta=0.02
    ),
    "AdamW": lambda params, backend: fused_optim.AdamW(params, lr=3e-3, backend=backend),
}
MIN_ACCURACY = 0.95


class Jasper(nn.Module):
    """Blocks of convolution, batch norm and ReLU with residual connections, over an image's rows."""

    def __init__(self, channels: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.prologue = nn.Sequential(nn.Conv1d(8, channels, 3, padding=1), nn.BatchNorm1d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm1d(channels))
            for _ in range(blocks)
        )
        self.head = nn.Linear(8 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.prologue(images.reshape(-1, 8, 8))
        for block in self.blocks:
            rows = F.relu(rows + block(rows))
        return self.head(rows.flatten(1))


class Run:
    """A model with its optimizer, and what was measured in training it."""

    def __init__(self, name: str, seed: int, device: str, backend: str | None, steps: int) -> None:
        torch.manual_seed(seed)
        self.name = name
        self.model = Jasper().to(device)
        self.optimizer = OPTIMIZERS[name](self.model.named_parameters(), backend)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.step_times: list[float] = []  # ms
        self.accuracy = 0.0
        self.loss = float("nan")

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
        self.loss = loss.item()

    @torch.no_grad()
    def test(self, data: Digits) -> None:
        self.model.eval()
        self.accuracy = (self.model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def print_tables(runs: list[Run], console: Console) -> None:
    table = Table(title="Digits")
    table.add_column("optimizer")
    for heading in ("final loss", "accuracy", "step, ms"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name, f"{run.loss:.4f}", f"{100 * run.accuracy:.1f} %", f"{statistics.median(run.step_times):.3f}"
        )
    console.print(table)
    norms = runs[0].optimizer.last_norms
    assert norms is not None
    table = Table(title=f"Last step of {runs[0].name}")
    table.add_column("parameter")
    for heading in ("|grad|", "|param|", "factor"):
        table.add_column(heading, justify="right")
    for name, *numbers in zip(norms.names, *(column.tolist() for column in norms[1:])):
        table.add_row(name, *(f"{number:.4g}" for number in numbers))
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "triton", "eager"), default="auto")
    parser.add_argument("--epochs", type=int, default=15, help="of 22 steps")
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
    print_tables(runs, console)
    learnt = all(run.accuracy >= MIN_ACCURACY for run in runs)
    console.print(f"{'ok    ' if learnt else 'MISSED'} every accuracy is at least {100 * MIN_ACCURACY:g} %")
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
