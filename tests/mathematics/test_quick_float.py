"""The arithmetic without branches of the CUDA kernels ends at IEEE's results, or at a NaN."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT

HEADER = ROOT / "csrc" / "cuda" / "quick_float.h"


def compile_test(tmp_path: Path, include: Path) -> Path:
    program = tmp_path / "quick_float_test"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text():
        options.append("-mfma")  # a function of the C library otherwise, which takes ten times as long
    source = ROOT / "tests" / "csrc" / "quick_float_test.cpp"
    subprocess.run(["c++", *options, f"-I{include}", str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.requires("c++")
def test_root_and_quotient_are_those_of_ieee(tmp_path: Path) -> None:
    """Every mantissa, whatever the processor's first approximation is."""
    program = compile_test(tmp_path, ROOT / "csrc")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.split()[-4]) > 10**9, result.stdout


@pytest.mark.requires("c++")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("half_reciprocal = fmaf(half, wrong, half)", "half_reciprocal = half"),
        ("+ 0x1p-110f", "+ 0x1p-80f"),
        ("0x1p-100f", "0x1p-120f"),
        ("|| dividend == 0", ""),
        ("bits <= bits_of(0x1p24f)", "divisor <= 0x1p24f"),
        ("bits <= bits_of(0x1p24f)", "bits <= bits_of(0x1p127f)"),
        ("(~bits & 0x7ffff8u) != 0", "true"),
        ("fmaf(residual, -reciprocal, quotient)", "fmaf(0 * residual, -reciprocal, quotient)"),
        ("fmaf(residual, -reciprocal, quotient)", "fmaf(-residual, reciprocal, quotient) + 0.0f"),
    ],
    ids=[
        "half a reciprocal that is not refined",
        "a zero's neighbours",
        "residuals that are subnormal",
        "zeros that are not sure",
        "negative divisors of zeros",
        "reciprocals of zero",
        "divisors below a power of 2",
        "no correction",
        "negative zeros",
    ],
)
def test_wrong_arithmetic_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    text = HEADER.read_text()
    assert right in text
    source = tmp_path / "csrc"
    (source / "cuda").mkdir(parents=True)
    for name in ("rules", "row.h", "storage.h"):
        (source / name).symlink_to(ROOT / "csrc" / name)
    (source / "cuda" / "quick_float.h").write_text(text.replace(right, wrong))
    program = compile_test(tmp_path, source)
    # A sixtieth of the cases finds most of it, in a fraction of the time.
    assert any(subprocess.run([program, *few], capture_output=True).returncode != 0 for few in (["some"], []))


@pytest.mark.gpu
@pytest.mark.requires("nvcc")
def test_every_root_on_a_device(tmp_path: Path) -> None:
    """With the first approximations that the processor really gives: all 2^32 roots, and as many quotients."""
    program = tmp_path / "quick_float_device"
    options = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-arch=native"]
    source = ROOT / "tests" / "csrc" / "quick_float_device.cu"
    subprocess.run(["nvcc", *options, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
