"""The plan in Python: reads what a step needs, without the compiled extension.

It reads again at each step what the compiled plan reads, and says the same of it (``csrc/plan/plan.cpp``), but steps no
row itself. Where nothing has changed but addresses, torch compares the layouts of all tensors in one call.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Sequence
from operator import is_, or_
from typing import Any

from torch import Tensor

from ..row import COLUMNS, FIRST_STATE, GRAD, GRAD_SQ, MASTER, MAX_STATES, NORMS, PARAM, Row
from ..tensors import local
from .read_groups import GroupReader, ReadForTriton, bits, without_params
from .read_rows import COUNTER, SCALE, ReadRows, RowReader
from .step import Exchange, Step
from .unchanged import FastPath


class PythonPlan:
    """Reads rows and groups; steps nothing.

    Args:
        rows: all rows of the optimizer.
        group_count: how many groups there are.
        read: the rows that Triton steps; None: there are none.
        has_direction: whether the rules' step length depends on the norm of a direction.
    """

    def __init__(
        self, rows: Sequence[Row], group_count: int, read: ReadForTriton | None = None, *, has_direction: bool
    ) -> None:
        self._refs: list[list[weakref.ref[Tensor]]] = [[] for _ in range(group_count)]
        for row in rows:
            self._refs[row.group].append(row.param_ref)
        self._has_direction = has_direction
        self._devices = [] if read is None else [list(indices) for indices in read.devices]
        self._row_fields = () if read is None else read.row_fields
        self._group_fields = () if read is None else read.group_fields
        readers: dict[int, RowReader] = {}
        self._groups: dict[int, GroupReader] = {}
        for index in (index for indices in self._devices for index in indices):
            assert read is not None
            row = rows[index]
            readers[index] = RowReader(row, read.rules[row.group])
            if row.group not in self._groups:
                self._groups[row.group] = GroupReader(row.group, local(row.param).device, read)
        self._others = [index for index in range(len(rows)) if index not in readers]
        self._rows = ReadRows(rows, readers)
        self._unwritten = set(range(len(self._devices)))  # devices whose table lacks more than gradients
        self._fast: FastPath | None = None

    def refresh(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> list[tuple[int, str]] | None:
        self.release()
        if len(param_groups) != len(self._refs):
            return None
        for group, refs in zip(param_groups, self._refs):
            params = group.get("params") if isinstance(group, dict) else None
            if not isinstance(params, (list, tuple)) or len(params) != len(refs):
                return None
            if not all(map(is_, params, [ref() for ref in refs])):
                return None
            self._rows.params += params
        for index, reader in self._groups.items():
            if reader.known is not None and reader.known == without_params(param_groups[index]):  # numbers and words
                continue
            changed = reader.read(param_groups[index])
            if changed is None:
                return None
            if changed:
                self._unwritten.update(range(len(self._devices)))
        unready = [(index, "param") for index in self._others if self._rows.params[index].grad is not None]
        if self._fast is not None and self._fast.read(state, self._rows):
            return unready
        self._fast = None
        found = self._rows.read(state)
        if found is None:
            return None
        self._unwritten.update(range(len(self._devices)))
        if not found and self._rows.readers:
            self._fast = FastPath.of(self._rows, state)
        return sorted([*unready, *found])

    def write_table(self, device: int, words: memoryview) -> None:
        """The words of groups and rows that a device's kernels read: the fields of kernels/table.py."""
        indices = self._devices[device]
        group_count, count = len(self._refs), len(indices)
        row_words = words[len(self._group_fields) * group_count :]
        rows = self._rows

        def put(field: str, values: Iterable[int]) -> None:
            place = self._row_fields.index(field)
            row_words[place * count : (place + 1) * count] = array("q", values)

        active = [rows.active[index] for index in indices]
        whole = count == len(rows.rows) and all(active)
        grads = rows.addresses[GRAD]
        put("grad", grads if whole else [grads[index] if rows.active[index] else 0 for index in indices])
        if device not in self._unwritten:
            return
        self._unwritten.discard(device)
        for index, reader in self._groups.items():
            words[index : len(self._group_fields) * group_count : group_count] = array("q", reader.words)
        put("active", map(int, active))
        columns = {"param": PARAM, "master": MASTER, "counter": COUNTER}
        for i in range(MAX_STATES):
            columns |= {f"state{i}": FIRST_STATE + i, f"scale{i}": SCALE + i}
        for field, column in columns.items():
            addresses = rows.addresses[column]
            put(field, [addresses[index] if rows.active[index] else 0 for index in indices])
        readers = [rows.readers[index] for index in indices]
        put("numel", [reader.numel for reader in readers])
        put("lr_scale", [bits(reader.row.lr_scale) for reader in readers])
        put("weight_decay_scale", [bits(reader.row.weight_decay_scale) for reader in readers])
        put("group", [reader.row.group for reader in readers])
        put("clipped", [int(reader.row.clipped) for reader in readers])
        put("has_trust_ratio", [int(reader.row.has_trust_ratio) for reader in readers])
        for field in ("first", "seed", "place"):
            put(field, [getattr(reader.row, field) for reader in readers])
        dtypes = [[of_column[index] for of_column in rows.dtypes] for index in indices]
        storages = [sum(dtype << (8 * column) for column, dtype in enumerate(of_row)) for of_row in dtypes]
        flags = [(reader.row.draws | reader.row.stochastic << 1) << (8 * COLUMNS) for reader in readers]
        put("storages", map(or_, storages, flags))

    def reduce(self, step: Step) -> float:
        return self._exchange(step.exchange)

    def _exchange(self, exchange: Exchange | None) -> float:
        """The sum of squares over the clipped rows of which other processes have parts."""
        if exchange is None:
            return 0.0
        rows = self._rows.rows
        norms = array("d", bytes(8 * NORMS * len(rows)))
        total = exchange(norms)
        return total + sum(norms[NORMS * i + GRAD_SQ] for i, row in enumerate(rows) if row.clipped)

    def non_finite(self) -> bool:
        return False

    def apply(self, step: Step) -> None:
        if self._has_direction:
            self._exchange(step.exchange)

    def release(self) -> None:
        self._rows.release()

    def captured(self) -> bool:
        return False

    def written(self) -> list[Tensor]:
        rows = self._rows
        return [rows.params[index] for index in rows.written] if rows.params else []

    def norms(self) -> list[tuple[int, float, float, float]]:
        return []
