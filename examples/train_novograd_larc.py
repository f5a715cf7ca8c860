"""Train a small convolutional network on handwritten digits with LARC and NovoGrad, beside AdamW and SGD.

The configuration is that of OpenSeq2Seq's speech models: LARC with eta 0.001 around NovoGrad with betas (0.95, 0.98)
and weight decay 1e-3, no other regularisation, biases and scales of norms included. The network is built from 1D
convolutions as they are, and reads an image as a sequence of its rows. Accuracy on images that were not trained on, the
median time of a step, and the trust ratios of the last step are printed.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from compare_on_digits import Run, compare, print_comparison
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

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


def show(runs: list[Run], console: Console) -> None:
    print_comparison(runs, {"final loss": lambda run: run.losses[-1]}, console)
    norms = runs[0].optimizer.last_norms
    assert norms is not None
    table = Table(title=f"Last step of {runs[0].name}")
    table.add_column("parameter")
    for heading in ("|grad|", "|param|", "factor"):
        table.add_column(heading, justify="right")
    for name, *numbers in zip(norms.names, *(column.tolist() for column in norms[1:])):
        table.add_row(name, *(f"{number:.4g}" for number in numbers))
    console.print(table)


def main() -> int:
    return compare(
        OPTIMIZERS,
        Jasper,
        lambda name, model, backend: OPTIMIZERS[name](model.named_parameters(), backend),
        show,
        program=__file__,
        description=__doc__,
        epochs=15,
    )


if __name__ == "__main__":
    sys.exit(main())
