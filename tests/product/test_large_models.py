"""docs/large_models.md: the bytes in its tables are those of real tensors, and its arithmetic is right."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.sources import ROOT
from torch import Tensor
from torch.nn import Parameter

import fused_optim

PAGE = (ROOT / "docs" / "large_models.md").read_text()
MEMORY = re.findall(r"^\| `(.+?)` \| (\w+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
GPUS = re.findall(r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) ms \| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)
NUMEL = 1 << 14


def test_the_tables_are_found() -> None:
    assert len(MEMORY) == 15
    assert len(GPUS) == 4


@pytest.mark.parametrize(("call", "dtype", "param", "grad", "state", "total"), MEMORY)
def test_the_memory_of_each_setting(call: str, dtype: str, param: str, grad: str, state: str, total: str) -> None:
    tensor = Parameter(torch.ones(NUMEL // 64, 64, dtype=getattr(torch, dtype)))
    tensor.grad = torch.ones_like(tensor)
    optimizer: Any = eval(f"fused_optim.{call}", {"fused_optim": fused_optim, "torch": torch, "params": [tensor]})
    optimizer.step()
    values = [value for value in optimizer.state[tensor].values() if isinstance(value, Tensor)]
    elementwise = sum(value.untyped_storage().nbytes() for value in values if value.numel() > 1)
    assert sum(value.untyped_storage().nbytes() for value in values) - elementwise <= 8
    measured = [tensor.untyped_storage().nbytes(), tensor.grad.untyped_storage().nbytes(), elementwise]
    assert [size / NUMEL for size in measured] == pytest.approx([float(param), float(grad), float(state)], abs=5e-3)
    assert float(param) + float(grad) + float(state) == pytest.approx(float(total))


@pytest.mark.parametrize(("gpus", "gigabytes", "milliseconds", "theirs", "ours"), GPUS)
def test_the_arithmetic_of_a_step(gpus: str, gigabytes: str, milliseconds: str, theirs: str, ours: str) -> None:
    moved = 32 * 8.03e9 / int(gpus)
    device = moved / 4.3e12
    assert float(gigabytes) == pytest.approx(moved / 1e9, rel=5e-3)
    assert float(milliseconds) == pytest.approx(device * 1e3, abs=5e-4)
    for answer, host in ((theirs, 20e-6), (ours, 1e-6)):
        assert answer == ("yes" if device < 291 * host else "no")
