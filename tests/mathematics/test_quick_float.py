"""The arithmetic without branches of the CUDA kernels ends at IEEE's results, or at a NaN; its codes are codec.h's."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT

CSRC = ROOT / "csrc"


def compile_test(tmp_path: Path, include: Path, name: str) -> Path:
    program = tmp_path / f"{name}_test"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    if platform.machine() == "x86_64" and " fma " in Path("/proc/cpuinfo").read_text():
        options.append("-mfma")  # a function of the C library otherwise, which takes ten times as long
    source = ROOT / "tests" / "csrc" / f"{name}_test.cpp"
    subprocess.run(["c++", *options, f"-I{include}", str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.requires("c++")
def test_root_and_quotient_are_those_of_ieee(tmp_path: Path) -> None:
    """Every mantissa, whatever the processor's first approximation is."""
    program = compile_test(tmp_path, CSRC, "quick_float")
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
    """By a sixtieth of the cases."""
    source = with_a_fault(tmp_path, "quick_float", right, wrong)
    program = compile_test(tmp_path, source, "quick_float")
    assert subprocess.run([program, "some"], capture_output=True).returncode != 0


def with_a_fault(tmp_path: Path, name: str, right: str, wrong: str) -> Path:
    """The sources that a test includes, with a wrong text in one header."""
    text = (CSRC / "cuda" / f"{name}.h").read_text()
    assert right in text
    source = tmp_path / "csrc"
    (source / "cuda").mkdir(parents=True)
    for file in ("rules", "row.h", "storage.h", "codec.h", "cuda/quick_float.h"):
        (source / file).symlink_to(CSRC / file)
    (source / "cuda" / f"{name}.h").unlink(missing_ok=True)
    (source / "cuda" / f"{name}.h").write_text(text.replace(right, wrong))
    return source


@pytest.mark.requires("c++")
def test_codes_without_branches_are_those_of_the_codec(tmp_path: Path) -> None:
    """Every mantissa, every code beside every exponent, every parameter beside every remainder."""
    program = compile_test(tmp_path, CSRC, "quick_codec")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(result.stdout.split()[-4]) > 10**8, result.stdout


@pytest.mark.requires("c++")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x1p-100f", "0x1p-30f"),
        ("& 0xff00u) | 0x80u", "& 0xff00u) | 0x00u"),
        ("magnitude_bits < least ? magnitude_bits : least", "magnitude_bits < 1 ? least : least"),
        ("sums[k] = sum > floor ? sum : floor", "sums[k] = sum > 0 * floor ? sum : floor"),
        ("(2u - 0x96000000u)", "(0u - 0x96000000u)"),
        ("(signs & 0x01010101u)", "0u"),
        ("static_cast<uint32_t>(Quick::Code::kMost) << 23", "0x7f800000u"),
        ("exponent == 0 || exponent >= Quick::Code::kLeast", "true"),
        ("zero_bytes(~codes)", "0 * zero_bytes(~codes)"),
        ("^ (magnitudes + 0x00800080u)", ""),
        (" + 0x8000u;\n  params", ";\n  params"),
        ("gather(sums, 1) ^ 0x80808080u", "gather(sums, 1)"),
    ],
    ids=[
        "a small share's neighbours",
        "a mean's lowest random bit",
        "the least code of a zero",
        "no least code",
        "a root's lowest random bit",
        "one less in a negative byte",
        "the largest exponents",
        "the smallest exponents",
        "infinities",
        "remainders beside infinities",
        "masters rounded down",
        "the turned bit of a remainder",
    ],
)
def test_wrong_codes_are_found(tmp_path: Path, right: str, wrong: str) -> None:
    """By a sixtieth of the cases."""
    program = compile_test(tmp_path, with_a_fault(tmp_path, "quick_codec", right, wrong), "quick_codec")
    assert subprocess.run([program, "some"], capture_output=True).returncode != 0


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
