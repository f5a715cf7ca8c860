"""What lies on the device: the table that the kernels read, 64-bit words, field by field.

First the step (`HEADER`), then the groups, then the rows: one number a header field, one a group or row for each of
theirs. A float64 stands as its bits, an address and an integer as they are. csrc/plan/triton_table.h writes the fields
of groups and rows under the same names in the same order.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from .rule import MAX_HYPER, MAX_STATES
from .rules.trust_ratio import TrustRatio

# The addresses of a `DeviceStep`; csrc/step.h and fused_optim/plan/step.py say what is there.
ADDRESSES = ("grad_scale", "found_inf", "grad_norm", "non_finite", "measured", "exchanged")
# What a step needs to know beside its rows.
HEADER = (
    "grad_scale",  # 1 / loss scale
    "clip_norm",  # of clips by a norm; infinity measures and scales nothing
    "clip_min",  # of a clip by value
    "clip_max",
    "global_norm",  # where the caller knows it
    *(f"{name}_address" for name in ADDRESSES),
)
GROUP = (
    "maximize",
    "needs",
    *TrustRatio._fields,
    *(f"hyper{i}" for i in range(MAX_HYPER)),
    *(f"hyper_address{i}" for i in range(MAX_HYPER)),  # of those that are tensors on the rows' device; 0: the others
    *(f"hyper_dtype{i}" for i in range(MAX_HYPER)),
)
ROW = (
    "grad",  # what changes at every step comes first: it is sent in one piece
    "active",  # has a gradient that this backend takes at this step
    "param",
    "master",
    *(f"state{i}" for i in range(MAX_STATES)),
    "numel",
    "lr_scale",
    "weight_decay_scale",
    "group",
    "clipped",  # takes part in clipping
    "has_trust_ratio",  # takes part in trust ratios
    *(f"scale{i}" for i in range(MAX_STATES)),  # of a state that is codes: the exponents of its groups
    "counter",  # a float32 count of steps, where the rule has none and random words need one
    "first",  # the place in the whole tensor of the first element
    "seed",  # of the random words, and
    "place",  # the row's among all parameters of the optimizer
    "storages",  # the dtype of each column, eight bits each; then `DRAWS` and `STOCHASTIC`
)

# How a number lies in memory, as `DType` in csrc/row.h numbers it.
NONE, FLOAT32, FLOAT64, BFLOAT16, FLOAT16, REMAINDER, INT8, UINT8 = map(tl.constexpr, range(8))
# In the kernels alone: numbers of 16 bits that are rounded by random words when they are stored.
DRAWN_BFLOAT16, DRAWN_FLOAT16 = map(tl.constexpr, range(8, 10))
# Columns of a row: param, grad, master weight where there is one, then the rule's states in the rule's order.
PARAM, GRAD, MASTER, FIRST_STATE = map(tl.constexpr, range(4))
COLUMNS = FIRST_STATE.value + MAX_STATES
# Of a row's `storages`: it takes random words; what is stored in 16 bits does, but for a param beside a master weight.
DRAWS, STOCHASTIC = 1 << 8 * COLUMNS, 2 << 8 * COLUMNS

HEADER_WORDS = tl.constexpr(len(HEADER))
GROUP_WORDS = tl.constexpr(len(GROUP))
GRAD_SCALE, CLIP_NORM, CLIP_MIN, CLIP_MAX, GLOBAL_NORM = (
    tl.constexpr(HEADER.index(name)) for name in ("grad_scale", "clip_norm", "clip_min", "clip_max", "global_norm")
)
GRAD_SCALE_ADDRESS, FOUND_INF_ADDRESS, GRAD_NORM_ADDRESS, NON_FINITE_ADDRESS, MEASURED_ADDRESS, EXCHANGED_ADDRESS = (
    tl.constexpr(HEADER.index(f"{name}_address")) for name in ADDRESSES
)
MAXIMIZE, NEEDS, TRUST, HYPER, HYPER_ADDRESS, HYPER_DTYPE = (
    tl.constexpr(GROUP.index(name))
    for name in ("maximize", "needs", TrustRatio._fields[0], "hyper0", "hyper_address0", "hyper_dtype0")
)
TRUST_WORDS = tl.constexpr(len(TrustRatio._fields))
ROW_GRAD, ROW_ACTIVE, ROW_PARAM, ROW_MASTER, ROW_STATE, NUMEL, LR_SCALE, WEIGHT_DECAY_SCALE = (
    tl.constexpr(ROW.index(name))
    for name in ("grad", "active", "param", "master", "state0", "numel", "lr_scale", "weight_decay_scale")
)
ROW_GROUP, CLIPPED, HAS_TRUST_RATIO, STORAGES = (
    tl.constexpr(ROW.index(name)) for name in ("group", "clipped", "has_trust_ratio", "storages")
)
ROW_SCALE, COUNTER, FIRST_PLACE, SEED, PLACE = (
    tl.constexpr(ROW.index(name)) for name in ("scale0", "counter", "first", "seed", "place")
)


def bits(number: float) -> int:
    """A float64 as a word."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


@triton.jit
def read_number(table, field):
    """A float64 of the header."""
    return tl.load(table + field).to(tl.float64, bitcast=True)


@triton.jit
def read_float32(address):
    """The float32 number at an address; 0 where there is none."""
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)


@triton.jit
def group_at(table, group_count, group, field):
    """Where a field of a group stands."""
    return table + HEADER_WORDS + field * group_count + group


@triton.jit
def row_at(table, group_count, row_count, row, field):
    """Where a field of a row stands."""
    return table + HEADER_WORDS + GROUP_WORDS * group_count + field * row_count + row
