"""Train a small vision transformer on handwritten digits with three AdamWs; compare losses and step times.

The models start from the same weights and see the same batches in lockstep: whatever else the machine does
meanwhile, it does to all of them. Only the line that makes the optimizer differs.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fused_optim

EPOCHS = 11
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1

# What the default run must show. Over five seeds the accuracy was 96.1 to 99.2 %, and rounding moved the final
# loss by at most 0.0002 %.
MIN_ACCURACY = 95.0  # %
MAX_LOSS_DIFFERENCE = 1.0  # %
MAX_ACCURACY_DIFFERENCE = 0.5  # percentage points

TITLES = {
    "torch": "torch AdamW (default)",
    "torch-fused": "torch AdamW (fused=True)",
    "fused_optim": "fused_optim AdamW",
}


def make_optimizer(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """``options``: of fused_optim's."""
    if name == "torch":
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if name == "torch-fused":
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    return fused_optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options)


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [-1, 1] and their labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(seed: int, device: torch.device) -> Digits:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.reshape(-1, 8, 8) / 8 - 1, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part).to(device) for part in split)
    return Digits(train_images.float(), train_labels.long(), test_images.float(), test_labels.long())


def shuffled_batches(data: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of full batches; the few images left over wait for another epoch's order."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    for indices in order.split(BATCH_SIZE)[: len(order) // BATCH_SIZE]:
        indices = indices.to(data.train_labels.device)
        yield data.train_images[indices], data.train_labels[indices]


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """16 patches of 2 x 2 pixels, six blocks of width 64, and the mean over the patches."""

    def __init__(self, width: int = 64, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(4, width)
        # With the usual 0.02 the order of the patches is learnt late: 91 % after 15 epochs instead of 98 %.
        self.position = nn.Parameter(0.5 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patch_embedding(patches) + self.position)).mean(1))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The usual two: weight decay for matrices, none for biases and norms."""
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


class Run:
    """A model with its optimizer, and what was measured in training it."""

    def __init__(self, name: str, model: nn.Module, total_steps: int, options: dict[str, Any]) -> None:
        self.name = name
        self.model = model
        self.optimizer = make_optimizer(name, parameter_groups(model), options)
        warmup = max(1, total_steps // 10)

        def warmup_then_cosine(step: int) -> float:
            progress = max(0, step - warmup) / max(1, total_steps - warmup)
            return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_cosine)
        self.losses: list[float] = []
        self.step_times: list[float] = []  # ms, until the device has finished
        self.host_times: list[float] = []  # ms, until step() returns

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]}, {self.backend}" if self.backend else TITLES[self.name]

    @property
    def backend(self) -> str:
        return self.optimizer.backend if self.name == "fused_optim" else ""

    def train(self, images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(loss.item())
        self.time_step(images.device)
        self.scheduler.step()

    def time_step(self, device: torch.device) -> None:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            begin.record()
        before = time.perf_counter()
        self.optimizer.step()
        self.host_times.append(1e3 * (time.perf_counter() - before))
        if device.type == "cuda":
            end.record()
            end.synchronize()
            self.step_times.append(begin.elapsed_time(end))
        else:
            self.step_times.append(self.host_times[-1])

    @torch.no_grad()
    def evaluate(self, data: Digits) -> None:
        """The loss over the whole training set and the share of test digits read correctly, in per cent."""
        self.model.eval()
        self.final_loss = F.cross_entropy(self.model(data.train_images), data.train_labels).item()
        hits = self.model(data.test_images).argmax(1) == data.test_labels
        self.accuracy = 100 * hits.float().mean().item()
        self.step_time = statistics.median(self.step_times)
        self.host_time = statistics.median(self.host_times)


def train(runs: list[Run], data: Digits, epochs: int, seed: int, console: Console) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    console.print(f"Training {', '.join(run.title for run in runs)} in turn, batch by batch; epochs: {epochs}.")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs * (len(data.train_labels) // BATCH_SIZE), loss="-")
        for epoch in range(1, epochs + 1):
            for images, labels in shuffled_batches(data, generator):
                for run in runs:
                    run.train(images, labels)
                losses = " ".join(f"{run.losses[-1]:.3f}" for run in runs)
                progress.update(task, advance=1, loss=losses)
            if not console.is_terminal:  # the bar is drawn once, at the end
                console.print(f"epoch {epoch} of {epochs}, losses {losses}")
    for run in runs:
        run.evaluate(data)


def print_table(runs: list[Run], console: Console) -> None:
    reference = runs[0]
    table = Table(title="AdamW on handwritten digits")
    table.add_column("optimizer")
    for heading in ("final loss", "test accuracy\n%", "step\nms", "host per step\nms", "speed ratio"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.title,
            f"{run.final_loss:.6f}",
            f"{run.accuracy:.2f}",
            f"{run.step_time:.3f}",
            f"{run.host_time:.3f}",
            f"{reference.step_time / run.step_time:.2f}",
        )
    console.print(table)
    console.print(
        "Times are medians. step: until the device has finished; host: until step() returns.\n"
        f"Speed ratio: step time of {reference.title} / this row's."
    )


def print_states(runs: list[Run], console: Console) -> None:
    for run in runs:
        tensors = [value for state in run.optimizer.state.values() for value in state.values()]
        size = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        elements = sum(param.numel() for param in run.model.parameters())
        console.print(f"{run.title}: {size:,} bytes of state, {size / elements:.2f} a parameter")


def check(runs: list[Run], console: Console) -> bool:
    """Print whether each run keeps the bounds, the others against the first; True if all do."""
    reference = runs[0]
    holds: list[bool] = []

    def report(claim: str, kept: bool) -> None:
        holds.append(kept)
        console.print(f"{'ok    ' if kept else 'MISSED'} {claim}")

    for run in runs:
        report(f"{run.title}: {run.accuracy:.2f} % >= {MIN_ACCURACY:g} % accuracy", run.accuracy >= MIN_ACCURACY)
    for run in runs[1:]:
        loss = 100 * abs(run.final_loss / reference.final_loss - 1)
        accuracy = abs(run.accuracy - reference.accuracy)
        report(
            f"{run.title}: {loss:.4f} % <= {MAX_LOSS_DIFFERENCE:g} % from the loss of {reference.title}, "
            f"{accuracy:.2f} <= {MAX_ACCURACY_DIFFERENCE:g} points from its accuracy",
            loss <= MAX_LOSS_DIFFERENCE and accuracy <= MAX_ACCURACY_DIFFERENCE,
        )
    return all(holds)


def plot(runs: list[Run], path: Path, machine: str) -> None:
    panels = [["losses", "times"], ["differences", "times"]] if len(runs) > 1 else [["losses", "times"]]
    figure, axes = plt.subplot_mosaic(
        panels,
        figsize=(12, 5.5),
        layout="constrained",
        width_ratios=(3, 2),
        height_ratios=(2, 1)[: len(panels)],
    )
    losses, times = axes["losses"], axes["times"]
    colours = [f"C{list(TITLES).index(run.name)}" for run in runs]
    reference = runs[0]
    steps = range(1, len(reference.losses) + 1)

    # The curves lie on top of each other: each is drawn thinner than the one before.
    for run, colour, width in zip(runs, colours, (9, 5, 1.5)[-len(runs) :], strict=True):
        losses.plot(steps, run.losses, color=colour, linewidth=width, label=run.title)
    losses.set(yscale="log", xlabel="training step", ylabel="cross-entropy of the batch [nat]", title="Training loss")
    losses.legend()

    for run, colour in zip(runs[1:], colours[1:], strict=True):
        difference = [100 * abs(loss / other - 1) for loss, other in zip(run.losses, reference.losses, strict=True)]
        axes["differences"].plot(steps, difference, ".", color=colour, markersize=4)
    if len(runs) > 1:
        losses.set_xlabel("")
        axes["differences"].axhline(MAX_LOSS_DIFFERENCE, color="black", linewidth=1, linestyle="--")
        axes["differences"].set(yscale="log", ylim=(1e-6, 10), xlabel="training step", ylabel="loss difference [%]")
        axes["differences"].set_title(f"From {reference.title}; dashed: the bound on the final loss", fontsize="medium")

    positions = range(len(runs))
    times.barh(positions, [run.step_time for run in runs], color=colours, height=0.6)
    for position, run in zip(positions, runs, strict=True):
        first, *_, last = statistics.quantiles(run.step_times, n=10)
        times.plot((first, last), (position, position), color="black", marker="|", markersize=10)
        host = "" if run.host_times == run.step_times else f"\nhost {run.host_time:.3f} ms"
        times.annotate(
            f"{run.step_time:.3f} ms{host}",
            (max(last, run.step_time), position),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
        )
    times.set_yticks(positions, [run.title.replace(" AdamW", "\nAdamW") for run in runs])
    times.invert_yaxis()
    times.margins(x=0.5)
    times.set_xlim(left=0)
    times.set(xlabel="time [ms]; bar: median, line: 10 % to 90 %", title=f"Optimizer step, {machine}")

    for ax in axes.values():
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is a GPU"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "cuda", "triton", "eager"),
        default="auto",
        help="what computes the steps of fused_optim",
    )
    parser.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16", "8bit"),
        default="float32",
        help="how fused_optim keeps its states; the bounds are enforced for the default alone",
    )
    parser.add_argument(
        "--rounding", choices=("nearest", "stochastic"), default="nearest", help="of states of bfloat16"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="the bounds are enforced for the default alone")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        choices=("all", *TITLES),
        default="all",
        help="what to train with; the first is the reference of the others",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of the batches")
    parser.add_argument("--output", type=Path, default=Path("demo/train_digits.png"), help="the plot, a PNG")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "all" in arguments.optimizer:
        arguments.optimizer = list(TITLES)
    arguments.optimizer = list(dict.fromkeys(arguments.optimizer))
    return arguments


def main() -> int:
    arguments = parse_arguments()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    # Lines of a log or a pipe are not to be cut at 80 characters.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"

    data = load_data(arguments.seed, device)
    torch.manual_seed(arguments.seed)
    model = VisionTransformer().to(device)
    params = list(model.parameters())
    console.print(
        f"{machine}: {len(data.train_labels)} images to train on, {len(data.test_labels)} to test; "
        f"{sum(param.numel() for param in params):,} parameters in {len(params)} tensors"
    )

    options = {
        "backend": None if arguments.backend == "auto" else arguments.backend,
        "state_dtype": "8bit" if arguments.state_dtype == "8bit" else getattr(torch, arguments.state_dtype),
        "rounding": arguments.rounding,
    }
    total_steps = arguments.epochs * (len(data.train_labels) // BATCH_SIZE)
    try:
        runs = [Run(name, copy.deepcopy(model), total_steps, options) for name in arguments.optimizer]
    except (RuntimeError, ValueError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    train(runs, data, arguments.epochs, arguments.seed, console)

    print_table(runs, console)
    print_states(runs, console)
    plot(runs, arguments.output, machine)
    console.print(f"Plot: {arguments.output}")
    kept = check(runs, console)
    if arguments.state_dtype != "float32":
        console.print("The bounds are those of float32 states; with others they are shown, not enforced.")
        return 0
    if arguments.epochs != EPOCHS:
        console.print(f"The bounds hold for {EPOCHS} epochs; with {arguments.epochs} they are shown, not enforced.")
        return 0
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
