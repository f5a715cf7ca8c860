"""The plan in Python: reads what a step needs, without the compiled extension.

It reads again at each step what the compiled plan reads, and says the same of it (``csrc/plan/plan.cpp``), but steps no
row itself. Where nothing has changed but addresses, torch compares the layouts of all tensors in one call.
"""

from __future__ import annotations

import struct
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hyperparameters import is_number, is_sequence, shown
from ..row import (
    BFLOAT16,
    COLUMNS,
    DTYPES,
    FIRST_STATE,
    FLOAT32,
    FLOAT64,
    GRAD,
    GRAD_SQ,
    MASTER,
    MAX_STATES,
    NORMS,
    PARAM,
    REMAINDER,
    SIZES,
    Row,
)
from ..tensors import describe_tensor, is_plain, is_same_order, is_sharded, local, same_placement
from ..trust_ratio import TrustRatio
from .step import Exchange, Step

TensorGuards: Any
try:  # torch's own; without it every tensor is looked at by itself
    from torch._C._dynamo import guards

    TensorGuards = guards.TensorGuards
except (ImportError, AttributeError):
    TensorGuards = None


class Memory(NamedTuple):
    """Where a tensor lies and how."""

    address: int
    device: torch.device
    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def memory_of(tensor: Any) -> Memory | None:
    """None for what is no tensor in plain memory, or of a dtype that no rule computes with."""
    if not (isinstance(tensor, Tensor) and is_plain(type(tensor)) and tensor.dtype in DTYPES):
        return None
    facts = describe_tensor(tensor)
    return facts and Memory(facts[0], tensor.device, DTYPES[tensor.dtype], facts[5], facts[6])


def lies_as(memory: Memory, other: Memory) -> bool:
    """Whether two tensors have the same shape, and their elements in the same order."""
    return memory.shape == other.shape and is_same_order(memory.strides, other.strides, memory.shape)


class RowReader:
    """What a row that Triton steps is expected to be, and how its tensors are read one by one."""

    def __init__(self, row: Row, rule: Any) -> None:
        self.row = row
        self.type = type(row.param)
        self.names = [*(name for name, _ in rule.states), *([row.master] if row.master is not None else ())]
        self.per_tensor = [*(per_tensor for _, per_tensor in rule.states), False]
        memory = memory_of(local(row.param))
        assert memory is not None
        self.memory = memory
        self.numel = local(row.param).numel()
        self.sharded = is_sharded(row.param)
        self.tensor_columns = {FIRST_STATE + i for i, per_tensor in enumerate(self.per_tensor) if per_tensor}
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
        """Why the row cannot be stepped as it is; None: it can, and `out` has the memory of each column."""
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
        if grad.dtype == REMAINDER or (grad.dtype == FLOAT64 and param.dtype != FLOAT64):
            return "grad"
        out[PARAM], out[GRAD] = param, grad
        if not self.names:
            return None
        if not isinstance(states, Mapping):
            return "state"
        for name, per_tensor, column in zip(self.names, self.per_tensor, self.columns):
            value = states.get(name)
            memory = memory_of(value) if per_tensor else self._memory(value)
            if memory is None or not self._takes(memory, per_tensor, column):
                return "state"
            out[column] = memory
        return None

    def _takes(self, memory: Memory, per_tensor: bool, column: int) -> bool:
        """Whether a state is what the kernels read in this column."""
        if memory.device != self.memory.device or (memory.address == 0 and (per_tensor or self.numel)):
            return False
        if per_tensor:
            return all(size == 1 for size in memory.shape) and memory.dtype in (FLOAT32, FLOAT64)
        if not lies_as(memory, self.memory):
            return False
        param, found = self.memory.dtype, memory.dtype
        if column == MASTER:
            return found == FLOAT32 or (found == REMAINDER and param == BFLOAT16)
        # 16-bit parameters may have wider states; others have their own dtype.
        return found not in (FLOAT64, REMAINDER) if SIZES[param] == 2 else found == param

    def _memory(self, tensor: Any) -> Memory | None:
        if not self.sharded:
            return memory_of(tensor)
        if not is_sharded(tensor) or not same_placement(tensor._spec, self.param._spec):  # type: ignore[attr-defined]
            return None
        return memory_of(local(tensor))


class GroupReader:
    """The hyperparameters of one group as the kernels take them.

    Args:
        index: of the group.
        device: where the group's rows are.
        read: how this plan reads.
    """

    def __init__(self, index: int, device: torch.device, read: ReadForTriton) -> None:
        self._index, self._device, self._read = index, device, read
        self._rule = read.rules[index]
        self.known: dict[str, Any] | None = None  # the group as it was read, if no value can change but by another
        self._structural: tuple[bool, ...] | None = None
        self.words: list[int] = []

    def read(self, group: dict[str, Any]) -> bool | None:
        """Whether anything has changed; None: the group calls for a new plan.

        Raises:
            KeyError, TypeError, ValueError: a hyperparameter is missing or is none; the text names group and key.
        """
        truths = tuple(bool(group.get(key)) for key in self._read.structural)
        if self._structural not in (None, truths):
            return None
        self._structural = truths
        self._read.check(self._index, group)
        defaults, trust_ratio = self._read.defaults, self._read.trust_ratio
        numbers: dict[str, float] = {}
        fields: dict[str, int] = {}
        constant = True
        for place, (name, field) in enumerate(zip(self._rule.hyper_type._fields, self._rule.hyper)):
            if field.key not in group and field.key not in defaults:
                if not field.optional:
                    raise KeyError(
                        f"param_groups[{self._index}] has no {field.key!r} and the optimizer no default for it"
                    )
                value: Any = None
            else:
                value = group.get(field.key, defaults.get(field.key))
                constant = constant and is_constant(value)
            numbers[name], address, dtype = self._number(field, value)
            fields |= {
                f"hyper{place}": _bits(numbers[name]),
                f"hyper_address{place}": address,
                f"hyper_dtype{place}": dtype,
            }
        others = (value for key, value in group.items() if key not in ("params", "param_names"))
        constant = constant and all(map(is_constant, others))
        trust = None if trust_ratio is None else trust_ratio(group)
        rule_needs = self._rule.needs(numbers)
        fields["maximize"] = _bits(float(bool(group.get("maximize", False))))
        fields["needs"] = rule_needs | self._read.needs_of(trust, rule_needs)
        if trust is not None:
            fields |= {name: _bits(float(getattr(trust, name))) for name in TrustRatio._fields}
            fields["present"] = _bits(1.0)
        words = [fields.get(name, 0) for name in self._read.group_fields]
        changed = words != self.words
        self.words = words
        self.known = without_params(group) if constant else None
        return changed

    def _number(self, field: Any, value: Any) -> tuple[float, int, int]:
        """A hyperparameter's number, or where its tensor on the device is and its dtype."""
        place = f"param_groups[{self._index}][{field.key!r}]"
        if field.choices:
            if value is None and field.optional:
                return 0.0, 0, 0
            if value not in field.choices:
                words = ", ".join(map(repr, field.choices))
                raise ValueError(f"{place} must be one of {words}, got {shown(value)}")
            return float(field.choices.index(value)), 0, 0
        if value is None and field.optional:
            return 0.0, 0, 0
        item = value
        length = sum(other.key == field.key for other in self._rule.hyper)
        if field.index >= 0 and is_sequence(value) and len(value) == length:
            item = value[field.index]
        elif field.index >= 0:
            item = None
        if not is_number(item):
            raise TypeError(f"{place} must hold numbers or one-element Tensors, got {shown(value)}")
        memory = memory_of(item)
        if memory is not None and memory.device.type != "cpu" and memory.device == self._device:
            return 0.0, memory.address, memory.dtype
        return float(item.detach() if isinstance(item, Tensor) else item), 0, 0


def without_params(group: dict[str, Any]) -> dict[str, Any]:
    """The items of a group but its parameters, which a plan does not keep alive."""
    return {key: value for key, value in group.items() if key != "params"}


def is_constant(value: Any) -> bool:
    """Whether an object cannot change while it is the same."""
    return (
        value is None
        or type(value) in (float, int, str, bool)
        or (type(value) is tuple and all(map(is_constant, value)))
    )


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


@dataclass(slots=True)
class ReadForTriton:
    """The rows that Triton steps, and how they are read."""

    devices: Sequence[Sequence[int]]  # the indices of each device's rows
    rules: Mapping[int, Any]  # of each group that has such rows, its rule as in kernels/rule.py
    needs_of: Callable[..., int]  # the norms of a trust ratio; kernels/rules/trust_ratio.py
    row_fields: Sequence[str]  # of the table; kernels/table.py
    group_fields: Sequence[str]
    defaults: dict[str, Any]  # as the compiled plan's, and
    structural: Sequence[str]  # those that follow
    trust_ratio: Callable[[dict[str, Any]], TrustRatio | None] | None
    check: Callable[[int, dict[str, Any]], None]


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
        self._rows = rows
        self._refs: list[list[weakref.ref[Tensor]]] = [[] for _ in range(group_count)]
        for row in rows:
            self._refs[row.group].append(row.param_ref)
        self._params: list[Tensor] = []  # of all rows, held from refresh() to release(), and
        self._has_direction = has_direction
        self._devices = [] if read is None else [list(indices) for indices in read.devices]
        self._row_fields = () if read is None else read.row_fields
        self._group_fields = () if read is None else read.group_fields
        self._readers: dict[int, RowReader] = {}
        self._groups: dict[int, GroupReader] = {}
        for index in (index for indices in self._devices for index in indices):
            assert read is not None
            row = rows[index]
            self._readers[index] = RowReader(row, read.rules[row.group])
            if row.group not in self._groups:
                self._groups[row.group] = GroupReader(row.group, local(row.param).device, read)
        self._others = [index for index in range(len(rows)) if index not in self._readers]
        self._grads: list[Any] = []  # those of the active ones
        # Of each column, by row: address and dtype; 0 where there is none.
        self._addresses = [[0] * len(rows) for _ in range(COLUMNS)]
        self._dtypes = [[0] * len(rows) for _ in range(COLUMNS)]
        self._active = [False] * len(rows)
        self._written: list[int] = []  # the active rows
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
            self._params += params
        for index, reader in self._groups.items():
            if reader.known is not None and reader.known == without_params(param_groups[index]):  # numbers and words
                continue
            changed = reader.read(param_groups[index])
            if changed is None:
                return None
            if changed:
                self._unwritten.update(range(len(self._devices)))
        attention = [(index, "param") for index in self._others if self._params[index].grad is not None]
        if self._fast is not None and self._fast.read(state, self):
            return attention
        self._fast = None
        found = self._read_rows(state)
        if found is None:
            return None
        if not found and self._readers:
            self._fast = FastPath.of(self, state)
        return sorted([*attention, *found])

    def _read_rows(self, state: dict[Tensor, Any]) -> list[tuple[int, str]] | None:
        """Each row by itself; None: a parameter is no longer what the plan was built for."""
        attention = {}
        written = []  # first and last address, row
        for index, reader in self._readers.items():
            self._active[index] = False
            if reader.param.grad is None:
                continue
            if not reader.is_same():
                return None
            columns: list[Memory | None] = [None] * COLUMNS
            reason = reader.read(state.get(reader.param), columns)
            if reason is not None:
                attention[index] = reason
                continue
            self._active[index] = True
            self._grads.append(reader.param.grad)
            for column, memory in enumerate(columns):
                self._addresses[column][index] = 0 if memory is None else memory.address
                self._dtypes[column][index] = 0 if memory is None else memory.dtype
                if memory is None or column == GRAD or memory.address == 0:
                    continue
                numel = 1 if column in reader.tensor_columns else reader.numel
                if numel:
                    written.append((memory.address, memory.address + numel * SIZES[memory.dtype], index))
        for index in overlapping(written):
            self._active[index] = False
            attention[index] = "overlap"
        self._written = [index for index in self._readers if self._active[index]]
        self._unwritten.update(range(len(self._devices)))
        return list(attention.items())

    def write_table(self, device: int, words: memoryview) -> None:
        """The words of groups and rows that a device's kernels read: the fields of kernels/table.py."""
        indices = self._devices[device]
        group_count, count = len(self._refs), len(indices)
        rows = words[len(self._group_fields) * group_count :]

        def put(field: str, values: Iterable[int]) -> None:
            place = self._row_fields.index(field)
            rows[place * count : (place + 1) * count] = array("q", values)

        active = [self._active[index] for index in indices]
        whole = count == len(self._rows) and all(active)
        grads = self._addresses[GRAD]
        put("grad", grads if whole else [grads[index] if self._active[index] else 0 for index in indices])
        if device not in self._unwritten:
            return
        self._unwritten.discard(device)
        for index, reader in self._groups.items():
            words[index : len(self._group_fields) * group_count : group_count] = array("q", reader.words)
        put("active", map(int, active))
        columns = {"param": PARAM, "master": MASTER} | {f"state{i}": FIRST_STATE + i for i in range(MAX_STATES)}
        for field, column in columns.items():
            addresses = self._addresses[column]
            put(field, [addresses[index] if self._active[index] else 0 for index in indices])
        readers = [self._readers[index] for index in indices]
        put("numel", [reader.numel for reader in readers])
        put("lr_scale", [_bits(reader.row.lr_scale) for reader in readers])
        put("weight_decay_scale", [_bits(reader.row.weight_decay_scale) for reader in readers])
        put("group", [reader.row.group for reader in readers])
        put("clipped", [int(reader.row.clipped) for reader in readers])
        put("has_trust_ratio", [int(reader.row.has_trust_ratio) for reader in readers])
        dtypes = [[of_column[index] for of_column in self._dtypes] for index in indices]
        put("storages", [sum(dtype << (8 * column) for column, dtype in enumerate(of_row)) for of_row in dtypes])

    def reduce(self, step: Step) -> float:
        return self._exchange(step.exchange)

    def _exchange(self, exchange: Exchange | None) -> float:
        """The sum of squares over the clipped rows of which other processes have parts."""
        if exchange is None:
            return 0.0
        norms = array("d", bytes(8 * NORMS * len(self._rows)))
        total = exchange(norms)
        return total + sum(norms[NORMS * i + GRAD_SQ] for i, row in enumerate(self._rows) if row.clipped)

    def non_finite(self) -> bool:
        return False

    def apply(self, step: Step) -> None:
        if self._has_direction:
            self._exchange(step.exchange)

    def release(self) -> None:
        self._params, self._grads = [], []

    def captured(self) -> bool:
        return False

    def written(self) -> list[Tensor]:
        return [self._params[index] for index in self._written] if self._params else []

    def norms(self) -> list[tuple[int, float, float, float]]:
        return []


class Kind(NamedTuple):
    """Active rows whose states have the same names."""

    names: tuple[str, ...]
    rows: list[int]


class FastPath:
    """All rows at once, while nothing has changed but addresses.

    torch compares type, dtype, device, shape, strides and pending negations of all tensors with those that were read
    one by one; whatever differs calls for that again.
    """

    def __init__(self, plan: PythonPlan, state: dict[Tensor, Any]) -> None:
        readers = plan._readers
        self._readers = list(readers)
        self._pattern = [plan._active[index] for index in readers]
        self._rows = [index for index in readers if plan._active[index]]
        # By identity, which is that of a row's parameter while this one lives.
        self._keys = list(map(id, state))
        places = {key: place for place, key in enumerate(self._keys)}
        self._places = {index: places.get(id(plan._params[index]), -1) for index in self._rows}
        by_names: dict[tuple[str, ...], list[int]] = {}
        for index in self._rows:
            by_names.setdefault(tuple(readers[index].names), []).append(index)
        self._kinds = [Kind(names, rows) for names, rows in by_names.items() if names]
        self._whole = self._rows == list(range(len(plan._rows)))
        params = [plan._params[index] for index in self._rows]
        tensors = self._tensors(state, params, [param.grad for param in params])
        assert tensors is not None
        self._guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[
                [
                    None if size == 1 or tensor.numel() == 0 else stride
                    for stride, size in zip(tensor.stride(), tensor.shape)
                ]
                for tensor in tensors
            ],
        )
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._nowhere = addresses.count(0)
        self._written = self._written_of(addresses)

    @classmethod
    def of(cls, plan: PythonPlan, state: dict[Tensor, Any]) -> FastPath | None:
        """None where torch cannot compare, or a row is sharded."""
        if TensorGuards is None or any(reader.sharded for reader in plan._readers.values()) or not any(plan._active):
            return None
        return cls(plan, state)

    def _tensors(self, state: dict[Tensor, Any], params: list[Any], grads: list[Any]) -> list[Any] | None:
        """Params, gradients, and the states kind by kind; None if a state is somewhere else."""
        if len(state) != len(self._keys) or list(map(id, state)) != self._keys:
            return None
        values = list(state.values())
        tensors = [*params, *grads]
        places = self._places
        for kind in self._kinds:
            states = [values[places[index]] for index in kind.rows]
            try:
                for name in kind.names:  # no tuple a row: the garbage collector would count them
                    tensors += [of_row[name] for of_row in states]
            except (KeyError, TypeError):
                return None
        return tensors

    def _written_of(self, addresses: list[int]) -> list[int]:
        count = len(self._rows)
        return addresses[:count] + addresses[2 * count :]

    def read(self, state: dict[Tensor, Any], plan: PythonPlan) -> bool:
        """False: read the rows one by one."""
        held = plan._params
        params = held if self._whole else [held[index] for index in self._readers]
        grads = [param.grad for param in params]
        if [grad is not None for grad in grads] != self._pattern:
            return False
        active = grads
        if not all(self._pattern):
            params = [param for param, grad in zip(params, grads) if grad is not None]
            active = [grad for grad in grads if grad is not None]
        tensors = self._tensors(state, params, active)
        if tensors is None or not self._guards.check(*tensors):
            return False
        addresses = [tensor.data_ptr() for tensor in tensors]
        # An address of 0 is memory that was taken away, unless there are no elements.
        if addresses.count(0) != self._nowhere or self._written_of(addresses) != self._written:
            return False
        plan._grads = active
        count = len(self._rows)
        if self._whole:
            plan._addresses[GRAD] = addresses[count : 2 * count]
        else:
            for index, address in zip(self._rows, addresses[count : 2 * count]):
                plan._addresses[GRAD][index] = address
        return True


def overlapping(ranges: list[tuple[int, int, int]]) -> set[int]:
    """The rows of which two write the same memory; each range: first address, last, row."""
    ranges = sorted(ranges)
    found: set[int] = set()
    widest = 0  # the range that reaches furthest among those before
    for place in range(1, len(ranges)):
        if ranges[place][0] < ranges[widest][1]:
            found |= {ranges[place][2], ranges[widest][2]}
        if ranges[place][1] > ranges[widest][1]:
            widest = place
    return found
