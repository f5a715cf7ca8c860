"""Train a tiny BERT with Hugging Face Trainer, clipping, a schedule and a resume, beside torch's AdamW.

The two optimizers must end with the same weights but for rounding, and a run that is continued from a checkpoint with
those of the uninterrupted one. The model is small and initialised at random; random tokens, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fused_optim

MAX_DIFFERENCE = 1e-6  # of any two weights, which are of the size of 0.1


def make_trainer(optimizer: type[torch.optim.Optimizer], folder: Path, steps: int) -> Trainer:
    """Trainer makes the groups, with and without weight decay, and the schedule; the optimizer only its own part."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=3,
        )
    )
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(0, 64, (10,), generator=generator), "labels": index % 3}
        for index in range(8 * steps)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.01,
        max_grad_norm=0.5,
        save_steps=steps // 2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    options: dict[str, Any] = {"lr": arguments.learning_rate}
    return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(optimizer, options))


def difference(one: Trainer, other: Trainer) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.model.parameters(), other.model.parameters()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        stock = make_trainer(torch.optim.AdamW, Path(folder, "torch"), steps)
        stock.train()  # before the next one sets the seed for its dropout
        ours = make_trainer(fused_optim.AdamW, Path(folder, "ours"), steps)
        ours.train()
        resumed = make_trainer(fused_optim.AdamW, Path(folder, "resumed"), steps)
        resumed.train(resume_from_checkpoint=str(Path(folder, "ours", f"checkpoint-{steps // 2}")))
        crossed = make_trainer(fused_optim.AdamW, Path(folder, "crossed"), steps)
        crossed.train(resume_from_checkpoint=str(Path(folder, "torch", f"checkpoint-{steps // 2}")))
    results = {
        "fused_optim beside torch": difference(ours, stock),
        "resumed beside uninterrupted": difference(resumed, ours),
        "resumed from torch's checkpoint": difference(crossed, stock),
    }
    for name, largest in results.items():
        print(f"{'ok    ' if largest <= MAX_DIFFERENCE else 'MISSED'} {name}: largest difference {largest:.1e}")
    return 0 if max(results.values()) <= MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
