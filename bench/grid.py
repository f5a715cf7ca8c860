"""The grid of a run: optimizers x models x dtypes, each with all of its contenders; and names, with near misses."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .contenders import contenders_for
from .measure import Setting, measure_setting
from .models import MODELS
from .optimizers import RECIPES
from .settings import SETTINGS
from .shapes import Model

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def pick(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that are asked for, in any case of letters.

    Raises:
        ValueError: a name that is not known; the text lists near ones.
    """
    by_lower = {name.lower(): name for name in known}
    picked = []
    for name in names:
        if name.lower() not in by_lower:
            near = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.4)]
            raise ValueError(f"{option} {name!r} is not known; near: {', '.join(near or known)}")
        picked.append(by_lower[name.lower()])
    return list(dict.fromkeys(picked))


@dataclass(frozen=True)
class Grid:
    """What is asked for; an empty sequence of backends or peers stands for all of them, None for no peer."""

    optimizers: Sequence[str]
    models: Sequence[Model]
    dtypes: Sequence[str]
    device: torch.device
    backends: Sequence[str] = ()
    peers: Sequence[str] | None = ()
    memory: bool = False  # ours also with each setting of states and masters

    def settings(self) -> list[Setting]:
        return [
            Setting(RECIPES[optimizer], model, DTYPES[dtype], self.device)
            for model in self.models
            for dtype in self.dtypes
            for optimizer in self.optimizers
        ]

    def run(
        self, setting: Setting, rounds: int, rotate: bool, tick: Callable[[str], None] = lambda text: None
    ) -> Iterator[dict[str, Any]]:
        """The rows of one setting: measured contenders, then those that are absent, with the reason."""
        settings = [
            options for dtype, options in SETTINGS.values() if self.memory and options and dtype == setting.dtype
        ]
        found, absent = contenders_for(setting.recipe, setting.device, self.backends, self.peers, settings)
        if found:
            yield from measure_setting(setting, found, rounds, rotate, tick)
        for name, reason in absent:
            ours = name.startswith("fused_optim")
            yield {
                **setting.key,
                "contender": name,
                "library": "",
                "ours": ours,
                "status": "skipped",
                "reason": reason,
                "note": "",
            }


def models_named(names: Sequence[str]) -> list[Model]:
    for name in names:
        if name.lower() not in MODELS and Path(name).is_file():
            raise ValueError(f"--model takes a name, and {name} is a file: --shapes {name}")
    return [MODELS[name]() for name in pick("--model", names, list(MODELS))]
