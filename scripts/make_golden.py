"""Writes trajectories of timm's and pytorch_optimizer's optimizers to tests/golden, those that were not handed down.

For an environment that has both packages (``pip install --no-deps timm pytorch_optimizer``). Inputs are those of an
older golden file, so that all files can be compared. Only timm's optimizer modules are imported: the package itself
wants torchvision.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
INPUTS = "novograd_timm_doc_float64"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lamb_timm_default": ("timm.optim.lamb", "Lamb", {"lr": 0.01, "foreach": False}),
    "lamb_timm_plain": (
        "timm.optim.lamb",
        "Lamb",
        {
            "lr": 0.01,
            "weight_decay": 0.0,
            "bias_correction": False,
            "grad_averaging": False,
            "max_grad_norm": None,
            "always_adapt": True,
            "trust_clip": True,
            "foreach": False,
        },
    ),
    "lamb_timm_nodecay": ("timm.optim.lamb", "Lamb", {"lr": 0.01, "weight_decay": 0.0, "foreach": False}),
    "lion_kozistr_default": (
        "pytorch_optimizer.optimizer.lion",
        "Lion",
        {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "weight_decouple": True},
    ),
    "lars_kozistr_default": (
        "pytorch_optimizer.optimizer.lars",
        "LARS",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.01},
    ),
    "lars_timm_clip": (
        "timm.optim.lars",
        "Lars",
        {
            "lr": 0.5,
            "momentum": 0.9,
            "nesterov": True,
            "trust_coeff": 0.01,
            "trust_clip": True,
            "always_adapt": True,
            "foreach": False,
        },
    ),
    "novograd_kozistr_decoupled": (
        "pytorch_optimizer.optimizer.novograd",
        "NovoGrad",
        {"lr": 0.01, "weight_decay": 0.1, "weight_decouple": True, "grad_averaging": True, "adam_debias": True},
    ),
    "novograd_kozistr_fixed": (
        "pytorch_optimizer.optimizer.novograd",
        "NovoGrad",
        {"lr": 0.01, "weight_decay": 0.01, "weight_decouple": True, "fixed_decay": True},
    ),
    "novograd_timm_amsgrad": ("timm.optim.nvnovograd", "NvNovoGrad", {"lr": 0.01, "amsgrad": True}),
    "novograd_timm_decoupled": (
        "timm.optim.nvnovograd",
        "NvNovoGrad",
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_decay": True},
    ),
}


def load(module: str) -> Any:
    """A module of timm without timm's own ``__init__``."""
    package = module.split(".")[0]
    if package == "timm" and package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        for name, folder in ((package, ""), (f"{package}.optim", "optim")):
            stub = types.ModuleType(name)
            stub.__path__ = [str(Path(spec.submodule_search_locations[0]) / folder)]
            sys.modules[name] = stub
    return importlib.import_module(module)


def main() -> None:
    torch.set_default_dtype(torch.float64)  # in which timm's NvNovoGrad keeps its second moment
    inputs = np.load(GOLDEN / f"{INPUTS}.npz")
    shapes = json.loads(str(inputs["shapes"]))
    sizes = [int(np.prod(shape)) for shape in shapes]
    for name, (module, kind, hyper) in CASES.items():
        start = torch.from_numpy(inputs["p0"]).split(sizes)
        params = [torch.nn.Parameter(part.reshape(shape).clone()) for part, shape in zip(start, shapes)]
        optimizer = getattr(load(module), kind)(params, **hyper)
        trajectory = []
        for grads in torch.from_numpy(inputs["g"]):
            for param, grad, shape in zip(params, grads.split(sizes), shapes):
                param.grad = grad.reshape(shape).clone()
            optimizer.step()
            trajectory.append(torch.cat([param.detach().flatten() for param in params]).numpy())
        package = module.split(".")[0]
        meta = {
            "oracle": f"{module}.{kind}",
            "case": name.rpartition("_")[2],
            "hyper": hyper,
            "notes": "",
            "steps": len(trajectory),
            "dtype": "float64",
            "versions": {
                "torch": torch.__version__,
                package: importlib.metadata.version(package),
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
        }
        np.savez_compressed(
            GOLDEN / f"{name}_float64.npz",
            meta=json.dumps(meta),
            names=inputs["names"],
            shapes=inputs["shapes"],
            p0=inputs["p0"],
            g=inputs["g"],
            p=np.stack(trajectory),
            lr=np.full(len(trajectory), hyper["lr"]),
        )


if __name__ == "__main__":
    main()
