"""What nvcc makes of the CUDA phases: architectures, registers, spills, and what the module links to."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT, sources

from fused_optim.backends import extension

CSRC = ROOT / "csrc"
CUDA_SOURCES = sources("csrc", ".cu", at_least=7)
SUPPORTED = (75, 80, 90, 100, 120)
# The sources as CMakeLists.txt compiles them.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}")
# Threads of a block times registers of a thread fit twice into a multiprocessor's 65,536.
MOST_REGISTERS = 128


def known_architectures() -> list[int]:
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], text=True, check=True, stdout=subprocess.PIPE).stdout
    return [arch for arch in SUPPORTED if f"compute_{arch}\n" in listed]


def resource_report(out: Path, architectures: list[int]) -> str:
    """ptxas's report on every kernel. Threads: one architecture each, as many as there are processors."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    report = ""
    for source in CUDA_SOURCES:
        command = ["nvcc", *FLAGS, *targets, f"--threads={os.cpu_count()}", "--resource-usage"]
        command += ["-c", str(source), "-o", str(out / "-".join(source.relative_to(CSRC).with_suffix(".o").parts))]
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == 0, result.stdout
        report += result.stdout
    return report


def check_report(report: str) -> None:
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(spilled) >= len(registers) > 0
    assert set(spilled) == {("0", "0", "0")}, report
    assert max(registers) <= MOST_REGISTERS, report


@pytest.fixture
def cuobjdump() -> str:
    """triton's package brings one where the toolkit has none."""
    spec = importlib.util.find_spec("triton")
    found = shutil.which("cuobjdump")
    if found is None and spec is not None and spec.origin is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    assert found is not None
    return found


@pytest.mark.requires("nvcc")
def test_no_kernel_of_the_installed_module_spills(cuobjdump: str) -> None:
    assert extension._C is not None
    assert extension._C.build_info()["cuda_version"], "nvcc is here, and the extension was built without CUDA"
    command = [cuobjdump, "--dump-resource-usage", str(extension._C.__file__)]
    report = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert len(kernels) >= 2 * 2 + 5  # two rules in two compute types, and the other phases
    assert {(stack, local) for _, stack, local in kernels} == {("0", "0")}, report
    assert max(int(registers) for registers, _, _ in kernels) <= MOST_REGISTERS, report


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.requires("nvcc")
def test_no_kernel_spills_on_any_architecture(tmp_path: Path) -> None:
    check_report(resource_report(tmp_path, known_architectures()))


BOUNDS = ("kThreads", "kThreads, 1", "kThreads, 3", "kThreads, blocks_at_once<T>(kPass, states_of<Rule>(kPass))")


def test_launch_bounds_and_registers_are_those_that_the_test_holds_kernels_to() -> None:
    found = {
        source: re.findall(r"__launch_bounds__\((.*?)\)\s+\w+_kernel", source.read_text()) for source in CUDA_SOURCES
    }
    assert sum(map(len, found.values())) >= 6
    for source, all_bounds in found.items():
        for bounds in all_bounds:
            assert bounds in BOUNDS, (source.name, bounds)
    assert any(
        "constexpr int kWarpsPerBlock = 8;" in source.read_text() for source in sources("csrc", ".h", at_least=20)
    )
    assert 2 * 8 * 32 * MOST_REGISTERS <= 65536


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.requires("nvcc", "cmake", "ninja", "readelf")
def test_module_has_every_architecture_and_no_cuda_library(tmp_path: Path, cuobjdump: str) -> None:
    import pybind11

    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DFUSED_OPTIM_CUDA=ON"]
    configure += ["-DFUSED_OPTIM_CUDA_ARCHS=ALL", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == 0, result.stdout
    (module,) = tmp_path.glob("_C*.so")
    listed = subprocess.run(
        [cuobjdump, "--list-elf", "--list-ptx", str(module)], text=True, check=True, stdout=subprocess.PIPE
    ).stdout
    known = known_architectures()
    assert {int(arch) for arch in re.findall(r"\.sm_(\d+)\.cubin", listed)} == set(known)
    assert {int(arch) for arch in re.findall(r"\.sm_(\d+)\.ptx", listed)} == {known[-1]}
    dynamic = subprocess.run(["readelf", "-d", str(module)], text=True, check=True, stdout=subprocess.PIPE).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert not [name for name in needed if "cuda" in name or "torch" in name], needed


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder in which CMake has tried the compilers: what it asks of a machine's GPUs, it asks every time."""
    return tmp_path_factory.mktemp("cuda") / "build"


@pytest.mark.program
@pytest.mark.xdist_group("cuda_build")
@pytest.mark.requires("nvcc", "cmake", "ninja")
@pytest.mark.parametrize(
    ("gpus", "named", "architectures", "choice"),
    [
        (None, "", (90,), "since no GPU was found that this nvcc knows"),
        ("echo 9.0; echo 8.0; echo 9.0", "", (80, 90), "of this machine's GPUs"),
        ("echo 99.0", "", (90,), "since no GPU was found that this nvcc knows"),
        ("echo No devices were found; exit 6", "", (90,), "since no GPU was found"),
        ("echo 9.0", "80", (80,), "as FUSED_OPTIM_CUDA_ARCHS says"),
        ("echo 9.0", "ALL", SUPPORTED, "as FUSED_OPTIM_CUDA_ARCHS says"),
    ],
    ids=["no GPU", "two kinds", "a GPU that is too new", "a driver without GPUs", "named", "ALL"],
)
def test_the_build_is_for_the_gpus_of_this_machine_and_says_so(
    configured: Path, tmp_path: Path, gpus: str | None, named: str, architectures: tuple[int, ...], choice: str
) -> None:
    import pybind11

    said = tmp_path / "nvidia-smi"
    said.write_text(f"#!/bin/sh\n{gpus or 'exit 127'}\n")
    said.chmod(0o755)
    configure = ["cmake", "-S", str(ROOT), "-B", str(configured), "-G", "Ninja", "-DFUSED_OPTIM_CUDA=ON"]
    configure += [f"-DFUSED_OPTIM_CUDA_ARCHS={named}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        configure, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert result.returncode == 0, result.stdout
    expected = f"for {', '.join(map(str, architectures))} and PTX for newer GPUs, {choice}"
    assert expected in re.sub(r"\s+", " ", result.stdout)
    flags = (configured / "build.ninja").read_text()
    assert {int(arch) for arch in re.findall(r"code=\[?sm_(\d+)", flags)} == set(architectures)
    assert {int(arch) for arch in re.findall(r"code=\[?[\w,]*?compute_(\d+)", flags)} == {architectures[-1]}
