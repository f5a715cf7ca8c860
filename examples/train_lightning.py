"""Train with Lightning: clipping in 32 and in 16 bits, and a resume, beside torch's AdamW.

In 16 bits there are two ways to clip, and both must end with the weights of torch's AdamW but for rounding: Lightning
clips what the scaler has unscaled, as with torch.optim.AdamW(); or the optimizer unscales and clips inside its step,
which is the fast way. Lightning refuses gradient_clip_val for optimizers with fused=True, torch's as well as these.
Random data, on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_optim

CLIP_NORM = 0.5
MAX_DIFFERENCE = {32: 1e-6, 16: 2.0**-11}  # of any two weights, of the size of 1; float16 rounds those that differ

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Classifier(lightning.LightningModule):
    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.make_optimizer = make_optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.layers(inputs).float(), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def torchs(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def ours(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return fused_optim.AdamW(params, lr=1e-2)


def ours_with_clip(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """In 16 bits, the fast way: unscaling, inf check and clip are inside the step. No gradient_clip_val."""
    return fused_optim.AdamW(params, lr=1e-2, grad_clip=fused_optim.ClipGradByGlobalNorm(CLIP_NORM))


def ours_fused(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return fused_optim.AdamW(params, lr=1e-2, fused=True)


def train(
    make_optimizer: MakeOptimizer, epochs: int, scaler: torch.amp.GradScaler | None = None, **options: Any
) -> lightning.Trainer:
    """For float16 with a scaler; on a GPU ``precision="16-mixed"`` says the same, with torch's scaler."""
    checkpoint = options.pop("ckpt_path", None)
    if scaler is not None:
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(96, 16, generator=generator), torch.randint(0, 4, (96,), generator=generator))
    trainer.fit(Classifier(make_optimizer), DataLoader(data, batch_size=8), ckpt_path=checkpoint)
    return trainer


def difference(one: lightning.Trainer, other: lightning.Trainer) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.model.parameters(), other.model.parameters()))


def refuses_clipping_in_16_bits(epochs: int) -> bool:
    try:
        train(ours_fused, epochs, fused_optim.GradScaler("cpu"), gradient_clip_val=CLIP_NORM)
    except RuntimeError as error:
        return "does not allow for gradient clipping" in str(error)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="before the checkpoint, and once more after it")
    epochs = parser.parse_args().epochs
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    whole, clip = 2 * epochs, {"gradient_clip_val": CLIP_NORM}
    results: dict[tuple[int, str], float] = {}

    stock = train(torchs, whole, **clip)
    mine = train(ours, whole, **clip)
    results[32, "gradient_clip_val"] = difference(mine, stock)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "half.ckpt")
        train(ours, epochs, **clip).save_checkpoint(checkpoint)
        resumed = train(ours, whole, ckpt_path=checkpoint, **clip)
    results[32, "resumed beside uninterrupted"] = difference(resumed, mine)

    def scale() -> dict[str, float]:
        return {"init_scale": 2.0**24}  # the first steps overflow float16 and are skipped

    stock = train(torchs, whole, torch.amp.GradScaler("cpu", **scale()), **clip)
    mine = train(ours_with_clip, whole, fused_optim.GradScaler("cpu", **scale()))
    results[16, "grad_clip of the optimizer"] = difference(mine, stock)
    for scaler in (torch.amp.GradScaler, fused_optim.GradScaler):
        mine = train(ours, whole, scaler("cpu", **scale()), **clip)
        whose = "torch's" if scaler is torch.amp.GradScaler else "this library's"
        results[16, f"gradient_clip_val, {whose} scaler"] = difference(mine, stock)
    stock = train(torchs, whole, precision="bf16-mixed", **clip)
    mine = train(ours, whole, precision="bf16-mixed", **clip)
    results[16, "bf16-mixed, gradient_clip_val"] = difference(mine, stock)

    keeps = []
    for (bits, name), largest in results.items():
        keeps.append(largest <= MAX_DIFFERENCE[bits])
        print(f"{'ok    ' if keeps[-1] else 'MISSED'} {bits} bits, {name}: largest difference {largest:.1e}")
    keeps.append(refuses_clipping_in_16_bits(1))
    print(f"{'ok    ' if keeps[-1] else 'MISSED'} 16 bits, gradient_clip_val with fused=True: Lightning refuses")
    return 0 if all(keeps) else 1


if __name__ == "__main__":
    sys.exit(main())
