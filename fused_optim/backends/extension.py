"""The compiled extension, or the reason why there is none.

In a checkout Python finds the package that is not built before the one that is installed: then the installed extension
serves, if it is of the same version.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

logger = logging.getLogger("fused_optim")

_PACKAGE = __package__.rpartition(".")[0]
_NAME = f"{_PACKAGE}._C"
_FOLDER = Path(__file__).resolve().parents[1]  # the package's
# Written by setup.py where it builds none.
_NOTE = _FOLDER / "_no_extension.txt"


def _version_of_tree(tree: Path) -> str | None:
    """The version in a source tree's settings; None where the folder is none."""
    settings = tree / "pyproject.toml"
    if not (tree / "csrc").is_dir() or not settings.is_file():
        return None
    found = re.search(r'^version = "(.+)"$', settings.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def _version_of_metadata() -> str:
    try:
        return importlib.metadata.version("fused_optim")
    except importlib.metadata.PackageNotFoundError:  # copied without them, as into a program by PyInstaller
        return "unknown"


_version = _version_of_tree(_FOLDER.parent)
version: str = _version or _version_of_metadata()


def _installed() -> tuple[str, Path] | None:
    """Version and folder of a fused_optim with an extension that is installed elsewhere than here."""
    for distribution in importlib.metadata.distributions(name="fused_optim"):
        folder = Path(str(distribution.locate_file("fused_optim"))).resolve()
        if folder != _FOLDER and PathFinder.find_spec(_NAME, [str(folder)]) is not None:
            return distribution.version, folder
    return None


def _borrow(tree: Path) -> str | None:
    """In a tree that is not built: have the installed extension found, or say why none serves. Either is logged."""
    path = sys.modules[_PACKAGE].__path__
    path.append(str(tree))  # where kernels/ and bench/ lie
    installed = _installed()
    serves = installed is not None and installed[0] == version
    if installed is None:
        other, leave = "", ""
    else:
        other = f"; the one installed in {installed[1]} " + ("serves" if serves else f"is of version {installed[0]}")
        leave = ", or leave that folder"
    missing = (
        f"fused_optim is imported from its source tree {tree}, in which no extension is built for this Python{other}; "
        f"run `pip install --editable {tree}`{leave}"
    )
    logger.warning("%s", missing)
    if installed is None or not serves:
        return missing
    path.append(str(installed[1]))
    return None


def _why_not_there() -> str:
    if _NOTE.is_file():
        return f"installed without the compiled extension: {_NOTE.read_text(encoding='utf-8').strip()}"
    for other in sorted(_FOLDER.glob("_C.*")):
        if other.suffix in (".so", ".pyd"):
            return f"the compiled extension {other} is for another Python than this one, {sys.version.split()[0]}"
    return f"the compiled extension is missing from {_FOLDER}; install fused_optim again"


def _load() -> tuple[ModuleType | None, str | None]:
    if PathFinder.find_spec(_NAME, [str(_FOLDER)]) is None:
        unbuilt_tree = _version is not None and not _NOTE.is_file()
        missing = _borrow(_FOLDER.parent) if unbuilt_tree else _why_not_there()
        if missing is not None:
            return None, missing
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded: {error}"


if sysconfig.get_config_var("Py_GIL_DISABLED"):
    raise ImportError(
        "fused_optim does not run on free-threaded CPython: a step reads Python's objects under the interpreter lock; "
        f"use the Python {sys.version_info[0]}.{sys.version_info[1]} that has the lock (without t in its name)"
    )

_C: ModuleType | None
missing: str | None
_C, missing = _load()
