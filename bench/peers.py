"""Optimizers of other libraries, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any


class Missing(Exception):
    """A peer is not installed; the text says which."""


def timm(module: str, name: str) -> Any:
    """An optimizer class of timm, without timm's own ``__init__``, which wants torchvision.

    Raises:
        Missing: timm is not installed.
    """
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.submodule_search_locations is None:
            raise Missing("timm is not installed: pip install --no-deps timm")
        for package, folder in (("timm", ""), ("timm.optim", "optim")):
            stub = types.ModuleType(package)
            stub.__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
            sys.modules[package] = stub
    return getattr(importlib.import_module(f"timm.optim.{module}"), name)
