"""Six files add an optimizer: in a copy of the sources one is added, built, and held to everything that others are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.sources import ROOT

# What a new optimizer touches, and how: here each text is Lion's under another name.
ADDED = ("csrc/rules/{}.h", "kernels/rules/{}.py", "fused_optim/optimizers/{}.py")
CHANGED = {
    "csrc/rules/all.h": (
        ("Lamb, Lion, Muon>", "Lamb, Lion, Muon, Cub>"),
        ('#include "lamb.h"', '#include "cub.h"\n#include "lamb.h"'),
    ),
    "fused_optim/__init__.py": (
        ("from .optimizers.lion import Lion\n", "from .optimizers.lion import Lion\nfrom .optimizers.cub import Cub\n"),
        ('    "Lion",\n', '    "Lion",\n    "Cub",\n'),
    ),
    "tests/cases.py": (
        (
            "CASES = (\n",
            'CASES = (\n    Case(Cub, {"default": {}, "decay": {"weight_decay": 0.125}, "all": {"maximize": True}}),\n',
        ),
        ("    Lion,\n    Muon,\n", "    Cub,\n    Lion,\n    Muon,\n"),
    ),
}


def in_its_name(text: str) -> str:
    return re.sub(r"\bLion\b", "Cub", re.sub(r"\blion\b", "cub", text))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.requires("c++", "git")
def test_six_files_add_an_optimizer(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for place in ADDED:
        text = (tmp_path / place.format("lion")).read_text()
        (tmp_path / place.format("cub")).write_text(in_its_name(text))
    for place, replacements in CHANGED.items():
        text = (tmp_path / place).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, (place, old)
            text = text.replace(old, new)
        (tmp_path / place).write_text(text)
    touched = {path for path in tmp_path.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()}
    assert len(touched) == 6

    environment = {**os.environ, "FUSED_OPTIM_CUDA": "OFF", "PYTHONPATH": str(tmp_path / "path")}
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet", "."]
    subprocess.run([*install, "--target", str(tmp_path / "path")], cwd=tmp_path, check=True, env=environment)
    shutil.rmtree(tmp_path / "fused_optim")  # what is installed counts
    modules = ("contract/test_contract", "contract/test_changes", "mathematics/test_numerics", "backends/test_phases")
    tests = [f"tests/{module}.py" for module in modules]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "Cub",
        "-m",
        "not gpu and not slow",
    ]
    done = subprocess.run(
        [*command, *tests], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 20, done.stdout[-2000:]
