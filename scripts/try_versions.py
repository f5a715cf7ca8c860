"""Runs one wheel a CPython with each torch, triton, Python and numpy of a list, and writes README's table of them.

    python scripts/try_versions.py --wheels dist            every line of the list
    python scripts/try_versions.py --wheels dist --only 2.8 lines whose torch, triton, Python or numpy begin so
    python scripts/try_versions.py --check                  whether README shows docs/versions.json

For each line uv makes an environment of its own outside the checkout, installs the wheel of that CPython with torch's
builds for the processor (--torch-backend), and runs there, one after the other:

- the portable tests: of the files in TESTS (the contract, checkpoints, layouts, refusals, numerics, backends) what
  carries the mark `check`, which is an example of each test with each backend, the Triton kernels in their interpreter
  included. PATH holds nothing but the environment, so that what needs a compiler or another program is skipped: that is
  the build's subject, not torch's.
- a training: a model is trained with torch.optim.AdamW and with fused_optim.AdamW, compiled by dynamo, its checkpoint
  goes both ways, and a step of it is profiled.

What cannot be had (an interpreter, a build of torch) is a line that says so. A line that is not run
this time keeps what it had, with its date. Needs `pip install -r requirements/versions.txt`; uv's own settings
(UV_INDEX, UV_FIND_LINKS, UV_CACHE_DIR, ...) count. The exit status is 1 if a line that was run has a failure.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from build_wheels import interpreters

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "versions.json"
BEGIN, END = "<!-- versions:begin -->", "<!-- versions:end -->"
TESTS = (
    "tests/contract/test_contract.py",
    "tests/contract/test_checkpoints.py",
    "tests/contract/test_layout.py",
    "tests/contract/test_refusals.py",
    "tests/mathematics/test_numerics.py",
    "tests/backends/test_backends.py",
    "tests/backends/test_dlpack.py",
    "tests/backends/test_triton.py",
)
# What tests/conftest.py imports. It needs pybind11 for a build that no portable test asks for.
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "pybind11")


@dataclass(frozen=True)
class Line:
    """triton is the one that this torch's CUDA build asks for."""

    torch: str
    triton: str
    python: str
    numpy: str

    def __str__(self) -> str:
        return f"torch {self.torch}, triton {self.triton}, Python {self.python}, numpy {self.numpy}"

    def begins_with(self, version: str) -> bool:
        return any(f"{own}.".startswith(f"{version}.") for own in asdict(self).values())


LINES = (
    Line("2.8.0", "3.4.0", "3.10", "1.26.4"),
    Line("2.8.0", "3.4.0", "3.12", "2.4.6"),
    Line("2.9.1", "3.5.1", "3.10", "2.2.6"),
    Line("2.10.0", "3.6.0", "3.12", "2.4.6"),
    Line("2.11.0", "3.6.0", "3.11", "2.0.2"),
    Line("2.12.1", "3.7.1", "3.12", "2.3.5"),
    Line("2.13.0", "3.7.1", "3.11", "2.4.6"),
    Line("2.13.0", "3.7.1", "3.13", "2.4.6"),
    Line("2.14.1", "3.8.0", "3.11", "1.26.4"),
    Line("2.15.0", "3.9.0", "3.13", "2.5.5"),
    Line("2.15.0", "3.9.0", "3.14", "2.5.5"),
)

TRAINING = """
import copy, io, json, pathlib, platform, sys, warnings
from importlib.metadata import version
import torch
import fused_optim
from fused_optim.bench import profile_step

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # of that Python, not of what is run
assert pathlib.Path(fused_optim.__file__).is_relative_to(sys.prefix), f"not the wheel: {fused_optim.__file__}"
torch.manual_seed(0)
inputs = torch.randn(256, 16)
targets = torch.sin(inputs.sum(1, keepdim=True))
first = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 1))

def train(kind, steps, model, state=None):
    optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.1)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return optimizer, loss.item()

def parameters(model):
    return [param.detach() for param in model.parameters()]

ours, theirs = copy.deepcopy(first), copy.deepcopy(first)
mine, loss = train(fused_optim.AdamW, 200, ours)
torchs, reference = train(torch.optim.AdamW, 200, theirs)
assert mine.backend == "cpu", mine.backend
start = torch.nn.functional.mse_loss(first(inputs), targets).item()
assert loss < start / 2, (start, loss)
assert abs(loss - reference) < 0.05 * start, (loss, reference)

# Both go on from the other's checkpoint, and take the same step.
after, before = copy.deepcopy(ours), copy.deepcopy(ours)
train(torch.optim.AdamW, 1, after, mine.state_dict())
train(fused_optim.AdamW, 1, before, mine.state_dict())
torch.testing.assert_close(parameters(after), parameters(before), rtol=1e-5, atol=1e-6)
file = io.BytesIO()
torch.save(torchs.state_dict(), file)
file.seek(0)
train(fused_optim.AdamW, 1, theirs, torch.load(file))

# The step stands outside the graph.
compiled = torch.compile(ours, backend="eager")
@torch.compile(backend="eager")
def step():
    compiled(inputs).sum().backward()
    mine.step()
step()

def forward_backward():
    mine.zero_grad()
    torch.nn.functional.mse_loss(ours(inputs), targets).backward()
profiled = profile_step(forward_backward, mine, "trace.json")
assert 0 < profiled.optimizer < profiled.step

config = io.StringIO()
fused_optim.show_config(file=config)
(reader,) = [line.split("  ")[-1].strip() for line in config.getvalue().splitlines() if line.startswith("tensor rea")]
pathlib.Path("trained.json").write_text(json.dumps({
    "torch": torch.__version__, "triton": version("triton"), "python": platform.python_version(),
    "numpy": version("numpy"), "reader": reader.partition(",")[0], "loss": loss, "first_loss": start,
}))
"""


def run(command: list[str], folder: Path, log: Path, environment: dict[str, str] | None = None) -> bool:
    """Whether a command succeeded; what it says goes to the log."""
    with open(log, "a") as out:
        print(f"$ {' '.join(command)}", file=out, flush=True)
        return subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=out).returncode == 0


def last_words(log: Path) -> str:
    """What a log names as the error, the last one; else its last line."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E +)?[\w.]*(Error|Warning|Exception): |error: |× ", line)]
    return (errors or lines)[-1].removeprefix("E ").strip()[:200]


def count_tests(report: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
    }


def try_line(line: Line, python: str, wheel: Path, backend: str, folder: Path, log: Path) -> dict[str, Any]:
    """The line as it was run; a dict with ``missing`` where something could not be had."""
    inside = folder / "environment"
    uv = [sys.executable, "-m", "uv"]
    bin_folder = inside / "bin"
    install = [*uv, "pip", "install", "--python", str(bin_folder / "python"), *TOOLS, f"numpy=={line.numpy}"]
    install += [f"torch=={line.torch}", f"triton=={line.triton}", str(wheel.resolve())]
    if backend != "none":
        install += ["--torch-backend", backend]
    for command in ([*uv, "venv", "--python", python, str(inside)], install):
        if not run(command, folder, log):
            return {"missing": f"not to be had where this was run: {last_words(log)}"}

    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FUSED_OPTIM_", "PYTHON", "VIRTUAL"))
    }
    environment |= {"PATH": str(bin_folder), "PYTHONPYCACHEPREFIX": str(folder / "pycache")}
    started = time.monotonic()
    report = folder / "report.xml"
    pytest = [
        str(bin_folder / "python"),
        "-m",
        "pytest",
        "-q",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    pytest += ["-p", "no:cacheprovider", "-m", "check", f"--junitxml={report}", *(str(ROOT / name) for name in TESTS)]
    run(pytest, folder, log, environment)
    if not report.exists():
        return {"missing": f"the tests did not start: {last_words(log)}"}
    found = {**count_tests(report), "seconds": round(time.monotonic() - started)}
    if not run([str(bin_folder / "python"), "-c", TRAINING], folder, log, environment):
        return {**found, "training": last_words(log)}
    return {**found, "training": None, **json.loads((folder / "trained.json").read_text())}


def known_results() -> dict[str, dict[str, Any]]:
    """The results of earlier runs by the text of their line, in the order of the list."""
    results = json.loads(RESULTS.read_text())["lines"] if RESULTS.exists() else []
    found = {result["line"]: result for result in results}
    return {str(line): found[str(line)] for line in LINES if str(line) in found}


def table(known: dict[str, dict[str, Any]], wanted: Sequence[Line] = LINES) -> str:
    """A row for each line of the list, also for one that was not run."""
    lines = [
        "| torch | triton | Python | numpy | reads tensors through | tests | training | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in wanted:
        result = {**asdict(line), "missing": "not run yet", "date": "", **known.get(str(line), {})}
        if "passed" in result:
            del result["missing"]
        versions = " | ".join(str(result[name]) for name in ("torch", "triton", "python", "numpy"))
        if "missing" in result:
            why = result["missing"].replace("|", "/")
            lines.append(f"| {versions} | | {why} | | {result['date']} |")
            continue
        failed = len(result["failed"])
        tests = f"{result['passed']} passed" + (f", {failed} failed" if failed else "")
        if result["training"] is None:
            training = f"loss {result['first_loss']:.2f} to {result['loss']:.4f}"
        else:
            training = f"failed: {result['training'].replace('|', '/')}"
        lines.append(f"| {versions} | {result.get('reader', '')} | {tests} | {training} | {result['date']} |")
    return "\n".join(lines)


def show(known: dict[str, dict[str, Any]], check: bool) -> bool:
    """Writes README's table, or says whether it is there."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    filled = f"{before}{BEGIN}\n{table(known)}\n{END}{rest.split(END)[1]}"
    if not check:
        readme.write_text(filled)
    return filled == text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist", help="the folder of the wheels (default: dist)")
    parser.add_argument("--only", help="lines of which a version is this one, or begins with it, such as 2.8")
    parser.add_argument("--python", action="append", default=[], help="an interpreter that is not on PATH; repeatable")
    parser.add_argument("--torch-backend", default="cpu", help="which builds of torch uv takes; none: as its index has")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "versions", help="default: build/versions")
    parser.add_argument("--check", action="store_true", help="run nothing; whether README shows the results")
    arguments = parser.parse_args()
    if arguments.check:
        if show(known_results(), check=True):
            return 0
        print("README.md does not show docs/versions.json: run python scripts/try_versions.py")
        return 1
    if importlib.util.find_spec("uv") is None:
        raise SystemExit("trying versions needs uv: pip install -r requirements/versions.txt")
    chosen = [line for line in LINES if arguments.only is None or line.begins_with(arguments.only)]
    if not chosen:
        raise SystemExit(f"--only {arguments.only}: no line has such a version; there are {'; '.join(map(str, LINES))}")

    pythons = {**interpreters([]), **(interpreters(arguments.python) if arguments.python else {})}
    arguments.logs.mkdir(parents=True, exist_ok=True)
    failures = 0
    for line in chosen:
        python = pythons.get(tuple(map(int, line.python.split("."))))
        wheels = list(arguments.wheels.glob(f"*-cp{line.python.replace('.', '')}-*.whl"))
        log = arguments.logs / f"torch{line.torch}-python{line.python}-numpy{line.numpy}.log"
        log.write_text("")
        if python is None:
            result: dict[str, Any] = {"missing": f"Python {line.python} was not at hand"}
        elif len(wheels) != 1:
            raise SystemExit(
                f"{arguments.wheels} holds {len(wheels)} wheels for Python {line.python}, not one: make wheel"
            )
        else:
            with tempfile.TemporaryDirectory(prefix="versions-") as folder:
                result = try_line(line, python, wheels[0], arguments.torch_backend, Path(folder), log)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        result = {"line": str(line), **asdict(line), "date": date, **result}
        earlier = known_results()  # another run may have written meanwhile
        if "missing" in result and "passed" in earlier.get(str(line), {}):
            print(f"{line}: {result['missing']}; what it had stays")
            continue
        earlier[str(line)] = result
        failures += bool(result.get("failed") or result.get("training"))
        print(f"{line}: {json.dumps({key: result[key] for key in result if key not in asdict(line)})}", flush=True)
        RESULTS.write_text(json.dumps({"lines": list(earlier.values())}, indent=1) + "\n")
        show(known_results(), check=False)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
