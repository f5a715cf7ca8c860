"""The settings of states and masters that are measured beside each other: what a setting of AdamW is called."""

from __future__ import annotations

from typing import Any

import torch

# Each setting: the parameters' dtype and the options. The first of a dtype is the one without options.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, bfloat16 states": (torch.float32, {"state_dtype": torch.bfloat16}),
    "float32, stochastic bfloat16 states": (
        torch.float32,
        {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
    ),
    "float32, 8bit": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, split": (torch.bfloat16, {"master_weights": "split"}),
    "bfloat16, split, 8bit": (torch.bfloat16, {"master_weights": "split", "state_dtype": "8bit"}),
    "bfloat16, split8": (torch.bfloat16, {"master_weights": "split8"}),
    "bfloat16, split8, 8bit": (torch.bfloat16, {"master_weights": "split8", "state_dtype": "8bit"}),
    "bfloat16, stochastic, 8bit": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "8bit"}),
}
# Those that are trained under stress too: whose states differ.
STRESSED = (
    "float32",
    "float32, bfloat16 states",
    "float32, 8bit",
    "bfloat16, split8, 8bit",
    "bfloat16, stochastic, 8bit",
)


def keyword_arguments(options: dict[str, Any]) -> str:
    """The options as they are written in a call."""
    return ", ".join(
        f"{name}={value}" if isinstance(value, torch.dtype) else f'{name}="{value}"' for name, value in options.items()
    )
