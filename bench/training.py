"""What low-memory states do to a training: final losses of two small models beside those of float32 states.

A character language model on text that ships with Python, and a vision transformer of the size of ``make demo``'s on
scikit-learn's digits. Every setting starts from the same weights and sees the same batches, for each seed. Under
``spike`` one step has a gradient 10^4 times too large in 1 % of the elements; under ``small`` the loss is
scaled so that gradients are of the order of 1e-4, with eps 1e-12.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_optim

from .footprint import state_bytes
from .settings import SETTINGS, STRESSED, keyword_arguments

STRESSES = ("none", "spike", "small")
SPIKE, SHARE, SMALL = 1e4, 0.01, 1e-4
WIDTH, CONTEXT = 64, 32
BATCH = {"language": 8, "vision": 16}
LAYERS = {"language": 2, "vision": 6}


def text() -> Tensor:
    """Characters of the standard library's sources, as indices below 128."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = "".join((folder / f"{name}.py").read_text() for name in ("argparse", "inspect", "typing", "pickle"))
    return torch.tensor([min(ord(letter), 127) for letter in sources])


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)


class CharacterModel(nn.Module):
    """Predicts each character from those before it: a transformer of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS["language"]))
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, letters: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, dtype=self.position.dtype)
        hidden = self.embedding(letters) + self.position
        for block in self.layers:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        scores: Tensor = self.head(hidden)
        return scores


def language(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, and a function that gives the loss of the next batch."""
    letters = text()
    generator = torch.Generator().manual_seed(seed)

    def loss(model: nn.Module) -> Tensor:
        starts = torch.randint(0, len(letters) - CONTEXT - 1, (BATCH["language"], 1), generator=generator)
        batch = letters[starts + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())

    torch.manual_seed(seed)
    return CharacterModel(), loss


def vision(seed: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The same for digits of 8 x 8 pixels, in 16 patches of 2 x 2."""
    from sklearn.datasets import load_digits

    pixels, answers = (torch.from_numpy(found) for found in load_digits(return_X_y=True))
    patches = (pixels.float() / 8 - 1).view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
    generator = torch.Generator().manual_seed(seed)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Linear(4, WIDTH)
            self.position = nn.Parameter(0.5 * torch.randn(16, WIDTH))
            self.layers = nn.Sequential(*(layer() for _ in range(LAYERS["vision"])))
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.head(self.layers(self.patch(images.to(self.position.dtype)) + self.position).mean(1))
            return found

    def loss(model: nn.Module) -> Tensor:
        batch = torch.randint(0, len(patches), (BATCH["vision"],), generator=generator)
        return F.cross_entropy(model(patches[batch]).float(), answers[batch])

    torch.manual_seed(seed)
    return Classifier(), loss


MODELS = {"language": language, "vision": vision}


@dataclass
class Outcome:
    """Of one setting, model and stress: final losses by seed, and bytes of state and parameter a parameter."""

    losses: list[float] = field(default_factory=list)
    bytes_a_parameter: float = 0.0

    def beside(self, reference: Outcome) -> tuple[float, float]:
        """The mean and the deviation of the difference of losses, seed by seed."""
        found = [mine - theirs for mine, theirs in zip(self.losses, reference.losses)]
        return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def train(kind: str, setting: str, stress: str, seed: int, steps: int) -> tuple[float, float]:
    """The mean loss over the last tenth of the steps, and bytes a parameter."""
    dtype, options = SETTINGS[setting]
    model, loss_of = MODELS[kind](seed)
    model = model.to(dtype)
    scale = SMALL if stress == "small" else 1.0
    optimizer = fused_optim.AdamW(model.parameters(), lr=1e-3, eps=1e-12 if stress == "small" else 1e-8, **options)
    spikes = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:  # a tenth of warm-up, then linearly to a tenth
            group["lr"] = 1e-3 * min(1.0, (step + 1) / (0.1 * steps), 1.1 - step / steps)
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss * scale).backward()
        if stress == "spike" and step == steps // 2:
            for param in model.parameters():
                assert param.grad is not None
                hit = torch.rand(param.shape, generator=spikes) < SHARE
                param.grad = torch.where(hit, param.grad * SPIKE, param.grad)
        optimizer.step()
        losses.append(loss.item())
    kept = state_bytes(optimizer)
    params = list(model.parameters())
    size = sum(param.nbytes for param in params)
    last = losses[-max(1, steps // 10) :]
    return statistics.mean(last), (kept + size) / sum(param.numel() for param in params)


def row_of(kind: str, stress: str, setting: str, found: dict[str, Outcome]) -> dict[str, Any]:
    """What the result file holds of one setting, model and stress."""
    dtype, options = SETTINGS[setting]
    mean, deviation = found[setting].beside(found["float32"])
    return {
        "model": kind,
        "stress": stress,
        "setting": setting,
        "dtype": str(dtype).removeprefix("torch."),
        "options": keyword_arguments(options),
        "bytes_a_parameter": found[setting].bytes_a_parameter,
        "losses": found[setting].losses,
        "loss": statistics.mean(found[setting].losses),
        "beside_float32": mean,
        "deviation": deviation,
    }


def rows(
    seeds: int, steps: int, model: str | None = None, stress_alone: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """For each stress and model, or for one of them, a row for each setting."""
    for stress in STRESSES if stress_alone is None else (stress_alone,):
        for kind in MODELS if model is None else (model,):
            found = {setting: Outcome() for setting in (SETTINGS if stress == "none" else STRESSED)}
            for seed in range(seeds):
                for setting, outcome in found.items():
                    loss, outcome.bytes_a_parameter = train(kind, setting, stress, seed, steps)
                    outcome.losses.append(loss)
            yield [row_of(kind, stress, setting, found) for setting in found]
