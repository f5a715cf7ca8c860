"""What a peer is: another library's optimizers, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from ..material import Material
from ..optimizers import Hyper, Stepper

Maker = Callable[[Material, Hyper], Stepper]


class Missing(Exception):
    """A peer cannot be used here; the text says why and what to do."""


@dataclass(frozen=True)
class Peer:
    """A way to step the parameters that is not ours.

    ``why_missing`` says why it cannot be used, None if it can; it imports nothing heavy. ``makers`` are by the name of
    our optimizer whose mathematics they share; a known difference stands in ``notes``, under the same name.
    """

    name: str
    distribution: str
    makers: Mapping[str, Maker]
    why_missing: Callable[[], str | None] = lambda: None
    devices: tuple[str, ...] = ("cpu", "cuda")
    notes: Mapping[str, str] = field(default_factory=dict)
    merges_groups: bool = False
    compiles: bool = False  # the first step takes seconds to minutes

    def why_not(self, device: str) -> str | None:
        """Why it cannot be used on a kind of device; None if it can."""
        if device not in self.devices:
            return f"needs a {' or '.join(self.devices)} device".replace("cuda", "CUDA")
        return self.why_missing()

    def version(self) -> str:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "unknown"


def needs(module: str, remedy: str) -> Callable[[], str | None]:
    """The ``why_missing`` of a peer that is one module: it is there, or this is how to get it."""

    def why_missing() -> str | None:
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):  # a parent that fails, or a module without a spec
            found = False
        return None if found else f"{module.split('.')[0]} is not installed: {remedy}"

    return why_missing


def class_of(module: str, name: str, remedy: str) -> Any:
    """A class of a module.

    Raises:
        Missing: the module is not installed, or cannot be imported here.
    """
    reason = needs(module, remedy)()
    if reason is not None:
        raise Missing(reason)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Missing(f"{module} cannot be imported: {error}") from None


def maker(module: str, name: str, *, rename: Mapping[str, str] | None = None, **fixed: Any) -> Maker:
    """Makes a class of a module from param groups and our hyperparameters, some under other names.

    A name that maps to "" is one that the class does not take.
    """

    def make(material: Material, hyper: Hyper) -> Stepper:
        names = rename or {}
        arguments = {names.get(key, key): value for key, value in hyper.items() if names.get(key, key)}
        return getattr(importlib.import_module(module), name)(material.groups(hyper), **arguments, **fixed)

    return make
