"""The versions that were run: README shows the results, the list has what is declared and pinned."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.sources import ROOT

SCRIPT = ROOT / "scripts" / "try_versions.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("try_versions")
    for name in ("try_versions", "build_wheels"):
        del sys.modules[name]


@pytest.fixture
def line(script: ModuleType) -> Any:
    return script.Line("2.8.0", "3.4.0", "3.9", "1")


def row_of(script: ModuleType, line: Any, **result: Any) -> str:
    return str(script.table({str(line): result} if result else {}, [line]).splitlines()[-1])


def test_readme_shows_what_was_run(script: ModuleType) -> None:
    results = script.known_results()
    assert script.show(results, check=True)
    first, *_ = results
    assert not script.show({**results, first: {**results[first], "date": "2001-01-01"}}, check=True)


def test_what_was_run_is_what_its_line_says(script: ModuleType) -> None:
    results = [(line, script.known_results().get(str(line), {})) for line in script.LINES]
    run = [(line, result) for line, result in results if "passed" in result]
    assert len(run) >= 2
    for line, result in run:
        assert result["passed"] > 100
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        assert result["torch"].partition("+")[0] == line.torch
        assert (result["triton"], result["numpy"]) == (line.triton, line.numpy)
        assert f"{result['python']}.".startswith(f"{line.python}.")


def test_no_row_claims_what_was_not_run(script: ModuleType, line: Any) -> None:
    start = "| 2.8.0 | 3.4.0 | 3.9 | 1 | |"
    assert row_of(script, line) == f"{start} not run yet | |  |"
    missing = row_of(script, line, missing="Python 3.9 was not at hand", date="2001-01-01")
    assert missing == f"{start} Python 3.9 was not at hand | | 2001-01-01 |"


def test_the_list_begins_at_what_is_declared_and_holds_what_is_pinned(script: ModuleType) -> None:
    lines = [(line.torch, line.triton, line.python) for line in script.LINES]
    settings = (ROOT / "pyproject.toml").read_text()
    for place, name in enumerate(("torch", "triton")):
        declared = re.search(rf'"{name}>=([\d.]+)', settings)
        assert declared is not None
        assert min(version_of(line[place]) for line in lines)[:2] == version_of(declared[1])
    declared = re.search(r'^requires-python = ">=([\d.]+)"', settings, re.MULTILINE)
    assert declared is not None
    assert min(version_of(line[2]) for line in lines) == version_of(declared[1])
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements" / "demo.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in {line[0] for line in lines}


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_tests_that_are_run_are_there(script: ModuleType) -> None:
    assert all((ROOT / name).exists() for name in script.TESTS)


def test_failed_tests_and_trainings_are_shown(script: ModuleType, line: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = '<testcase classname="a" name="b"><failure/></testcase><testcase name="c"/><testcase><skipped/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counted = script.count_tests(report)
    assert counted == {"passed": 1, "skipped": 1, "failed": ["a::b"]}
    row = row_of(script, line, date="2001-01-01", **counted, training="Error: x|y")
    assert row == "| 2.8.0 | 3.4.0 | 3.9 | 1 |  | 1 passed, 1 failed | failed: Error: x/y | 2001-01-01 |"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$ warnings.simplefilter('error')\nUserWarning: this\nERROR: a device\n", "UserWarning: this"),
        ("  × No solution found\n  ╰─▶ Because\n", "× No solution found"),
        ("E   torch.Error: that\n1 error\n", "torch.Error: that"),
        ("Killed\n\n", "Killed"),
    ],
)
def test_a_log_says_what_went_wrong(script: ModuleType, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert script.last_words(tmp_path / "log") == said


@pytest.mark.program
@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--only", "1.0"), "--only 1.0: no line has such a version"), (("--wheels", "none"), "none holds 0 wheels for")],
)
@pytest.mark.requires(modules=("uv",))
def test_what_cannot_be_tried_is_said(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--logs", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.program
def test_without_uv_the_remedy_is_said() -> None:
    code = f"import runpy, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import importlib.util as u; "
    code += "u.find_spec = lambda name: None; sys.argv = ['x']; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "trying versions needs uv: pip install -r requirements/versions.txt"
