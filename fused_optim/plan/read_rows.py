"""The tensors of the rows, as the plan in Python reads them; the twin of ``csrc/plan/rows.cpp``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..row import (
    BFLOAT16,
    COLUMNS,
    FIRST_STATE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    GRAD,
    INT8,
    MASTER,
    MAX_STATES,
    PARAM,
    SIZES,
    UINT8,
    Row,
)
from ..state.codec import GROUP
from ..state.formats import scale_key
from ..tensors import is_sharded, local, same_placement
from .memory import Memory, holds_whole_groups, lies_as, memory_of, overlapping

NUMBERS = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
CODES = (INT8, UINT8)
# What is read of a row beside its columns: the scales of states that are codes, and the count of steps that the
# mechanism keeps.
SCALE = COLUMNS
COUNTER = SCALE + MAX_STATES
PLACES = COUNTER + 1


class RowReader:
    """What a row that Triton steps is expected to be, and how its tensors are read one by one."""

    def __init__(self, row: Row, rule: Any) -> None:
        self.row = row
        self.type = type(row.param)
        self.names = [*(name for name, _ in rule.states), *([row.master] if row.master is not None else ())]
        self.found: list[str] = []  # names of what was read last, scales and count included
        self.per_tensor = [*(per_tensor for _, per_tensor in rule.states), False]
        memory = memory_of(local(row.param))
        assert memory is not None
        self.memory = memory
        self.numel = local(row.param).numel()
        # Of a direction that is kept between two passes, the plan's own.
        self.direction = memory._replace(address=row.direction_address, dtype=row.direction_dtype)
        self.sharded = is_sharded(row.param)
        self.holds_groups = self.numel == 0 or holds_whole_groups(memory)
        self.tensor_columns = {FIRST_STATE + i for i, per_tensor in enumerate(self.per_tensor) if per_tensor}
        # Of each of those columns the dtype of a new state; 0 where it is one number.
        formats = iter(row.formats)
        self.formats = [0 if per_tensor else next(formats) for _, per_tensor in rule.states] + [row.master_format]
        self.columns = [*(FIRST_STATE + i for i in range(len(rule.states))), *([MASTER] if row.master else ())]

    @property
    def param(self) -> Tensor:
        return self.row.param

    def is_same(self) -> bool:
        """Whether the parameter still is what the plan was built for; its address may be another."""
        memory = memory_of(local(self.param))
        return (
            type(self.param) is self.type
            and memory is not None
            and memory.device == self.memory.device
            and memory.dtype == self.memory.dtype
            and lies_as(memory, self.memory)
        )

    def read(self, states: Mapping[str, Any] | None, out: list[Memory | None]) -> str | None:
        """Why the row cannot be stepped as it is; None: it can, and `out` has the memory of each column, of scales and
        of the count of steps."""
        param, grad = self._memory(self.param), self._memory(self.param.grad)
        if param is None or (param.address == 0 and self.numel):
            return "param"
        if (
            grad is None
            or not lies_as(grad, param)
            or grad.device != param.device
            or (grad.address == 0 and self.numel)
        ):
            return "grad"
        if grad.dtype not in NUMBERS or (grad.dtype == FLOAT64 and param.dtype != FLOAT64):
            return "grad"
        out[PARAM], out[GRAD] = param, grad
        self.found = ["step"] if self.row.counts else []
        if not self.names and not self.found:
            return None
        if not isinstance(states, Mapping):
            return "state"
        if self.row.counts:
            out[COUNTER] = memory = memory_of(states.get("step"))
            if memory is None or memory.dtype != FLOAT32 or not self._takes(memory, True, 0, COUNTER):
                return "state"
        for name, per_tensor, wanted, column in zip(self.names, self.per_tensor, self.formats, self.columns):
            value = states.get(name)
            memory = memory_of(value) if per_tensor else self._memory(value)
            if memory is None or not self._takes(memory, per_tensor, wanted, column):
                return "state"
            out[column] = memory
            self.found.append(name)
            if column != MASTER and memory.dtype in CODES:
                self.found.append(scale_key(name))
                out[SCALE + column - FIRST_STATE] = scale = self._scale(states.get(self.found[-1]))
                if scale is None:
                    return "state"
        return None

    def _takes(self, memory: Memory, per_tensor: bool, wanted: int, column: int) -> bool:
        """Whether a state is what the kernels read in this column; ``wanted``: the dtype of a new one."""
        if memory.device != self.memory.device or (memory.address == 0 and (per_tensor or self.numel)):
            return False
        if per_tensor:
            return all(size == 1 for size in memory.shape) and memory.dtype in (FLOAT32, FLOAT64)
        if not lies_as(memory, self.memory):
            return False
        # 16-bit parameters may have other numbers.
        other = column != MASTER and SIZES[self.memory.dtype] == 2 and memory.dtype in NUMBERS
        if memory.dtype != wanted and not (other and memory.dtype != FLOAT64):
            return False
        return column == MASTER or memory.dtype not in CODES or (self.row.draws and self.holds_groups)

    def _scale(self, tensor: Any) -> Memory | None:
        """The scales of a state's codes, of the part that this process has; None: they do not fit."""
        if self.sharded != is_sharded(tensor):
            return None
        memory = memory_of(local(tensor))
        if memory is None or memory.dtype != UINT8 or memory.device != self.memory.device:
            return None
        rows = self.memory.shape[0]
        shape = (rows, self.numel // rows // GROUP if rows else memory.shape[-1] if memory.shape else 0)
        fits = memory.shape == shape and lies_as(memory, memory._replace(strides=(shape[1], 1)))
        return memory if fits and (memory.address != 0 or not self.numel) else None

    def _memory(self, tensor: Any) -> Memory | None:
        if not self.sharded:
            return memory_of(tensor)
        if not is_sharded(tensor) or not same_placement(tensor._spec, self.param._spec):  # type: ignore[attr-defined]
            return None
        return memory_of(local(tensor))


class ReadRows:
    """What was read last of the rows that Triton steps, and of each column the addresses and dtypes by row.

    Args:
        rows: all rows of the optimizer.
        readers: of each row that Triton steps, by its index.
    """

    def __init__(self, rows: Sequence[Row], readers: Mapping[int, RowReader]) -> None:
        self.rows, self.readers = rows, readers
        self.params: list[Tensor] = []  # of all rows, held from refresh() to release(), and
        self.grads: list[Any] = []  # those of the active ones
        # Of each column, by row: address and dtype; 0 where there is none. Behind the columns' addresses others' stand.
        self.addresses = [[0] * len(rows) for _ in range(PLACES)]
        self.dtypes = [[0] * len(rows) for _ in range(COLUMNS)]
        self.active = [False] * len(rows)
        self.written: list[int] = []  # the active rows

    def release(self) -> None:
        self.params, self.grads = [], []

    def read(self, state: dict[Tensor, Any]) -> list[tuple[int, str]] | None:
        """Each row by itself; None: a parameter is no longer what the plan was built for."""
        unready = {}
        written = []  # first and last address, row
        for index, reader in self.readers.items():
            self.active[index] = False
            if reader.param.grad is None:
                continue
            if not reader.is_same():
                return None
            columns: list[Memory | None] = [None] * PLACES
            reason = reader.read(state.get(reader.param), columns)
            if reason is not None:
                unready[index] = reason
                continue
            self.active[index] = True
            self.grads.append(reader.param.grad)
            if reader.row.direction_address:
                columns[reader.row.direction_column] = reader.direction
            for column, memory in enumerate(columns):
                self.addresses[column][index] = 0 if memory is None else memory.address
                if column < COLUMNS:
                    self.dtypes[column][index] = 0 if memory is None else memory.dtype
                if memory is None or column == GRAD or memory.address == 0:
                    continue
                numel = reader.numel
                if column in reader.tensor_columns or column >= COLUMNS:
                    numel = math.prod(memory.shape)
                if numel:
                    written.append((memory.address, memory.address + numel * SIZES[memory.dtype], index))
        for index in overlapping(written):
            self.active[index] = False
            unready[index] = "overlap"
        self.written = [index for index in self.readers if self.active[index]]
        return list(unready.items())
