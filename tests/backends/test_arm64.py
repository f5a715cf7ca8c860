"""arm64, shown by cross-compiling the CPU phases and the number formats and running them under emulation."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT

CROSS = "aarch64-linux-gnu-g++"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
KERNELS = ROOT / "csrc" / "cpu" / "kernels.cpp"
# The driver on x86-64 refers to the kernels of every instruction set.
CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}

pytestmark = [pytest.mark.slow, pytest.mark.requires("c++", CROSS, "qemu-aarch64")]


def compile_objects(compiler: str, source: Path, target: Path, *flags: str) -> str:
    subprocess.run([compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)], check=True)
    return str(target)


def link(compiler: str, objects: list[str], program: Path) -> Path:
    subprocess.run([compiler, *objects, "-o", str(program), "-pthread", "-ldl", "-static"], check=True)
    return program


def compile_formats(folder: Path) -> Path:
    source = ROOT / "tests" / "csrc" / "storage_test.cpp"
    return link(CROSS, [compile_objects(CROSS, source, folder / "formats.o")], folder / "formats")


def compile_steps(compiler: str, folder: Path, capabilities: list[str]) -> Path:
    folder.mkdir()
    sources = [
        ROOT / "tests" / "csrc" / "steps_test.cpp",
        *(ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("phases", "threads")),
    ]
    objects = [compile_objects(compiler, source, folder / f"{source.stem}.o") for source in sources]
    for name in capabilities:
        flags = (*CAPABILITIES[name], f"-DFO_CPU_CAPABILITY={name}")
        objects.append(compile_objects(compiler, KERNELS, folder / f"{name}.o", *flags))
    return link(compiler, objects, folder / "steps")


def test_steps_give_the_same_bits_as_here(tmp_path: Path) -> None:
    own = list(CAPABILITIES) if platform.machine() == "x86_64" else ["default"]
    here = compile_steps("c++", tmp_path / "here", own)
    there = compile_steps(CROSS, tmp_path / "there", ["default"])
    commands = ([str(here)], ["qemu-aarch64", str(there)])
    outputs = [subprocess.check_output(command, text=True).splitlines() for command in commands]
    assert len(outputs[0]) == 9 * 4 * 2 * 4
    assert len({line.rpartition(" ")[2] for line in outputs[0]}) > 144  # the hash depends on what was stepped
    assert outputs[0] == outputs[1]


def test_number_formats_are_converted_right(tmp_path: Path) -> None:
    result = subprocess.run(["qemu-aarch64", str(compile_formats(tmp_path))], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_program_is_of_the_other_processor(tmp_path: Path) -> None:
    program = compile_formats(tmp_path)
    assert int.from_bytes(program.read_bytes()[18:20], "little") == 183  # EM_AARCH64
