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

    What is imported for it does not stay in ``sys.modules``, where it would stand in the way of the whole timm.

    Raises:
        Missing: timm is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        raise Missing("timm is not installed: pip install --no-deps timm")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"}
    try:
        for package, folder in (("timm", ""), ("timm.optim", "optim")):
            stub = types.ModuleType(package)
            stub.__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
            sys.modules[package] = stub
        return getattr(importlib.import_module(f"timm.optim.{module}"), name)
    finally:
        for imported in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[imported]
        sys.modules.update(before)
