"""What a step of the cpu backend allocates: nothing that grows with the model."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.program

PROGRAM = """
import sys, torch, fused_optim
torch.set_num_threads(int(sys.argv[1]))
dtype = getattr(torch, sys.argv[2])
params = [torch.nn.Parameter(torch.randn(1_000_000).to(dtype)) for _ in range(8)]
for param in params:
    param.grad = torch.randn(1_000_000).to(dtype)
optimizer = fused_optim.AdamW(params)
assert optimizer.backend == "cpu"
optimizer.step()


def kibibytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again at what is resident now
before = kibibytes("VmHWM")
for _ in range(20):
    optimizer.step()
print(kibibytes("VmHWM") - before)
"""


@pytest.mark.parametrize(("threads", "dtype"), [(1, "float32"), (2, "bfloat16"), (4, "float16")])
def test_peak_memory_of_twenty_steps(threads: int, dtype: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(threads), dtype]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown <= 1024 * threads + 4096
