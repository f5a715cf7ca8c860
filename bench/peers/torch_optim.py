"""torch.optim, in each of its implementations."""

from __future__ import annotations

from typing import Any

import torch

from ..material import Material
from ..optimizers import Hyper, Stepper
from .peer import Maker, Peer

CLASSES = {"AdamW": "AdamW", "AdamWDL": "AdamW", "Adam": "Adam", "SGD": "SGD"}


class Graphed:
    """An optimizer's step, captured once into a CUDA graph: a step is a replay."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            optimizer.step()
        self.step = self.graph.replay


class Compiled:
    """An optimizer's step under torch.compile."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        torch._dynamo.reset()  # an optimizer compiled before counts towards the limit of recompilations
        self.step = torch.compile(lambda: optimizer.step())


def make_with(wrap: Any = None, merged: bool = False, **options: Any) -> dict[str, Maker]:
    def making(kind: str) -> Maker:
        def make(material: Material, hyper: Hyper) -> Stepper:
            params = material.flat if merged else material.groups(hyper)
            optimizer = getattr(torch.optim, kind)(params, **hyper, **options)
            return optimizer if wrap is None else wrap(optimizer)

        return make

    return {ours: making(theirs) for ours, theirs in CLASSES.items()}


def graphed() -> dict[str, Maker]:
    capturable = make_with(Graphed, fused=True, capturable=True)
    # SGD keeps no step count and takes no capturable.
    return {**capturable, "SGD": make_with(Graphed, fused=True)["SGD"]}


PEERS = (
    Peer("torch-forloop", "torch", make_with(foreach=False, fused=False)),
    Peer("torch-foreach", "torch", make_with(foreach=True)),
    Peer("torch-fused", "torch", make_with(fused=True)),
    Peer(
        "torch-fused-merged",
        "torch",
        make_with(fused=True, merged=True),
        merges_groups=True,
        notes=dict.fromkeys(CLASSES, "all parameters in one group, with one learning rate and one weight decay"),
    ),
    Peer("torch-graphed", "torch", graphed(), devices=("cuda",)),
    Peer("torch-compiled", "torch", make_with(Compiled, foreach=True), compiles=True),
)
