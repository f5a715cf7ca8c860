"""Sparse gradients, for ``lazy_mode``: a step of the rows that a gradient lists, and of no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def why_refused(grad: Tensor, *, trusts: bool, differentiable: bool) -> str | None:
    """Why a gradient cannot be stepped row by row; None if it can."""
    if grad.layout != torch.sparse_coo:
        return f"lazy_mode takes the layout torch.sparse_coo, not {grad.layout}"
    if grad.sparse_dim() != 1:
        return (
            f"lazy_mode takes gradients that list whole rows, as nn.Embedding(sparse=True) makes them; this one has "
            f"{grad.sparse_dim()} sparse dimensions"
        )
    if trusts:
        return "a trust ratio needs the norm of the whole parameter; exclude it from LARC, or make the gradient dense"
    if differentiable:
        return "its group is differentiable, which a sparse step is not; make the gradient dense"
    return None


@contextmanager
def listed_rows(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], names: tuple[str, ...]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The rows of a parameter and of its states that a coalesced gradient lists, as a parameter of their own.

    What is done to them is written back to the rows at the end. ``names``: the states of a number an element; all
    others are shared. No two of the rows are the same.
    """
    rows = grad._indices()[0]
    listed = param.detach().index_select(0, rows)
    compact = {**state, **{name: state[name].index_select(0, rows) for name in names}}
    yield listed, compact
    param.detach().index_copy_(0, rows, listed)
    for name in names:
        state[name].index_copy_(0, rows, compact[name])
