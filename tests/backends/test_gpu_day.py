"""scripts/gpu_day.sh as far as it can be tried without a GPU: its steps, its limits, and what is made of results."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fused_optim.bench.__main__ import parser
from support.sources import ROOT

SCRIPT = ROOT / "scripts" / "gpu_day.sh"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_day", ROOT / "scripts" / "gpu_day.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_day = load_script()


def steps() -> list[list[tuple[str, int, str, str]]]:
    """Of both calls: whether it runs beside the next, limit, name, command."""
    text = subprocess.run([SCRIPT, "plan"], text=True, check=True, stdout=subprocess.PIPE).stdout
    calls = []
    for call in text.split("\n\n"):
        lines = [line.split("\t") for line in call.splitlines()]
        calls.append([(mode, int(limit), name, command) for mode, limit, name, command in lines])
    return calls


def test_both_calls_take_less_than_ten_minutes_together() -> None:
    total = 0
    for call in steps():
        together: list[int] = []
        for mode, limit, _, _ in [*call, ("alone", 0, "", "")]:
            if mode == "beside":
                together.append(limit)
            else:
                total += max(together, default=0) + limit
                together = []
    assert 300 < total < 600


def test_every_command_of_the_bench_is_one() -> None:
    commands = [command for call in steps() for _, _, name, command in call if " -m bench " in command]
    assert len(commands) >= 7
    for command in commands:
        arguments = parser().parse_args(shlex.split(command.partition(" -m bench ")[2]))
        assert arguments.device == "cuda"


# For each selection of a list: the tests of some files that it leaves. Modules are imported once for all.
COLLECT = """
import json, sys
import pytest

class Found:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]

found = Found()
for files, selection in json.loads(sys.argv[1]):
    pytest.main(["--collect-only", "-q", "-m", "gpu and not slow", *files, "-k", selection], plugins=[found])
    print("found:" + json.dumps(found.names))
"""


@pytest.mark.program
def test_every_selection_of_tests_finds_some() -> None:
    names = ("smoke", "cuda", "triton", "memcheck")
    commands = {name: command for call in steps() for _, _, name, command in call if name in names}
    assert set(commands) == set(names)
    asked = []
    for name in names:
        files = [word for word in commands[name].split() if word.startswith("tests/")]
        asked.append((files, commands[name].partition(" -k ")[2].strip()))
    result = subprocess.run(
        [sys.executable, "-c", COLLECT, json.dumps(asked)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    lines = [line.partition(":")[2] for line in result.stdout.splitlines() if line.startswith("found:")]
    found = dict(zip(names, map(json.loads, lines), strict=True))
    for name, tests in found.items():
        assert len(tests) >= 8, (name, result.stdout[-2000:])
    assert len(found["smoke"]) <= 60  # in 30 seconds
    assert len(set(map(str, found.values()))) == len(names)


@pytest.mark.parametrize("call", ["first", "second"])
def test_a_step_that_fails_is_named_and_the_others_run(call: str, tmp_path: Path) -> None:
    """Here all of them fail, but for those that only look at the machine."""
    python = tmp_path / "python"
    gathers = f'case "$*" in *gpu_day.py\\ gather*) exec {sys.executable} "$@";; esac'
    python.write_text(f'#!/bin/sh\n{gathers}\necho "no GPU here"\nexit 3\n')
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python)}
    result = subprocess.run([SCRIPT, call, out], capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 1
    names = [name for _, _, name, _ in steps()[call == "second"]]
    report = (out / "report.txt").read_text()
    for name in names:
        assert f"\n{name}: status " in report, name
    failed = report.splitlines()[-1]
    assert failed.startswith("failed: ")
    assert set(failed.split()[1:]) >= {name for name in names if not name.startswith("machine")} - {"ncu"}
    assert {path.name for path in out.iterdir()} <= {
        *("report.txt", "results.json", "variants.jsonl", "ncu.csv", "logs.tar.gz"),
    }
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {f"logs/{name}.log" for name in names} <= set(logs.getnames())
    assert json.loads((out / "results.json").read_text())["grid"] == []


# Results ----------------------------------------------------------------------------------------------------------


def variant(
    name: str, share: float, bits: str = "a", layout: str = "float32", numel: str = "67108864"
) -> dict[str, Any]:
    return {"variant": name, "layout": layout, "numel": numel, "bits": bits, "share_of_copy": share}


def test_the_best_variant_has_the_same_bits_and_all_layouts() -> None:
    rows = [
        *(variant("as-it-is", 0.8), variant("as-it-is", 0.9, layout="bfloat16"), variant("as-it-is", 0.1, numel="100")),
        *(variant("better -DFO_BLOCKS=2", 0.9), variant("better -DFO_BLOCKS=2", 0.9, layout="bfloat16")),
        *(variant("wrong", 0.99, "b"), variant("wrong", 0.99, layout="bfloat16")),
        variant("half", 0.99),
    ]
    assert gpu_day.best(rows) == "better -DFO_BLOCKS=2"
    assert gpu_day.best([]) == "as-it-is"


def row(
    contender: str, model: str, optimizer: str = "AdamW", dtype: str = "float32", **figures: float
) -> dict[str, Any]:
    return {
        **{"optimizer": optimizer, "model": model, "dtype": dtype, "contender": contender, "status": "measured"},
        **{"wall_us": 100.0, "step_us": 100.0, "host_us": 50.0, **figures},
    }


def sample(folder: Path, grid: list[dict[str, Any]], variants: list[dict[str, Any]]) -> Path:
    """A call's folder, gathered as on the GPU."""
    (folder / "logs").mkdir(parents=True)
    half = len(grid) // 2
    for name, rows in (("a", grid[:half]), ("b", grid[half:])):
        result = {"machine": {"gpu": "a GPU"}, "protocol": {}, "interrupted": False, "cases": [], "grid": rows}
        (folder / "logs" / f"{name}.json").write_text(json.dumps(result))
    (folder / "logs" / "broken.json").write_text("{")
    clips = [{"model": "resnet-50", "dtype": "float32", "wall": 1.3, "device": 1.3}]
    (folder / "logs" / "clip.json").write_text(json.dumps({"clip": clips}))
    (folder / "variants.jsonl").write_text("\n".join(map(json.dumps, variants)))
    gpu_day.gather(folder)
    return folder


def test_results_become_verdicts_a_file_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchs = "torch-fused"
    first = sample(
        tmp_path / "first",
        [
            row("fused_optim/cuda", "dense-1g", share_of_copy=0.5),
            row("fused_optim/cuda", "vit-b-16"),
            row(torchs, "vit-b-16", wall_us=350.0, host_us=400.0),
            row("fused_optim/cuda", "resnet-50", "NovoGrad"),
            row("timm", "resnet-50", "NovoGrad", wall_us=1500.0),
            row("fused_optim/triton", "vit-b-16", step_us=105.0),
            {**row("fused_optim/cuda", "bert-large"), "status": "failed"},
        ],
        [variant("as-it-is", 0.95)],
    )
    second = sample(tmp_path / "second", [row("fused_optim/cuda", "dense-1g", share_of_copy=0.93)], [])
    (tmp_path / "README.md").write_text(f"before\n{gpu_day.BEGIN}\nnothing\n{gpu_day.END}\nafter\n")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    assert gpu_day.merge([first, second], write=True) == 1  # something is missed
    verdicts = capsys.readouterr().out.splitlines()
    assert verdicts[0] == "best variant: as-it-is"
    expected = {
        "1 G float32": "met",
        "1 G bfloat16": "NOT MEASURED",
        "decay, wall": "met",
        "decay, host": "MISSED",
        "465 groups": "NOT MEASURED",
        "clip": "met",
        "NovoGrad": "met",
        "LARC": "NOT MEASURED",
        "Triton": "met",
        "every dtype": "met",
    }
    assert len(verdicts) == 1 + len(expected)
    for text, verdict in expected.items():
        (line,) = [line for line in verdicts if text in line]
        assert line.startswith(f"{verdict} "), line
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "| AdamW, dense-1g, float32 | fused_optim/cuda | 100 | 50 | 93 % |  |" in readme
    written = json.loads((tmp_path / "bench" / "results" / "gpu.json").read_text())
    assert len(written["grid"]) == 7
    assert written["machine"] == {"gpu": "a GPU"}
    assert written["variants"] == [variant("as-it-is", 0.95)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.requires("nvcc")
def test_a_variant_is_built_and_says_what_it_lacks(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-arch=sm_90", "-cudart", "static"]
    files = ["scripts/gpu_variants.cu", "csrc/cuda/apply.cu", "csrc/cuda/layout.cpp"]
    options = ["-DFO_BLOCKS=2", "-DFO_KB_IN_FLIGHT=96", "-DFO_STREAMING=0", "-DFO_TILE=2048"]
    out = tmp_path / "variant"
    subprocess.run(["nvcc", *flags, *options, "-I", "csrc", *files, "-o", str(out)], check=True, cwd=ROOT)
    result = subprocess.run([out], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "") or "variant" in result.stdout or "CUDA" in result.stderr
