"""The demo, as a user starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

TRAIN_DIGITS = Path(__file__).parents[1] / "examples" / "train_digits.py"


def run_train_digits(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # One thread: with two on a machine of two busy cores, what takes 9 s took 47 s now and then.
    return subprocess.run(
        [sys.executable, str(TRAIN_DIGITS), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture(scope="module")
def train_digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", TRAIN_DIGITS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The annotations of its NamedTuple are resolved through sys.modules.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_short_training_prints_the_table_and_writes_the_plot(device: str, tmp_path: Path) -> None:
    done = run_train_digits(f"--device={device}", "--epochs=1", "--output=made/plot.png", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    number = r"\s*│\s*([0-9.]+)"
    rows = re.findall(rf"│ (torch AdamW|fused_optim AdamW)([^│]*?){number * 5}", done.stdout)
    assert [name + detail.rstrip() for name, detail, *_ in rows] == [
        "torch AdamW (default)",
        "torch AdamW (fused=True)",
        "fused_optim AdamW, " + rows[-1][1].split()[-1],
    ]
    losses, accuracies, *times, ratios = zip(*([float(value) for value in row[2:]] for row in rows), strict=True)
    # One epoch leaves rounding no time to grow.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert 0 < losses[0] < 2.4
    assert accuracies == pytest.approx([accuracies[0]] * 3, abs=0.5)
    assert min(map(min, times)) > 0
    assert ratios[0] == 1
    assert "shown, not enforced" in done.stdout

    plot = (tmp_path / "made" / "plot.png").read_bytes()
    assert plot.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(plot[16:20], "big"), int.from_bytes(plot[20:24], "big")
    assert width > 1000
    assert height > 400


def test_a_backend_that_cannot_serve_ends_with_its_reason(
    train_digits: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--device=cpu", "--backend=cuda", f"--output={tmp_path / 'plot.png'}"]
    monkeypatch.setattr(sys, "argv", [TRAIN_DIGITS.name, *arguments])
    assert train_digits.main() == 2
    assert capsys.readouterr().err.startswith("train_digits.py: backend='cuda'")


def test_help_names_the_options(
    train_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [TRAIN_DIGITS.name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        train_digits.main()
    text = capsys.readouterr().out
    for option in ("--device", "--backend", "--epochs", "--optimizer", "--seed", "--output"):
        assert f"  {option} " in text


@pytest.mark.parametrize(
    ("loss", "accuracy", "keeps"),
    [
        (0.01009, 98.4, True),
        (0.0102, 98.0, False),
        (0.0098, 98.0, False),
        (0.0100, 98.6, False),
        (float("nan"), 98.0, False),
    ],
)
def test_bounds_tell_runs_that_differ(train_digits: ModuleType, loss: float, accuracy: float, keeps: bool) -> None:
    stock = SimpleNamespace(title="stock", final_loss=0.01, accuracy=98.0)
    other = SimpleNamespace(title="other", final_loss=loss, accuracy=accuracy)
    assert train_digits.check([stock, other], Console(quiet=True)) is keeps


def test_bounds_tell_runs_that_have_not_learnt(train_digits: ModuleType) -> None:
    stock = SimpleNamespace(title="stock", final_loss=0.2, accuracy=94.9)
    assert not train_digits.check([stock, stock], Console(quiet=True))
