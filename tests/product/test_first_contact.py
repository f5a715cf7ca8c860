"""A machine that lacks something: one sentence that says what to install, and an exit status that is not 0."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.sources import ROOT

pytestmark = pytest.mark.program

HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
WITHOUT_HEADERS = """
import os, pathlib, runpy, sys
pathlib.Path.exists = lambda path, **_: path.name != "Python.h" and os.path.exists(path)
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
# Another program, told that its Python is free-threaded.
FREE_THREADED = """
import runpy, sys, sysconfig
asked = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else asked(name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0])
"""


def say(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)


def test_a_python_without_headers_is_told_the_package() -> None:
    result = say(sys.executable, "-c", WITHOUT_HEADERS)
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert sentence == (
        f"fused_optim's extension needs Python's headers, and there is no {HEADER}; "
        "apt install python3-dev (Debian, Ubuntu) or dnf install python3-devel (Fedora, RHEL), "
        "or build pure Python with FUSED_OPTIM_EXTENSION=OFF"
    )
    assert say(sys.executable, "-c", WITHOUT_HEADERS, FUSED_OPTIM_EXTENSION="OFF").returncode == 0


@pytest.mark.parametrize("extension", ["AUTO", "ON", "OFF"])
def test_a_free_threaded_python_is_told_which_to_use(extension: str) -> None:
    result = say(sys.executable, "-c", FREE_THREADED, "setup.py", "--version", FUSED_OPTIM_EXTENSION=extension)
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert sentence == (
        "fused_optim is not made for free-threaded CPython, whose objects have no interpreter lock; "
        "use the Python of the same version that has the lock (without t in its name)"
    )


def test_a_free_threaded_python_does_not_import() -> None:
    result = say(sys.executable, "-c", FREE_THREADED, str(ROOT / "fused_optim" / "backends" / "extension.py"))
    assert result.returncode == 1
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert result.stderr.splitlines()[-1] == (
        "ImportError: fused_optim does not run on free-threaded CPython: a step reads Python's objects under the "
        f"interpreter lock; use the Python {version} that has the lock (without t in its name)"
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads before it installs anything."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for folder in ("csrc", "tests"):
        (tmp_path / folder).mkdir()
    return tmp_path


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.requires("make")
def test_make_without_an_interpreter_says_so(checkout: Path) -> None:
    result = say("make", "demo", "BASE_PYTHON=no-such-python", folder=checkout)
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == (
        "fused_optim needs Python 3.10 or newer, and there is no no-such-python; "
        "apt install python3 (Debian, Ubuntu), or make BASE_PYTHON=/path/to/python3"
    )


@pytest.mark.requires("make")
def test_make_without_venv_says_so(checkout: Path) -> None:
    python = script(checkout / "python", f'case "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"')
    result = say("make", "demo", f"BASE_PYTHON={python}", folder=checkout)
    assert result.returncode == 2
    expected = f"{python} cannot make a virtual environment; apt install python3-venv (Debian, Ubuntu)"
    assert result.stderr.splitlines()[0] == expected
    assert not (checkout / ".venv").exists()


@pytest.mark.requires("make")
def test_make_without_a_compiler_says_so_before_pip_starts(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("sh", "find", "make", "nvidia-smi"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    result = say(
        "make", "setup", f"PYTHON={sys.executable}", folder=checkout, PATH=str(tools), CXX="", FUSED_OPTIM_EXTENSION=""
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == (
        "FUSED_OPTIM_EXTENSION=ON, but no C++ compiler was found (c++, g++, clang++, or what CXX names); "
        "apt install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora, RHEL)"
    )
    assert "building" not in result.stdout
