"""Writes 8-bit states of torchao's and bitsandbytes' AdamW to tests/golden, with the numbers that they stand for.

For an environment that has both packages (``pip install --no-deps torchao bitsandbytes``). What is written comes from
their own code: the codes after a few steps, and those decoded.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
SHAPE = (40, 128)
STEPS = 3


def trained(make: Any) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(SHAPE, generator=generator))
    optimizer = make([param], lr=1e-3)
    for _ in range(STEPS):
        param.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()
    return param, optimizer


def write(name: str, package: str, arrays: dict[str, Tensor]) -> None:
    version = np.array(f"{package} {importlib.metadata.version(package)}, torch {torch.__version__}")
    found = {key: value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(GOLDEN / f"{name}.npz", allow_pickle=False, version=version, **found)


def main() -> None:
    import bitsandbytes.functional
    import bitsandbytes.optim

    param, optimizer = trained(bitsandbytes.optim.AdamW8bit)
    (saved,) = optimizer.state_dict()["state"].values()
    state = {**saved, **saved["__bnb_optimizer_quant_state__"]}
    arrays = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    arrays["step"] = torch.tensor(float(state["step"]))
    for name, number in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        arrays[f"decoded_{name}"] = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
    write("states_bitsandbytes_adamw8bit", "bitsandbytes", arrays)

    torch.compile = lambda function, **_: function  # type: ignore[assignment]  # its step needs no compiler
    from torchao.optim import AdamW8bit

    param, optimizer = trained(AdamW8bit)
    state = optimizer.state[param]
    arrays = {"step": state["step"].reshape(())}
    for name in ("exp_avg", "exp_avg_sq"):
        arrays |= {f"{name}_{part}": getattr(state[name], part) for part in ("codes", "scale", "qmap")}
        arrays[f"decoded_{name}"] = state[name].dequantize()
    write("states_torchao_adamw8bit", "torchao", arrays)


if __name__ == "__main__":
    main()
