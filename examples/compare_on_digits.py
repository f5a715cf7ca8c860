"""Train one model with several optimizers on handwritten digits, in lockstep, and compare.

What `train_muon.py` and `train_novograd_larc.py` share: the arguments, the training, and the accuracy that every
optimizer must reach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from train_digits import Digits, load_data, shuffled_batches

MIN_ACCURACY = 0.95


class Run:
    """A model with its optimizer, and what was measured in training it for so many steps."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        self.name, self.model, self.optimizer = name, model, optimizer
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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


def print_comparison(runs: list[Run], losses: dict[str, Callable[[Run], float]], console: Console) -> None:
    """A row a run: the losses, by their headings, its accuracy and the median time of its steps."""
    table = Table(title="Digits")
    table.add_column("optimizer")
    for heading in (*losses, "accuracy", "step, ms"):
        table.add_column(heading, justify="right")
    for run in runs:
        numbers = (*(f"{loss(run):.4f}" for loss in losses.values()), f"{100 * run.accuracy:.1f} %")
        table.add_row(run.name, *numbers, f"{statistics.median(run.step_times):.3f}")
    console.print(table)


def parse_arguments(description: str | None, epochs: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "triton", "eager"), default="auto")
    parser.add_argument("--epochs", type=int, default=epochs, help="of 22 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of the batches")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    return arguments


def compare(
    names: Collection[str],
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[str, nn.Module, str | None], Optimizer],
    show: Callable[[list[Run], Console], None],
    *,
    program: str,
    description: str | None,
    epochs: int,
) -> int:
    """Train a model with each optimizer, from the same weights on the same batches.

    Args:
        names: of the optimizers.
        make_model: a model with new weights.
        make_optimizer: from an optimizer's name, the model and the backend (None: the best there is).
        show: prints what came of it.
        program: the file of the example, for messages.
        description: of the example, for ``--help``.
        epochs: how many there are by default.

    Returns:
        The exit status of the program: 0 if every model has learnt, 1 if one has not, 2 if one cannot be trained.
    """
    arguments = parse_arguments(description, epochs)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    data = load_data(arguments.seed, torch.device(arguments.device))
    backend = None if arguments.backend == "auto" else arguments.backend
    generator = torch.Generator().manual_seed(arguments.seed)
    batches = [batch for _ in range(arguments.epochs) for batch in shuffled_batches(data, generator)]
    runs = []
    for name in names:
        torch.manual_seed(arguments.seed)
        model = make_model().to(arguments.device)
        try:
            runs.append(Run(name, model, make_optimizer(name, model, backend), len(batches)))
        except (RuntimeError, ValueError) as error:
            print(f"{Path(program).name}: {error}", file=sys.stderr)
            return 2
    for images, labels in track(batches, "training", console=console):
        for run in runs:
            run.train(images, labels)
    for run in runs:
        run.test(data)
    show(runs, console)
    learnt = all(run.accuracy >= MIN_ACCURACY for run in runs)
    console.print(f"{'ok    ' if learnt else 'MISSED'} every accuracy is at least {100 * MIN_ACCURACY:g} %")
    return 0 if learnt else 1
