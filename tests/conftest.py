"""What every test shares: the only place where a test is skipped, the seed, and how hypothesis searches."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from cuda_on_host.backend import cuda_phases
from cuda_on_host.build import OnHost, compile_module
from support import triton_interpreter
from support.ranks import Ranks
from support.sources import ROOT

from fused_optim.backends import extension

# The same examples in every run: a failure in CI is one that anyone can repeat. To search for new ones:
# pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_configure() -> None:
    # One thread a process, so that the workers of a run do not wait for each other. Workers and the programs that tests
    # start inherit it; a test whose subject is threads sets how many it needs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not torch.cuda.is_available():  # triton decides it when the kernels are imported, for the whole process
        os.environ.setdefault("TRITON_INTERPRET", "1")


# The tools of this interpreter's environment count, whether or not it is activated.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def is_spared(item: pytest.Item) -> bool:
    """An interpreter takes its time."""
    wanted = {name: value for mark in item.iter_markers("sparingly") for name, value in mark.kwargs.items()}
    found = parameters_of(item)
    return bool(item.get_closest_marker("interpreted")) and any(
        found[name] not in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items()
    )


def choose_for_check(items: list[pytest.Item]) -> None:
    """Marks what `make check` runs: of each test one example for each backend, and for each value of what it names."""
    seen = set()
    for item in items:
        if any(item.get_closest_marker(mark) for mark in ("slow", "gpu", "program")):
            continue
        names = {"backend", *(name for mark in item.iter_markers("every") for name in mark.args)}
        example = (item.nodeid.partition("[")[0], *(str(parameters_of(item).get(name)) for name in sorted(names)))
        if example not in seen:
            seen.add(example)
            item.add_marker(pytest.mark.check)


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):  # processes that are started once
            item.add_marker(pytest.mark.xdist_group("ranks"))
            item.add_marker(pytest.mark.program)
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: a test has one name in every process, and this one has an address")
        if is_spared(item):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreted"):
            if importlib.util.find_spec("triton") is None:
                item.add_marker(pytest.mark.skip(reason="needs triton installed"))
            if os.environ.get("TRITON_INTERPRET") != "1":
                item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: the kernels are compiled here"))
        programs = {program for mark in item.iter_markers("requires") for program in mark.args}
        if missing := sorted(program for program in programs if shutil.which(program, path=TOOLS) is None):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)} on PATH"))
        modules = {module for mark in item.iter_markers("requires") for module in mark.kwargs.get("modules", ())}
        if missing := sorted(module for module in modules if importlib.util.find_spec(module) is None):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)} installed"))
        for mark in item.iter_markers("requires"):
            if torch.torch_version.TorchVersion(torch.__version__) < mark.kwargs.get("torch", "0"):
                item.add_marker(pytest.mark.skip(reason=f"needs torch {mark.kwargs['torch']} or newer"))
    choose_for_check(items)
    # A group is one worker's: begun last, it would keep that one at work when the others have nothing left to do.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish() -> None:
    """Whoever asks the garbage collector finds the test's own objects, and not those of torch and all other tests."""

    gc.collect()
    gc.freeze()


@pytest.fixture
def few_to_collect() -> None:
    """The garbage collector finds what the test makes, and not what others have imported: each time in a fraction of
    the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def shim() -> OnHost:
    """The CUDA sources, compiled for the processor."""
    csrc = Path(os.environ.get("CUDA_ON_HOST_CSRC", ROOT / "csrc"))
    sanitize = bool(os.environ.get("CUDA_ON_HOST_SANITIZED"))
    return OnHost(compile_module(ROOT / "build" / "cuda_on_host", sanitize=sanitize, csrc=csrc))


@pytest.fixture
def on_host(shim: OnHost) -> Iterator[OnHost]:
    """For backend="cuda", CPU tensors are stepped by the CUDA phases."""
    with cuda_phases(shim):
        shim.schedule("ascending")
        shim.launches()
        yield shim
        shim.fail_launch(-1)
        shim.set_device()


EVERYWHERE = (
    "cpu",
    "eager",
    pytest.param("cuda", marks=pytest.mark.requires("g++")),
    pytest.param("triton", marks=pytest.mark.interpreted),
)


@pytest.fixture(params=EVERYWHERE)
def everywhere(request: pytest.FixtureRequest) -> str:
    """Each backend, on CPU tensors: those of GPUs on the host and in the interpreter."""
    if request.param == "cuda":
        request.getfixturevalue("on_host")
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads a step may use, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(threads: Callable[[int], None]) -> None:
    threads(2)


@pytest.fixture(params=[*EVERYWHERE, pytest.param("triton, python plan", marks=pytest.mark.interpreted)])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `everywhere`, and Triton's kernels once more behind the plan in Python."""
    name, _, plan = request.param.partition(", ")
    if name == "cuda":
        request.getfixturevalue("on_host")
    if plan:
        monkeypatch.setattr(extension, "_C", None)
    return str(name)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fast_interpreter(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("interpreted"):
        triton_interpreter.patch_once()


class Collector(logging.Handler):
    """Keeps the text of each line that it is handed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


@pytest.fixture
def fallbacks() -> Iterator[list[str]]:
    """What the package has logged since the test began, one text a line; the list grows."""
    collector = Collector()
    logger = logging.getLogger("fused_optim")
    logger.addHandler(collector)
    yield collector.lines
    logger.removeHandler(collector)


@pytest.fixture
def all_native(fallbacks: list[str]) -> Iterator[None]:
    """Fails a test in which the witness served a parameter of a fused backend: it would judge itself."""
    yield
    assert [line for line in fallbacks if "has no effect" not in line] == []
