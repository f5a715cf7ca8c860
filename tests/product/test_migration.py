"""The tables of docs/migration.md: what they say of this library is run, what they say of others is looked up there."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.sources import ROOT

import fused_optim
from fused_optim.options.peers import PEER_ARGUMENTS

PAGE = (ROOT / "docs" / "migration.md").read_text()
OPTIMIZERS = [
    kind
    for name in fused_optim.__all__
    if isinstance(kind := getattr(fused_optim, name), type) and issubclass(kind, torch.optim.Optimizer)
]
OWN_ARGUMENTS = set().union(*(inspect.signature(kind).parameters for kind in OPTIMIZERS))
# Where torch has the names that its table writes without a module.
TORCHS = ("torch.optim", "torch.nn.utils", "torch.distributed.optim")


class Row(NamedTuple):
    """A row of a section's table: the code of its first cell and that of the others."""

    section: str
    theirs: list[str]
    ours: list[str]


def rows() -> list[Row]:
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        for line in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)[1:]:
            cells = [re.findall(r"`([^`]+)`", cell) for cell in line.split(" | ")]
            found.append(Row(title.removeprefix("From "), cells[0], [code for cell in cells[1:] for code in cell]))
    return found


ROWS = rows()


def expression(code: str) -> ast.expr:
    """The code of a cell; what it leaves out with dots is left out. A keyword by itself is AdamW's if it has it."""
    code = code.replace("=...", "=None")
    for dots in (", ...", "..., ", "..."):
        code = code.replace(dots, "")
    if keyword := re.match(r"(\w+)=", code):
        takers = [kind for kind in OPTIMIZERS if keyword[1] in inspect.signature(kind).parameters]
        taker = fused_optim.AdamW if fused_optim.AdamW in takers or not takers else takers[0]
        code = f"{taker.__name__}(params, {code})"
    return ast.parse(code, mode="eval").body


def calls_in(code: str) -> list[ast.Call]:
    return [node for node in ast.walk(expression(code)) if isinstance(node, ast.Call)]


def keywords_of(code: str) -> list[str]:
    return [keyword.arg for call in calls_in(code) for keyword in call.keywords if keyword.arg is not None]


def names() -> dict[str, Any]:
    """What the cells speak of, each time new."""
    model = torch.nn.ModuleDict(
        {"patch_embed": torch.nn.Linear(4, 4), "blocks": torch.nn.Sequential(torch.nn.Linear(4, 4))}
    )
    model.bfloat16()
    params = list(model.named_parameters())
    public = {name: getattr(fused_optim, name) for name in fused_optim.__all__}
    known = {"torch": torch, "fused_optim": fused_optim, "model": model, "params": params}
    return {**public, **known, "optimizer": fused_optim.SGD(params, lr=0.1)}


def of_this_library(row: Row, code: str) -> bool:
    """Whether code of the second cell speaks of this library, not of the peer's, whose names its own cells have."""
    named = re.match(r"[\w.]+", code)
    assert named is not None, code
    name = named[0].removeprefix("fused_optim.")
    if name in OWN_ARGUMENTS or name in fused_optim.__all__:
        return True
    peers = {argument.name for argument in PEER_ARGUMENTS}
    assert name in peers or any(name in theirs for theirs in row.theirs) or name.startswith(FOREIGN), code
    return False


# The peers' own calls that a second cell shows.
FOREIGN = ("deepspeed.", "torch.")


def test_the_tables_are_found() -> None:
    assert {row.section for row in ROWS} == {
        *("torch", "apex", "DeepSpeed", "TransformerEngine", "bitsandbytes", "timm", "Checkpoints")
    }
    assert len(ROWS) >= 33
    assert sum(bool(row.ours) for row in ROWS) >= 28


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}: {row.theirs[:1]}")
def test_what_the_tables_write_here_runs(row: Row) -> None:
    for code in row.ours:
        if not of_this_library(row, code):
            continue
        whole = expression(code)
        for call in ast.walk(whole):
            if isinstance(call, ast.Call):
                function = eval(ast.unparse(call.func), names())
                inspect.signature(function).bind_partial(
                    *call.args, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                )
        if isinstance(whole, ast.Call) or "." in code:
            eval(compile(ast.Expression(whole), str(row.theirs), "eval"), names())


def torchs(name: str) -> set[str]:
    """The parameters of a class or function of torch's."""
    folder, _, last = name.rpartition(".")
    modules = [importlib.import_module(path) for path in ([folder] if folder else TORCHS)]
    return set(inspect.signature(next(getattr(module, last) for module in modules if hasattr(module, last))).parameters)


def timms(name: str) -> set[str]:
    """Those of timm's, read in its files: importing it wants torchvision."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    trees = [ast.parse(path.read_text()) for path in sorted(Path(spec.origin).parent.glob("optim/*.py"))]
    top = [node for tree in trees for node in tree.body if getattr(node, "name", None) == name]
    functions = [node for node in top if isinstance(node, ast.FunctionDef)]
    for kind in (node for node in top if isinstance(node, ast.ClassDef)):
        functions += [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    (function,) = functions
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("section", "find"),
    [("torch", torchs), pytest.param("timm", timms, marks=pytest.mark.requires(modules=("timm",)))],
)
def test_what_the_tables_say_of_an_installed_peer_is_so(section: str, find: Callable[[str], set[str]]) -> None:
    checked = 0
    for row in ROWS:
        for code in row.theirs if row.section == section else ():
            call = expression(code)
            if isinstance(call, ast.Call) and code != "step()":
                assert {keyword.arg for keyword in call.keywords} <= find(ast.unparse(call.func)), code
                checked += 1
    assert checked >= 4


@pytest.mark.parametrize("section", ["apex", "DeepSpeed", "TransformerEngine", "bitsandbytes", "timm"])
def test_arguments_of_a_peer_are_those_that_are_answered(section: str) -> None:
    """Peers need a GPU or are large: their arguments stand in the table of those that constructors answer."""
    answered = {argument.name for argument in PEER_ARGUMENTS if section in argument.peers}
    # What torch's optimizers have, the others call the same; timm's factory is no optimizer.
    common = {*inspect.signature(torch.optim.SGD).parameters, "opt", "layer_decay"}
    cells = [
        code for row in ROWS if row.section == section for code in row.theirs if "(" in code and "with" not in code
    ]
    assert len(cells) >= 3
    for code in cells:
        assert set(keywords_of(code)) <= answered | common, code
