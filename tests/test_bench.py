"""The bench harness: it runs, names what it does not know, and README shows its figures."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fused_optim.bench.cases import CASES, elements_of
from fused_optim.bench.peers import Missing, timm

ROOT = Path(__file__).resolve().parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fused_optim.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_step_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = bench("step", "--case", "150 tensors, 1 group", "--rounds", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert case["case"] == "150 tensors, 1 group"
    assert case["backend"] == "cpu"
    assert 0 < case["ours_us"] < 1e6
    assert result["machine"]["torch"]
    assert "150 tensors" in done.stdout


@pytest.mark.requires(modules=("timm",))
def test_every_case_takes_a_step() -> None:
    for case in CASES.values():
        if "8M" not in case.name:
            ours = case.ours()
            ours.step()
            case.theirs().step()
            assert elements_of(ours) > 0


def test_a_peer_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="pip install --no-deps timm"):
        timm("lamb", "Lamb")


def test_unknown_case_lists_near_ones() -> None:
    done = bench("step", "--case", "150 tensors, 2 groups")
    assert done.returncode == 2
    assert "150 tensors, 1 group" in done.stderr


def test_readme_shows_the_committed_figures() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_figures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
