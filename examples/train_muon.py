"""Train a small vision transformer on handwritten digits with Muon, beside AdamW.

Muon has the weights within the blocks; the patch embedding, the positions, norms, biases and the head are AdamW's, in
the same optimizer. Query, key and value are a fused weight, whose heads are matrices by themselves. Final losses,
accuracies on images that were not trained on, and the median time of a step are printed.
"""

from __future__ import annotations

import statistics
import sys

from compare_on_digits import Run, compare, print_comparison
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from train_digits import VisionTransformer

import fused_optim

HEADS = 4


def make_muon(model: nn.Module, backend: str | None) -> Optimizer:
    groups = fused_optim.muon_groups(model, adamw=["patch_embedding.*", "position"])
    # AdamW's learning rate and weight decay serve for both kinds of groups.
    return fused_optim.Muon(
        groups,
        lr=3e-3,
        adjust_lr_fn="match_rms_adamw",
        weight_decay=1e-2,
        adamw_betas=(0.9, 0.999),
        heads={name: 3 * HEADS for name, _ in model.named_parameters() if name.endswith("qkv.weight")},
        backend=backend,
    )


OPTIMIZERS = {
    "Muon": make_muon,
    "AdamW": lambda model, backend: fused_optim.AdamW(model.parameters(), lr=3e-3, backend=backend),
}
LOSSES = {
    "loss after 1/4": lambda run: statistics.mean(run.losses[len(run.losses) // 4 :][:22]),
    "final loss": lambda run: statistics.mean(run.losses[-22:]),
}


def show(runs: list[Run], console: Console) -> None:
    print_comparison(runs, LOSSES, console)


def main() -> int:
    return compare(
        OPTIMIZERS,
        lambda: VisionTransformer(heads=HEADS),
        lambda name, model, backend: OPTIMIZERS[name](model, backend),
        show,
        program=__file__,
        description=__doc__,
        epochs=8,
    )


if __name__ == "__main__":
    sys.exit(main())
