"""The demo and the examples, as a user starts them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.sources import ROOT

EXAMPLES = ROOT / "examples"
TRAIN_DIGITS = EXAMPLES / "train_digits.py"
FINETUNE = EXAMPLES / "finetune_layer_decay.py"

pytestmark = pytest.mark.program


def run_example(example: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # One thread: with two on a machine of two busy cores, what takes 9 s took 47 s now and then.
    return subprocess.run(
        [sys.executable, str(example), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def load_example(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example.stem, example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The annotations of its NamedTuple are resolved through sys.modules, where other examples find it too.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_digits() -> ModuleType:
    return load_example(TRAIN_DIGITS)


@pytest.fixture(scope="module")
def compare_on_digits(train_digits: ModuleType) -> ModuleType:
    return load_example(EXAMPLES / "compare_on_digits.py")


@pytest.fixture(scope="module")
def finetune(train_digits: ModuleType) -> ModuleType:
    return load_example(FINETUNE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_short_training_prints_the_table_and_writes_the_plot(device: str, tmp_path: Path) -> None:
    done = run_example(TRAIN_DIGITS, f"--device={device}", "--epochs=1", "--output=made/plot.png", folder=tmp_path)
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


def test_states_of_8_bits_are_shown_and_smaller(
    train_digits: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = f"--output={tmp_path / 'plot.png'}"
    arguments = ["--device=cpu", "--epochs=1", "--state-dtype=8bit", "--optimizer", "torch", "fused_optim"]
    monkeypatch.setattr(sys, "argv", [TRAIN_DIGITS.name, output, *arguments])
    assert train_digits.main() == 0
    theirs, ours = map(float, re.findall(r"bytes of state, ([0-9.]+) a parameter", capsys.readouterr().out))
    assert theirs >= 8
    assert 2.06 < ours < 2.4


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
    for option in (
        "--device",
        "--backend",
        "--epochs",
        "--optimizer",
        "--seed",
        "--output",
        "--state-dtype",
        "--rounding",
    ):
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


# Fine-tuning with layer decay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_factors_train_as_groups_do(
    device: str, finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For six steps: a factor that is left out moves the second loss by more than the bound."""
    shuffled_batches = finetune.shuffled_batches
    monkeypatch.setattr(finetune, "shuffled_batches", lambda *arguments: list(shuffled_batches(*arguments))[:6])
    monkeypatch.setattr(sys, "argv", [FINETUNE.name, f"--device={device}", "--epochs=1", "--describe"])
    status = finetune.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    number = r"\s*│\s*([0-9.]+)"
    rows = re.findall(rf"│ (torch AdamW|fused_optim AdamW)[^│]*?{number * 4}", printed)
    assert [row[0] for row in rows] == ["torch AdamW", "torch AdamW", "fused_optim AdamW"]
    groups, losses, times, ratios = zip(*([float(value) for value in row[1:]] for row in rows), strict=True)
    assert groups == (28, 28, 1)  # 12 layers, what comes before and after them, each with and without decay
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert min(times) > 0
    assert ratios[0] == 1
    assert re.search(r"^blocks\.11\.qkv\.weight .* 0\.0015 +0\.1 ", printed, re.MULTILINE)  # 0.002 * 0.75
    assert re.search(r"^blocks\.0\.qkv\.bias .* 6\.33527e-05 +0 ", printed, re.MULTILINE)  # 0.002 * 0.75 ** 12


def test_finetuning_by_a_backend_that_cannot_serve_ends_with_its_reason(
    finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [FINETUNE.name, "--device=cpu", "--backend=cuda"])
    assert finetune.main() == 2
    assert capsys.readouterr().err.startswith("finetune_layer_decay.py: backend='cuda'")


@pytest.mark.parametrize(
    ("losses", "keeps"),
    [([2.0, 1.0], True), ([2.0001, 1.0], True), ([2.001, 1.0], False), ([2.0, float("nan")], False)],
)
def test_loss_curves_that_differ_are_told(finetune: ModuleType, losses: list[float], keeps: bool) -> None:
    stock = SimpleNamespace(title="stock", losses=[2.0, 1.0])
    other = SimpleNamespace(title="other", losses=losses)
    assert finetune.check([stock, other], Console(quiet=True)) is keeps


def test_finetuning_is_clipped(finetune: ModuleType, train_digits: ModuleType) -> None:
    """Or the comparison would say nothing about clipping."""
    run = finetune.Run("fused_optim", train_digits.VisionTransformer(depth=finetune.DEPTH), None)
    data = train_digits.load_data(0, torch.device("cpu"))
    run.train(data.train_images[:64], data.train_labels[:64])
    assert run.optimizer.last_grad_norm > finetune.CLIP_NORM


NOVOGRAD = EXAMPLES / "train_novograd_larc.py"
MUON = EXAMPLES / "train_muon.py"


def learn_the_digits(
    example: ModuleType, epochs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", [example.__name__, "--device=cpu", f"--epochs={epochs}"])
    status = example.main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "every accuracy is at least 95 %" in printed
    return printed


def test_novograd_and_larc_learn_the_digits(
    compare_on_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In five epochs of its fifteen: by then the worst of the four had 96.4 % to 97.8 % over three seeds."""
    assert "prologue.0.weight" in learn_the_digits(load_example(NOVOGRAD), 5, monkeypatch, capsys)


def test_muon_learns_the_digits(
    compare_on_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two blocks of its six: after ten epochs the worse of the two had 96.4 % to 97.5 % over three seeds."""
    example = load_example(MUON)
    monkeypatch.setattr(example, "VisionTransformer", functools.partial(example.VisionTransformer, depth=2))
    learn_the_digits(example, 10, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("example", [FINETUNE, NOVOGRAD, MUON], ids=lambda example: example.stem)
def test_a_comparison_keeps_its_bounds_as_a_user_starts_it(example: Path, tmp_path: Path) -> None:
    done = run_example(example, "--device=cpu", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" not in done.stdout


@pytest.mark.parametrize("example", [NOVOGRAD, MUON], ids=lambda example: example.stem)
def test_a_comparison_names_a_backend_that_is_missing(
    example: Path, compare_on_digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [example.name, "--device=cpu", "--backend=cuda"])
    assert load_example(example).main() == 2
    assert capsys.readouterr().err.startswith(f"{example.name}: backend='cuda'")


# Frameworks -----------------------------------------------------------------------------------------------------

FRAMEWORKS = {
    "train_ddp": ((), ["DistributedDataParallel", "ZeroRedundancyOptimizer, with a resume"]),
    "train_accelerate": (
        ("accelerate",),
        ["fused_optim beside torch", "resumed beside uninterrupted", "GradScaler and grad_clip beside torch"],
    ),
    "train_hf_trainer": (
        ("accelerate", "transformers"),
        ["fused_optim beside torch", "resumed beside uninterrupted", "resumed from torch's checkpoint"],
    ),
    "train_lightning": (
        ("pytorch_lightning",),
        [
            "32 bits, gradient_clip_val",
            "32 bits, resumed beside uninterrupted",
            "16 bits, grad_clip of the optimizer",
            "16 bits, gradient_clip_val, torch's scaler",
            "16 bits, gradient_clip_val, this library's scaler",
            "16 bits, bf16-mixed, gradient_clip_val",
            "16 bits, gradient_clip_val with fused=True",
        ],
    ),
}


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        pytest.param(name, claims, marks=pytest.mark.requires(modules=modules), id=name)
        for name, (modules, claims) in FRAMEWORKS.items()
    ],
)
def test_a_framework_trains_as_with_torchs_optimizer(
    name: str, claims: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example holds its runs to each other, and ends within the time that run_example allows it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_example(EXAMPLES / f"{name}.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^ok     (.*?):", done.stdout, re.MULTILINE) == claims
    assert "MISSED" not in done.stdout
    assert list(tmp_path.iterdir()) == []
