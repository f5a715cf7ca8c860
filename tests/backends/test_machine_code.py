"""The memory loops of the CUDA kernels, read from their machine code: what scripts/machine_code.py sees is gated."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from support.sources import ROOT

from fused_optim.backends import extension

CSRC = ROOT / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}")  # as CMakeLists.txt has them
KILOBYTES_IN_FLIGHT = 48  # what the memory of an H200 needs of each multiprocessor to be busy
KILOBYTES_OF_CODES = 31  # AdamW's two averages of codes are computed for longer than memory moves their bytes
MOST_SERIAL_LOADS = 70  # of prepare_kernel
MOST_INSTRUCTIONS = {  # an element, on sm_90
    "AdamW": {
        "float32": 46,
        "bfloat16": 50,
        "bfloat16, float32 states": 50,
        "bfloat16, split": 60,
        "bfloat16, float32 master": 60,
        "bfloat16, float32 master and grad": 60,
        "float16": 75,
        "float16, float32 states": 75,
        "float16, float32 master": 75,
        "float32, 8-bit": 130,
        "bfloat16, 8-bit": 130,
        "bfloat16, stochastic, 8-bit": 130,
        "bfloat16, split8, 8-bit": 130,
        "bfloat16, split8": 70,
        "bfloat16, stochastic": 70,
    },
    "momentum": {"float32": 25, "bfloat16": 35, "float32, 8-bit": 70, "bfloat16, split8, 8-bit": 70},
    "reduce": {"float32": 8, "bfloat16": 10, "float16": 10},
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("machine_code", ROOT / "scripts" / "machine_code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


machine_code = load_script()

pytestmark = pytest.mark.xdist_group("machine code")  # which one worker reads


def compile_kernels(folder: Path, arch: str, csrc: Path = CSRC) -> list[Path]:
    files = [folder / f"{name}_{arch}.cubin" for name in ("apply", "prepare", "reduce")]
    for file in files:
        source = csrc / "cuda" / f"{file.stem.partition('_')[0]}.cu"
        command = ["nvcc", *FLAGS, f"-I{csrc}", "-cubin", f"-arch={arch}", str(source), "-o", str(file)]
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == 0, result.stdout
    return files


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Those of the installed module, if it was built for sm_90."""
    built = extension._C.build_info()["cuda_archs"].split(",") if extension._C is not None else []
    files = (
        [Path(extension._C.__file__)] if "90" in built else compile_kernels(tmp_path_factory.mktemp("sm_90"), "sm_90")
    )
    return [kernel for file in files for kernel in machine_code.read_kernels(file, "sm_90")]


def apply_loops(kernels: list) -> list:
    return [loop for kernel in kernels if "apply_kernel" in kernel.name for loop in machine_code.loops_of(kernel)]


def faults(kernels: list, blocks: int, most_instructions: dict[str, dict[str, float]] | None = None) -> list[str]:
    """What is wrong with the loops of the layouts that have code of their own."""
    found = []
    for kernel in kernels:
        if kernel.spills:
            found.append(f"{kernel.name} spills")
        for loop in machine_code.loops_of(kernel) if "apply_kernel" in kernel.name else ():
            if loop.loads_wait:
                found.append(f"{kernel.name}: in the loop at {loop.way[0].address:#x} a load waits for another")
            widths = set(loop.widths("LDG")) | set(loop.widths("STG"))
            # Bytes: beside vectors of four elements four of them; and the scales of codes.
            if not widths <= ({1, 4, 8, 16} if "EfLb1E" in kernel.name else {8, 16}):
                found.append(f"{kernel.name}: narrow accesses in the loop at {loop.way[0].address:#x}")
    loops = {(rule, layout.name): found for rule, layout, found in machine_code.loops_of_layouts(kernels)}
    sums: dict[tuple[str, str], tuple[object, int]] = {}
    for name, loop, elements in machine_code.reduce_loops(kernels):
        if loop.bytes_in_flight >= 1024 * KILOBYTES_IN_FLIGHT:  # the others take what is left of a row
            sums["reduce", name] = max(sums.get(("reduce", name), (loop, elements)), (loop, elements), key=effort)
    for (rule, name), one in {**loops, **sums}.items():
        if one is None:
            found.append(f"{rule}, {name}: no loop moves its vectors")
            continue
        loop = one[0]
        most = (most_instructions or {}).get(rule, {}).get(name)
        if loop.kernel.blocks < blocks:
            found.append(f"{rule}, {name}: {loop.kernel.registers} registers")
        if loop.loads_wait:
            found.append(f"{rule}, {name}: a load waits for another")
        least = KILOBYTES_OF_CODES if rule == "AdamW" and name.endswith("8-bit") else KILOBYTES_IN_FLIGHT
        if loop.bytes_in_flight < 1024 * least:
            found.append(f"{rule}, {name}: {loop.bytes_in_flight} bytes in flight")
        if most is not None and effort(one) > most:
            found.append(f"{rule}, {name}: {effort(one)} instructions an element")
    if most_instructions is not None and {("reduce", name) for name in most_instructions["reduce"]} - set(sums):
        found.append(f"reduce: only {sorted(sums)}")
    return found


def effort(one: tuple) -> float:
    loop, elements = one
    return len(loop.way) / elements


@pytest.mark.requires("nvcc")
def test_loops_ask_for_all_before_they_wait(kernels: list) -> None:
    assert not faults(kernels, 3, MOST_INSTRUCTIONS)


# What nvcc 13.0 makes of the same sources for sm_100, and not for sm_90 and sm_80: 16 bytes are spilled outside of all
# loops; of the six loads of LAMB's second pass the last is asked for after the first has come; and two updates in
# float64 whose rows may draw random words wait for a load.
OF_SM_100 = (
    "AdamILb0EEEfLb0E.* spills",
    "prepare_kernel.* spills",
    "PassE2.*LambEfLb0E.* a load waits",
    "(MuonEd|SgdEd)Lb1E.* a load waits",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.requires("nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_loops_ask_for_all_before_they_wait_on_other_architectures(arch: str, tmp_path: Path) -> None:
    kernels = [kernel for file in compile_kernels(tmp_path, arch) for kernel in machine_code.read_kernels(file, arch)]
    known = OF_SM_100 if arch == "sm_100" else ()
    found = faults(kernels, 3 if arch == "sm_100" else 2)
    assert not [fault for fault in found if not any(re.search(pattern, fault) for pattern in known)]
    assert all(any(re.search(pattern, fault) for fault in found) for pattern in known)  # none has gone unnoticed


@pytest.mark.requires("nvcc")
@pytest.mark.parametrize("name", ["total_kernel", "direction_kernel"])
def test_what_adds_a_row_up_asks_for_much_before_it_waits(name: str, kernels: list) -> None:
    """One block a row adds up to 4,096 pieces, and a sum for each 8,192 elements: it is alone with its waits."""
    (kernel,) = [kernel for kernel in kernels if name in kernel.name]
    (loop,) = machine_code.loops_of(kernel)
    assert not loop.loads_wait
    assert sum(width * count for width, count in loop.widths("LDG").items()) * machine_code.THREADS >= 48 * 1024


@pytest.mark.requires("nvcc")
def test_hyperparameters_that_are_tensors_are_read_side_by_side(kernels: list) -> None:
    """In prepare, loads that something before them has waited for another to be issued: 189 of 381 when each
    hyperparameter was asked for after the one before had come."""
    (kernel,) = [kernel for kernel in kernels if "prepare_kernel" in kernel.name]
    assert machine_code.serial_loads(kernel) <= MOST_SERIAL_LOADS


@pytest.mark.requires("nvcc")
def test_every_layout_has_a_loop_in_every_kernel(kernels: list) -> None:
    """So that none escapes because the reader does not see it as a loop."""
    loops = Counter(loop.kernel.name for loop in apply_loops(kernels))
    of_floats = {name: count for name, count in loops.items() if "EfLb0E" in name}
    assert len(of_floats) == 9  # the element updates, and the two passes of LAMB and of Muon
    for name, count in of_floats.items():
        assert count >= (6 if "3SgdEf" in name else 9), (name, count)
    of_words = {name: count for name, count in loops.items() if "EfLb1E" in name}
    assert len(of_words) == 4  # the updates of up to two states
    for name, count in of_words.items():
        assert count == (2 if "3SgdEf" in name else len(machine_code.LAYOUTS_THAT_DRAW)), (name, count)


@pytest.mark.requires("nvcc")
def test_architecture_shows_what_the_compiler_made(kernels: list) -> None:
    text = machine_code.DOCUMENT.read_text()
    shown = text.partition(machine_code.BEGIN)[2].partition(machine_code.END)[0].strip()
    assert shown == machine_code.table(kernels), "python scripts/machine_code.py FILE --write"
