"""The table of a plan as Python sees it, one row a parameter: the twin of csrc/row.h.

The compiled plan reads a `Row` by the names of its attributes; those that it does not read are for Python alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .rule.orthogonal import Matrices

# How a number lies in memory, as `DType` in csrc/row.h numbers it. int16 and int8 are remainders of split master
# weights; of a state int8 and uint8 are codes.
DTYPES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.bfloat16: 3,
    torch.float16: 4,
    torch.int16: 5,
    torch.int8: 6,
    torch.uint8: 7,
}
FLOAT32, FLOAT64, BFLOAT16, FLOAT16, REMAINDER, INT8, UINT8 = DTYPES.values()
SIZES = {FLOAT32: 4, FLOAT64: 8, BFLOAT16: 2, FLOAT16: 2, REMAINDER: 2, INT8: 1, UINT8: 1}

# Columns of a row: param, grad, master weight where there is one, then the rule's states in the rule's order.
PARAM, GRAD, MASTER, FIRST_STATE = range(4)
MAX_STATES = 4
COLUMNS = FIRST_STATE + MAX_STATES
MAX_HYPER = 15  # csrc/rules/rule.h

# `Norms` in csrc/prepare.h, of which a row has one: sums, but for the second, a maximum.
NORMS = 5
GRAD_SQ, GRAD_MAX = 0, 1


@dataclass(slots=True, eq=False)
class Row:
    """One parameter of a plan, which the plan does not keep alive: the groups do."""

    group: int
    param_ref: weakref.ref[Tensor]
    lr_scale: float
    weight_decay_scale: float
    native: bool
    clipped: bool  # takes part in clipping
    has_trust_ratio: bool  # takes part in trust ratios
    master: str | None  # state key of its master weight
    dtype: torch.dtype  # of the parameter, and
    device: torch.device  # where it was, when the plan was built,
    layout: tuple[tuple[int, ...], tuple[int, ...]] | None  # and its shape and strides there
    name: str
    backend: str
    refused: str | None  # why no native backend takes it
    own_name: str | None  # where the group has names
    formats: tuple[int, ...]  # of `DTYPES`: of new states of a number an element, in the rule's order
    master_format: int  # of its master weight; 0: it has none
    draws: bool  # its step rounds by random words, and its states may be codes of a byte
    counts: bool  # its rule counts no steps, and the mechanism does, for the random words
    stochastic: bool  # what is stored in 16 bits is rounded so
    seed: int  # of the random words
    place: int  # its index among all parameters
    first: int  # the place in the whole tensor of the first element that this process has
    matrices: Matrices | None = None  # that are made orthogonal between two passes;
    direction_column: int = 0  # in which the passes keep the direction,
    direction_address: int = 0  # where it lies; 0: there is none
    direction_dtype: int = 0

    @property
    def param(self) -> Tensor:
        """The parameter, while a group has it."""
        param = self.param_ref()
        assert param is not None
        return param
