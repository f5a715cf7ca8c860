"""What Triton's compiler makes of the kernels, and what its launcher does: without a GPU.

Each test runs `tests/support/triton_offline.py` as a program of its own, since this process interprets the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.sources import ROOT, sources

PROGRAM = ROOT / "tests" / "support" / "triton_offline.py"
MACHINE_CODE = ROOT / "scripts" / "triton_machine_code.py"
COMPILED = ROOT / "build" / "triton_offline"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = [pytest.mark.program, pytest.mark.requires(modules=("triton",)), pytest.mark.timeout(1200)]


def offline(*arguments: str, program: Path = PROGRAM, cache: Path = COMPILED) -> Any:
    """What the program prints. A kernel is compiled anew if it, its compiler or what is asked of it has changed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run([sys.executable, str(program), *arguments], text=True, capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_kernel(kernel: dict[str, Any]) -> None:
    """No spills; IEEE roots and divisions, no contraction; 16-byte accesses to every aligned column."""
    assert kernel["spilled"] == 0, kernel
    assert kernel["inexact"] == [], kernel
    assert kernel["wide_loads"] >= kernel["columns_read"], kernel
    assert kernel["wide_stores"] >= kernel["columns_written"], kernel


@pytest.mark.parametrize("target", ["sm_90"])  # all of TARGETS below
def test_every_rule_compiles(target: str) -> None:
    kernels = offline("rules", target)
    names = {kernel["name"] for kernel in kernels}
    assert names >= {"reduce_kernel", "total_kernel", "prepare_kernel", "direction_kernel", "grad_sq_kernel"}
    assert names >= {"apply_kernel", "accumulate_kernel", "move_kernel"}
    for kernel in kernels:
        check_kernel(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_and_storage_compiles(target: str) -> None:
    for kernel in [*offline("rules", target), *offline("storages", target)]:
        check_kernel(kernel)


def check_machine_code(kernels: dict[str, dict[str, Any]]) -> None:
    """A program waits for memory as often as it must, and has enough under way meanwhile."""
    assert len(kernels) == 21
    for name, kernel in kernels.items():
        assert not kernel["spills"], (name, kernel)
        # Its row and tile, what the table says of the row, and the elements; round a loop, elements alone.
        assert kernel["rounds"] == (1 if "norm" in name else 3), (name, kernel)
        assert kernel["column_rounds"] == 1, (name, kernel)
        # All of it in accesses of 16 bytes; of columns of bytes, 8.
        assert kernel["bytes_read"] == kernel["read"], (name, kernel)
        assert kernel["bytes_written"] == kernel["written"], (name, kernel)
        under_way = kernel["programs"] * kernel["threads"] * kernel["bytes_together"]
        if "8-bit" in name:  # few bytes an element, whose codes take longer than memory
            assert under_way >= 28 * 1024, (name, kernel)
        else:
            assert under_way >= (48 if name.startswith(("AdamW", "momentum")) else 40) * 1024, (name, kernel)


def test_machine_code() -> None:
    """For sm_90; and docs/architecture.md shows what ptxas says, or another triton's."""
    kernels = offline("--json", program=MACHINE_CODE)
    found = kernels.pop("table").splitlines()
    check_machine_code(kernels)
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = text.partition("<!-- triton's machine code:begin -->\n")[2].partition("\n<!--")[0].splitlines()
    if shown[-1] == found[-1]:
        assert shown == found, "run python scripts/triton_machine_code.py"
    assert [line.split("|")[1:2] for line in shown] == [line.split("|")[1:2] for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_machine_code_of_other_architectures(target: str) -> None:
    kernels = offline("--json", "--target", target, program=MACHINE_CODE)
    del kernels["table"]
    check_machine_code(kernels)


def test_nothing_is_compiled_again_over_a_schedule(tmp_path: Path) -> None:
    """100 steps with another lr at each, gradients that come and go, and optimizers of other numbers of tensors."""
    counts = offline("schedule", "sm_90", cache=tmp_path)
    assert counts["first step"] == 2  # prepare, apply
    assert counts["100 steps"] == counts["first step"]
    assert counts["other numbers of tensors and groups"] == counts["first step"]
    assert counts["another dtype"] == counts["first step"] + 1  # its apply
    assert counts["a clip"] == counts["another dtype"] + 4  # reduce, totals, prepare, and apply from the end
    assert counts["launched"] > 2 * 100


def test_the_kernels_are_never_tuned() -> None:
    """A trial of an update in place would be a step."""
    for path in sources("kernels", ".py", at_least=16):
        assert "autotune" not in path.read_text(), path
