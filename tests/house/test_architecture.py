"""The rules of the house: what may name what."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from cases import CASES, Case, each_adam
from support.sources import CPP, ROOT, sources

CSRC = sources("csrc", *CPP, at_least=43)
RULES = sources("csrc/rules", ".h", at_least=9)
RULE_FILES = [path for path in RULES if path.name not in ("rule.h", "all.h")]
MECHANISM = [path for path in CSRC if path not in RULES]
OPTIMIZERS = sorted({path.stem for path in RULE_FILES} | {case.name.lower() for case in CASES} | {"larc", "lars"})
FUSED_OPTIM = sources("fused_optim", ".py", at_least=35)
KERNELS = sources("kernels", ".py", at_least=16)
# What an optimizer consists of, and what speaks of optimizers to users.
OF_OPTIMIZERS = {*OPTIMIZERS, "hyperparameters", "layers", "__init__", "__main__"}
PYTHON_MECHANISM = [path for path in [*FUSED_OPTIM, *KERNELS] if path.stem not in OF_OPTIMIZERS]
TESTS = sources("tests", ".py", at_least=42)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_of(path: Path) -> str:
    """The file without comments and string literals."""
    text = path.read_text()
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return ast.unparse(tree)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(
        r'"(\\.|[^"\\\n])*"',
        lambda match: match[0] if "#include" in match.string[: match.start()][-12:] else '""',
        text,
    )


@pytest.mark.parametrize("path", CSRC, ids=relative)
def test_no_torch_header_in_csrc(path: Path) -> None:
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
    assert included or path.name in ("row.h", "tuning.h")
    assert [name for name in included if re.match(r"(torch|ATen|c10|caffe2)/", name)] == []


def test_the_guards_know_their_files() -> None:
    """What is neither a rule nor a mechanism is looked at by none of them: that must not become more."""
    assert len(MECHANISM) >= 20
    assert len(RULE_FILES) >= 7
    assert len(PYTHON_MECHANISM) >= 29
    assert {"bindings.cpp", "plan.cpp", "groups.cpp", "rows.cpp", "rule_names.cpp"} <= {path.name for path in MECHANISM}
    assert {"optimizer.py", "plan.py", "states.py", "phases.py", "refresh.py", "table.py"} <= {
        path.name for path in PYTHON_MECHANISM
    }


def test_pybind11_is_in_one_file() -> None:
    assert [relative(path) for path in CSRC if "pybind11" in code_of(path)] == ["csrc/bindings.cpp"]


@pytest.mark.parametrize("path", [*MECHANISM, *PYTHON_MECHANISM], ids=relative)
def test_mechanism_names_no_optimizer(path: Path) -> None:
    words = {word.lower() for word in re.findall(r"[A-Za-z]+", code_of(path))}
    assert words & {"adam", "amsgrad", *OPTIMIZERS} == set()


@pytest.mark.parametrize("path", RULE_FILES, ids=relative)
def test_rule_names_no_dtype_device_or_thread(path: Path) -> None:
    code = code_of(path)
    words = set(re.findall(r"\w+", code))
    forbidden = {"float", "bfloat16", "float16", "half", "DType", "Row", "blockIdx", "threadIdx", "thread", "std"}
    assert words & forbidden == set()
    assert set(re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())) <= {"rule.h", "momentum.h"}


@each_adam
def test_optimizer_class_is_short(case: Case) -> None:
    """At most 60 lines of code beside decorators and the docstring."""
    source = inspect.getsource(case.optimizer)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    lines = {
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    lines -= set(range(1, node.lineno))
    if ast.get_docstring(node) is not None:
        lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    assert len(lines) <= 60


def test_every_rule_is_in_the_list() -> None:
    listed = re.findall(r'#include "(\w+)\.h"', (ROOT / "csrc" / "rules" / "all.h").read_text())
    assert {path.stem for path in RULE_FILES if "kName" in path.read_text()} == set(listed)


def test_witness_shares_no_code_with_what_it_judges() -> None:
    files = [path for path in FUSED_OPTIM if "eager" in path.relative_to(ROOT).with_suffix("").parts]
    assert files
    for path in files:
        relatives = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert relatives or len(files) > 1
        names = {name for node in relatives for name in (node.module or "").split(".")}
        names |= {alias.name for node in relatives for alias in node.names}
        assert names & {"extension", "backends", "_C"} == set(), path


@pytest.mark.parametrize("path", [path for path in TESTS if path.name != "conftest.py"], ids=relative)
def test_skips_stand_in_conftest(path: Path) -> None:
    """A skip is decided in one place, with its reason."""
    tree = ast.parse(path.read_text())
    skips = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail", "importorskip")
    ]
    assert skips == []


def tree_of(text: str) -> tuple[set[str], set[str]]:
    """The patterns of files that a tree lists, and the folders of which it lists no file."""
    files, folders = set(), set()
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent, prefix = len(line) - len(line.lstrip()), ""
        while above and above[-1][0] >= indent:
            above.pop()
        for word in itertools.takewhile(re.compile(r"[\w/]+(\.(py|h|cpp|cu|\*)|/)").fullmatch, line.split()):
            folder, name = re.fullmatch(r"((?:\w+/)*)(.*)", word).groups()  # type: ignore[union-attr]
            prefix = folder or prefix
            whole = (above[-1][1] if above else "") + prefix + name
            (files if name else folders).add(whole)
        if line.split()[0].endswith("/"):
            above.append((indent, (above[-1][1] if above else "") + line.split()[0]))
    return files, {folder for folder in folders if not any(file.startswith(folder) for file in files)}


def test_the_tree_lists_every_file() -> None:
    """The tree of docs/architecture.md: each file of the sources stands there, and none that is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## The tree")[1].split("```")[1]
    files, folders = tree_of(text.partition("\n")[2])
    assert len(files) >= 110
    assert len(folders) >= 10
    there = {
        relative(path)
        for path in [*CSRC, *FUSED_OPTIM, *KERNELS, *sources("bench", ".py", at_least=24), *TESTS]
        if path.name != "__init__.py" and path != ROOT / "fused_optim" / "__main__.py"
    }
    unlisted = {path for path in there if not any(fnmatch(path, pattern) for pattern in files)}
    assert sorted(path for path in unlisted if not path.startswith(tuple(folders))) == []
    assert [pattern for pattern in sorted(files) if not any(ROOT.glob(pattern))] == []
    assert [folder for folder in sorted(folders) if not (ROOT / folder).is_dir()] == []


def places_to_look() -> list[tuple[list[str], list[Path]]]:
    """What the rows of "Where to look" in docs/architecture.md name: functions and classes, and the files for them."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("### Where to look")[1].split("\n#")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return [
        (
            [word for word in words if re.fullmatch(r"\w+", word)],
            [
                ROOT / (word if word.startswith(("csrc/", "kernels/")) else f"fused_optim/{word}")
                for word in words
                if "." in word
            ],
        )
        for words in rows
    ]


def test_where_to_look_names_what_is_there() -> None:
    found = places_to_look()
    assert len(found) >= 10
    for words, paths in found:
        code = "\n".join(code_of(path) for path in paths)
        assert [word for word in words if not re.search(rf"\b{word}\b", code)] == []


def imports_of(path: Path, modules: dict[str, Path]) -> set[Path]:
    """The files of the package that a file imports, those within functions and for types included."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            for alias in node.names:
                target = modules.get(f"{name}.{alias.name}", modules.get(name))
                if target is not None and target.name != "__init__.py":
                    found.add(target)
    return found


def circle_in(graph: dict[Path, set[Path]]) -> list[str]:
    """The files of a circle of imports; none if there is none."""
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> list[str]:
        if path in way:
            return [relative(one) for one in [*way[way.index(path) :], path]]
        if path in done:
            return []
        for other in sorted(graph[path]):
            if circle := visit(other, [*way, path]):
                return circle
        done.add(path)
        return []

    return next(filter(None, (visit(path, []) for path in sorted(graph))), [])


def test_no_circle_of_imports() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FUSED_OPTIM}
    graph = {path: imports_of(path, modules) for path in FUSED_OPTIM}
    assert sum(map(len, graph.values())) >= 120
    assert circle_in(graph) == []
    one, other = sorted(path for path, imported in graph.items() if imported)[:2]
    assert circle_in({one: {other}, other: {one}})


@pytest.mark.parametrize("path", FUSED_OPTIM, ids=relative)
def test_only_the_optimizers_know_the_whole_optimizer(path: Path) -> None:
    """The parts of a step take a rule, options and groups: no module below optimizer.py asks for more."""
    above = {"optimizer.py", "description.py", "__init__.py"}
    if path.name not in above and path.parent.name != "optimizers":
        assert "FusedOptimizer" not in code_of(path)


@pytest.mark.xdist_group("groups")
def test_groups_of_tests_are_seen(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes a test's group behind its name; beside a newer pytest it sees none, and says nothing."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@groups")
