"""Who is measured for an optimizer: ours by backend, and the peers; and who is not, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_optim.backends import choice

from .material import Material
from .optimizers import Hyper, Recipe, Stepper
from .peers import PEERS
from .peers.torch_optim import Graphed
from .settings import keyword_arguments
from .shapes import Model

# How a contender that is measured again on float64 is named: by our eager path.
EAGER = "eager"


@dataclass(frozen=True)
class Contender:
    """One way to take the steps of one optimizer."""

    name: str
    make: Callable[[Material], Stepper]
    library: str
    note: str = ""
    merges_groups: bool = False
    compiles: bool = False
    ours: bool = False

    def model(self, model: Model) -> Model:
        return model.merged() if self.merges_groups else model


class Absent(NamedTuple):
    """A contender that is not measured."""

    name: str
    reason: str


def name_of(backend: str) -> str:
    return f"fused_optim/{backend}"


def ours(recipe: Recipe, backend: str, graphed: bool = False, options: Hyper | None = None) -> Contender:
    """Ours by one backend; ``options``: of its states and masters, which its name then says."""
    given = {"backend": backend, **(options or {})}

    def make(material: Material) -> Stepper:
        if graphed:
            return Graphed(recipe.ours(material, recipe.hyper, {**given, "capturable": True}))
        return recipe.ours(material, recipe.hyper, given)

    name = name_of(backend) + "-graphed" * graphed + (f", {keyword_arguments(options)}" if options else "")
    return Contender(name, make, "fused_optim", ours=True)


def contenders_for(
    recipe: Recipe,
    device: torch.device,
    only_backends: Sequence[str],
    only_peers: Sequence[str] | None,
    settings: Sequence[Hyper] = (),
) -> tuple[list[Contender], list[Absent]]:
    """All that can be measured on a device, the best of our backends first, and those that cannot.

    An empty sequence stands for all, None for no peer. Of all, what does not concern the device or the optimizer is
    left out silently. ``settings``: options of states and masters, with which ours are measured too.
    """
    found: list[Contender] = []
    absent: list[Absent] = []
    for backend in only_backends or choice.BACKENDS:
        if not choice.takes(backend, device):
            if only_backends:
                absent.append(Absent(name_of(backend), f"takes no tensor on {device.type}"))
            continue
        if backend == "triton" and choice.interprets_triton() and not only_backends:
            continue  # whoever interprets kernels does not ask how fast they are
        reason = choice.why_missing(backend, device.index)
        if reason is not None:
            absent.append(Absent(name_of(backend), reason))
            continue
        found.append(ours(recipe, backend))
        found += [ours(recipe, backend, options=options) for options in settings]
        if backend == "cuda":
            found.append(ours(recipe, backend, graphed=True))
    best = name_of(choice.choose(device)[0])
    found.sort(key=lambda contender: contender.name != best)
    for name in () if only_peers is None else only_peers or PEERS:
        peer = PEERS[name]
        if recipe.name not in peer.makers:
            if only_peers:
                absent.append(Absent(name, f"has no {recipe.name}; it has {', '.join(peer.makers)}"))
            continue
        reason = peer.why_not(device.type)
        if reason is not None:
            absent.append(Absent(name, reason))
            continue

        def make(material: Material, maker: Callable[..., Stepper] = peer.makers[recipe.name]) -> Stepper:
            return maker(material, recipe.hyper)

        note = peer.notes.get(recipe.name, "")
        library = f"{peer.distribution} {peer.version()}"
        found.append(Contender(name, make, library, note, peer.merges_groups, peer.compiles))
    return found, absent
