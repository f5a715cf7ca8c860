"""What a step of the cpu backend allocates: nothing that grows with the model."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.program

PROGRAM = """
import torch, fused_optim


def kibibytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


for threads, dtype in ((1, torch.float32), (2, torch.bfloat16), (4, torch.float16)):
    torch.set_num_threads(threads)
    params = [torch.nn.Parameter(torch.ones(1_000_000, dtype=dtype)) for _ in range(8)]
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer = fused_optim.AdamW(params)
    assert optimizer.backend == "cpu"
    optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again at what is resident now
    before = kibibytes("VmHWM")
    for _ in range(20):
        optimizer.step()
    print(threads, kibibytes("VmHWM") - before)
"""


def test_peak_memory_of_twenty_steps() -> None:
    command = [sys.executable, "-c", PROGRAM]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for threads, grown in (map(int, line.split()) for line in lines):
        assert grown <= 1024 * threads + 4096
    assert len(lines) == 3
