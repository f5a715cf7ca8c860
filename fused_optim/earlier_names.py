"""The names that modules had before they stood in their folders: pickles name a class by its module."""

from __future__ import annotations

import sys

MODULES = {
    **dict.fromkeys(("adamw", "adamwdl", "lamb", "larc", "lars", "lion", "novograd", "sgd"), "optimizers"),
    **dict.fromkeys(("clip", "scales"), "options"),
    "trust_ratio": "rule",
}


def give_to(package: str) -> None:
    """Let what was pickled find its classes under the earlier names. The modules must have been imported."""
    for module, folder in MODULES.items():
        sys.modules[f"{package}.{module}"] = sys.modules[f"{package}.{folder}.{module}"]
