"""timm.optim, without timm's own ``__init__``, which wants torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from ..material import Material
from ..optimizers import Hyper, Stepper
from .peer import Maker, Missing, Peer


def why_missing() -> str | None:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        return "timm is not installed: pip install --no-deps timm"
    return None


def timm(module: str, name: str) -> Any:
    """An optimizer class of timm.

    What is imported for it does not stay in ``sys.modules``, where it would stand in the way of the whole timm.

    Raises:
        Missing: timm is not installed.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        raise Missing(why_missing())
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


def making(module: str, name: str, **fixed: Any) -> Maker:
    def make(material: Material, hyper: Hyper) -> Stepper:
        return timm(module, name)(material.groups(hyper), **hyper, **fixed)

    return make


PEERS = (
    Peer(
        "timm",
        "timm",
        {
            "AdamW": making("adamw", "AdamWLegacy"),
            "SGD": making("sgdw", "SGDW"),
            "NovoGrad": making("nvnovograd", "NvNovoGrad"),
            "LARC": making("lars", "Lars", trust_clip=True, always_adapt=True),
            "LARS": making("lars", "Lars"),
            "LAMB": making("lamb", "Lamb", max_grad_norm=None),
            "Lion": making("lion", "Lion"),
        },
        why_missing,
        notes={"SGD": "SGDW: its weight decay is decoupled"},
    ),
)
