"""NVIDIA's apex. The package index has another project of that name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

import torch

from ..material import Material
from ..optimizers import Hyper, Stepper
from .peer import Maker, Peer, maker

SOURCE = "https://github.com/NVIDIA/apex"


def why_missing() -> str | None:
    if importlib.util.find_spec("apex") is None:
        return f"NVIDIA's apex is not installed: build it from {SOURCE}"
    try:
        found = importlib.util.find_spec("apex.optimizers") is not None
    except ImportError:  # the other project's __init__ may fail
        found = False
    return None if found else f"the apex that is installed is another project; build NVIDIA's from {SOURCE}"


def larc(material: Material, hyper: Hyper) -> Stepper:
    wrapper = importlib.import_module("apex.parallel.LARC").LARC
    return wrapper(torch.optim.SGD(material.groups(hyper), **hyper), trust_coefficient=0.001)


MAKERS: Mapping[str, Maker] = {
    "AdamW": maker("apex.optimizers", "FusedAdam", adam_w_mode=True),
    "Adam": maker("apex.optimizers", "FusedAdam", adam_w_mode=False),
    "SGD": maker("apex.optimizers", "FusedSGD"),
    "NovoGrad": maker("apex.optimizers", "FusedNovoGrad", grad_averaging=False, bias_correction=False),
    "LARC": larc,
    "LAMB": maker("apex.optimizers", "FusedLAMB", max_grad_norm=0.0),
}

PEERS = (
    Peer(
        "apex",
        "apex",
        MAKERS,
        why_missing,
        devices=("cuda",),
        notes={"NovoGrad": "one second moment a group in one tensor, and a division after the moment"},
    ),
)
