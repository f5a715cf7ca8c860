"""The wheels that are released: what scripts/read_wheel.py reads from one, what it refuses, what the build makes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from support.sources import ROOT

from fused_optim.backends import extension

pytestmark = pytest.mark.requires(modules=("elftools",))


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_wheel", ROOT / "scripts" / "read_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["read_wheel"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


read_wheel = load_script()
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
BUILDS = pytest.mark.requires("cmake", "ninja", "patchelf", modules=("auditwheel", "ziglang"))
WORKFLOWS = ROOT / ".github" / "workflows"
OLD = "manylinux_2_17_x86_64.manylinux2014_x86_64"


def wheel_of(folder: Path, platform: str, *modules: bytes, padding: int = 0) -> Path:
    wheel = folder / f"fused_optim-0.1.0-cp311-cp311-{platform}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, module in enumerate(modules):
            archive.writestr(f"fused_optim/_C{number}.so", module)
        archive.writestr("padding", bytes(padding))
    return wheel


@pytest.fixture(scope="module")
def linked_here() -> bytes:
    """The module of this environment, which is for this machine alone."""
    assert extension._C is not None
    return Path(extension._C.__file__).read_bytes()


def test_a_module_that_is_linked_for_this_machine_is_refused(tmp_path: Path, linked_here: bytes) -> None:
    _, faults = read_wheel.read(wheel_of(tmp_path, OLD, linked_here))
    assert "fused_optim/_C0.so needs libstdc++.so.6" in faults
    assert any("asks for symbols of GLIBCXX_" in fault for fault in faults)
    assert not any("exports" in fault for fault in faults)


@pytest.mark.parametrize(
    ("platform", "modules", "padding", "fault"),
    [
        ("linux_x86_64", 1, 0, "its tag, linux_x86_64, is not manylinux's"),
        ("manylinux_2_34_x86_64", 1, 0, "its tag, manylinux_2_34_x86_64, promises too little"),
        (OLD, 0, 0, "holds 0 modules, not one"),
        (OLD, 2, 0, "holds 2 modules, not one"),
        (OLD, 1, 10_000_000, "more than 10"),
    ],
    ids=["no tag", "new tag", "no module", "two modules", "large"],
)
def test_a_wheel_that_would_not_install_everywhere_is_refused(
    tmp_path: Path, linked_here: bytes, platform: str, modules: int, padding: int, fault: str
) -> None:
    _, faults = read_wheel.read(wheel_of(tmp_path, platform, *[linked_here] * modules, padding=padding))
    assert [found for found in faults if fault in found]


@pytest.mark.parametrize("platform", [OLD, "manylinux_2_28_x86_64", "manylinux_2_24_x86_64"])
def test_old_tags_are_good(tmp_path: Path, linked_here: bytes, platform: str) -> None:
    _, faults = read_wheel.read(wheel_of(tmp_path, platform, linked_here))
    assert not [fault for fault in faults if "tag" in fault]


@pytest.mark.program
@BUILDS
@pytest.mark.parametrize(
    ("python", "message"),
    [("/no/such/python3", "does not run"), (sys.executable, "has no headers")],
    ids=["no interpreter", "no headers"],
)
def test_an_interpreter_that_cannot_build_is_refused(tmp_path: Path, python: str, message: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_wheels.py"), "--out", str(tmp_path / "dist")]
    if python == sys.executable:
        python = str(tmp_path / "python3")
        says = {"implementation": "cpython", "version": [3, 11], "free_threaded": False, "headers": False}
        Path(python).write_text(f"#!/bin/sh\necho '{json.dumps(says)}'\n")
        Path(python).chmod(0o755)
    result = subprocess.run([*command, "--python", python], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 1
    assert f"{python} {message}" in result.stdout
    assert not list((tmp_path / "dist").glob("*"))


@pytest.mark.program
@BUILDS
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("packaging")
@pytest.mark.parametrize("compiled", ["before", pytest.param("anew", marks=pytest.mark.slow)])
def test_the_wheel_that_is_built_here_installs_on_old_systems(tmp_path: Path, compiled: str) -> None:
    """Objects that this environment's own build made by the same commands are linked as they are, or all made anew."""
    command = [sys.executable, str(ROOT / "scripts" / "build_wheels.py"), "--python", sys.executable]
    folder = tmp_path / "cmake"
    environment = {**os.environ, "FUSED_OPTIM_CUDA": "OFF", "FUSED_OPTIM_BUILD_FOLDER": str(folder)}
    if compiled == "before":
        launcher = ROOT / "tests" / "support" / "compiled_here.py"
        environment["CMAKE_CXX_COMPILER_LAUNCHER"] = f"{sys.executable};{launcher}"
    dist = tmp_path / "dist"
    result = subprocess.run(
        [*command, "--out", str(dist)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    (wheel,) = dist.glob("*.whl")
    (module,), faults = read_wheel.read(wheel)
    assert faults == []
    assert "libstdc++.so.6" not in module.needed
    assert {version for version in module.versions if version.startswith("GLIBC_")}
    subprocess.run([sys.executable, str(ROOT / "scripts" / "check_wheel.py"), str(wheel)], check=True)


@pytest.mark.program
@pytest.mark.requires("zizmor", modules=("check_jsonschema",))
def test_the_workflows_are_what_their_schema_and_a_linter_ask_for() -> None:
    workflows = sorted(map(str, WORKFLOWS.glob("*.yml")))
    assert len(workflows) >= 2
    schema = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows]
    subprocess.run(schema, check=True)
    zizmor = shutil.which("zizmor", path=TOOLS)
    assert zizmor is not None
    subprocess.run([zizmor, "--offline", "--quiet", str(WORKFLOWS.parent)], check=True)


def test_the_workflow_builds_by_the_script_that_make_runs() -> None:
    command = "scripts/build_wheels.py"
    assert command in (WORKFLOWS / "wheels.yml").read_text()
    assert command in (ROOT / "Makefile").read_text()
