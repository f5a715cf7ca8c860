"""The documentation says what the code does: its examples run, its tables hold, and it knows every message."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import fused_optim.bench
import pytest
import torch
from support.sources import ROOT, sources

import fused_optim

PAGES = sorted(
    [*ROOT.glob("*.md"), *sources("bench", ".md", at_least=1), *sources("docs", ".md", at_least=20)],
)

# What stands for a part of a message that varies.
GAP = "\0"


# Messages ---------------------------------------------------------------------------------------------------------


def template(node: ast.AST) -> str | None:
    """The text of a string expression, with a gap for each part that varies; None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else (left or GAP) + (right or GAP)
    return None


def strings_in(node: ast.AST) -> Iterator[ast.AST]:
    """The whole strings below a node, not their pieces."""
    if template(node) is not None:
        yield node
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings_in(child)


def is_logging(node: ast.Call) -> bool:
    called = node.func
    return (
        isinstance(called, ast.Attribute)
        and called.attr in ("warning", "error", "info")
        and ast.unparse(called.value).endswith("logger")
    )


def expressions_with_messages(tree: ast.Module) -> Iterator[ast.AST]:
    """What is raised, logged, or given as the reason of something (by `why_*` and `choose`, as `missing`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) not in ("AssertionError", "NotImplementedError"):
                yield from node.exc.args
        elif isinstance(node, ast.Call) and is_logging(node):
            yield node.args[0]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "missing":
            yield node.value
        elif isinstance(node, ast.FunctionDef) and re.fullmatch(r"why_\w+|choose", node.name):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from strings_in(inner.value)
                elif isinstance(inner, ast.Call) and ast.unparse(inner.func).endswith(".append"):
                    yield from inner.args


def messages_of_python(file: Path) -> set[str]:
    found = {template(node) for node in expressions_with_messages(ast.parse(file.read_text()))}
    return {text for text in found if text is not None and " " in text.strip()}


def messages_of_cpp(file: Path) -> set[str]:
    """The format strings of errors; pieces joined by the compiler or by + are one text."""
    kinds = r"(?:PyErr_Format|PyErr_SetString|value_error|runtime_error)"
    calls = re.findall(kinds + r"\((.*?)\);\n", file.read_text(), re.DOTALL)
    found = set()
    for call in calls:
        call = re.sub(r'"\s*"', "", call)
        pieces = re.findall(r'"((?:[^"\\]|\\.)*)"', call)
        found.add(re.sub(r"%(?:zu|zd|d|s|R)", GAP, GAP.join(pieces)))
    return {text for text in found if text.strip(GAP)}


def messages_of_cmake(file: Path) -> set[str]:
    found = re.findall(r'message\(FATAL_ERROR "([^"]*)"', file.read_text())
    return {re.sub(r"\$\{\w+\}", GAP, text) for text in found}


def messages() -> list[tuple[str, str]]:
    found = []
    python = [*sources("fused_optim", ".py", at_least=35), *sources("kernels", ".py", at_least=16), ROOT / "setup.py"]
    for file in sorted(python):
        found += [(file.name, text) for text in sorted(messages_of_python(file))]
    for file in sources("csrc", ".cpp", ".cu", at_least=14):
        found += [(file.name, text) for text in sorted(messages_of_cpp(file))]
    return found + [("CMakeLists.txt", text) for text in sorted(messages_of_cmake(ROOT / "CMakeLists.txt"))]


def readable(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace(GAP, "..."))


def test_messages_are_found_in_every_language() -> None:
    assert len(messages()) >= 140
    files = {file for file, _ in messages()}
    python = {"states.py", "read_groups.py", "choice.py", "extension.py", "setup.py"}
    assert python | {"groups.cpp", "CMakeLists.txt"} <= files


@pytest.mark.parametrize(("file", "text"), [pytest.param(*entry, id=readable(entry[1])[:60]) for entry in messages()])
def test_troubleshooting_knows_every_message(file: str, text: str) -> None:
    """All fixed parts of a message stand in one line of the page, in order."""
    parts = [part.strip(" '\"") for part in re.sub(r"\s+", " ", text).split(GAP)]
    fixed = [re.escape(part) for part in parts if len(part) > 2]
    assert fixed, f"{file}: a message without fixed words: {text!r}"
    pattern = re.compile(".*".join(fixed))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert any(pattern.search(line) for line in page.splitlines()), f"{file}: not in the page: {readable(text)}"


# Examples ---------------------------------------------------------------------------------------------------------


def modules() -> list[str]:
    files = [path.relative_to(ROOT).with_suffix("") for path in sources("fused_optim", ".py", at_least=35)]
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__")


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_optimizer_has_an_example() -> None:
    for name in fused_optim.__all__:
        thing = getattr(fused_optim, name)
        if isinstance(thing, type) and issubclass(thing, fused_optim.FusedOptimizer):
            assert thing is fused_optim.FusedOptimizer or ">>>" in (thing.__doc__ or ""), name


def code_blocks() -> list[tuple[str, int, str]]:
    """Blocks marked `python` are run; `py` marks an excerpt, or one that needs packages beyond torch."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for number, match in enumerate(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
            found.append((page.relative_to(ROOT).as_posix(), number, match.group(1)))
    return found


@pytest.mark.parametrize(("page", "number", "code"), [pytest.param(*b, id=f"{b[0]}-{b[1]}") for b in code_blocks()])
def test_code_in_pages_runs(page: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may write a checkpoint
    exec(compile(code, f"{page}, block {number}", "exec"), {"__name__": "__main__"})


def test_the_readme_shows_code_that_runs() -> None:
    assert any(page == "README.md" for page, _, _ in code_blocks())


# Tables and links -------------------------------------------------------------------------------------------------


def memory_rows() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    table = text.partition("<!-- memory:begin -->")[2].partition("<!-- memory:end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return rows[2:]


@pytest.mark.parametrize("row", memory_rows(), ids=lambda row: row[0])
def test_memory_is_what_the_readme_says(row: list[str]) -> None:
    dtype, *options = re.findall(r"`([^`]*)`", row[0])
    keywords = {}
    for key, value in (option.split("=") for option in options):
        keywords[key] = getattr(torch, value[6:]) if value.startswith("torch.") else ast.literal_eval(value)
    param = torch.nn.Parameter(torch.zeros(128, 64, dtype=getattr(torch, dtype)))
    param.grad = torch.zeros_like(param)
    optimizer = fused_optim.AdamW([param], amsgrad=True, **keywords)
    optimizer.step()
    state = optimizer.state[param]
    master = state.get("master_param", state.get("param_remainder"))
    sizes = [tensor.nbytes / param.numel() for tensor in (param, param.grad)]
    for name in ("exp_avg", "exp_avg_sq"):  # codes with their scales
        sizes.append(sum(state[key].nbytes for key in (name, f"{name}_scale") if key in state) / param.numel())
    sizes.append(0 if master is None else master.element_size())
    whole = [*sizes, sum(sizes), sum(sizes) + state["max_exp_avg_sq"].element_size()]
    assert [float(cell) for cell in row[1:]] == pytest.approx(whole, abs=5e-3)


def test_the_readme_has_its_tables() -> None:
    assert len(memory_rows()) >= 5


def headings(page: Path) -> set[str]:
    """The anchors that sphinx and GitHub give to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    dead = []
    for file, anchor in links:
        target = page.parent / file if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            dead.append(f"{file}#{anchor}")
    assert dead == []


def test_every_public_name_stands_in_the_index() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    names = [*fused_optim.__all__, *(f"fused_optim.bench.{name}" for name in fused_optim.bench.__all__)]
    assert len(names) >= 25
    assert [name for name in names if f"`{name}`" not in page and f":: {name}" not in page] == []


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for index in (ROOT / "docs" / "index.md", ROOT / "docs" / "optimizers" / "index.md"):
        for block in re.findall(r"^```{toctree}\n(.*?)^```", index.read_text(), re.MULTILINE | re.DOTALL):
            names = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(index.parent / f"{name}.md").resolve() for name in names}
    pages = set(sources("docs", ".md", at_least=20)) - {ROOT / "docs" / "index.md"}
    assert {page.resolve() for page in pages} == listed
