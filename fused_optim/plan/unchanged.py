"""All rows at once, as long as nothing but addresses of gradients has changed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..row import GRAD
from ..tensors import LEAST_ADDRESS, has_memory
from .read_rows import ReadRows

TensorGuards: Any
try:  # torch's own; without it every tensor is looked at by itself
    from torch._C._dynamo import guards

    TensorGuards = guards.TensorGuards
except (ImportError, AttributeError):
    TensorGuards = None


class Kind(NamedTuple):
    """Active rows whose states have the same names."""

    names: tuple[str, ...]
    rows: list[int]


class FastPath:
    """All rows at once, while nothing has changed but addresses.

    torch compares type, dtype, device, shape, strides and pending negations of all tensors with those that were read
    one by one; whatever differs calls for that again.
    """

    def __init__(self, rows: ReadRows, state: dict[Tensor, Any]) -> None:
        readers = rows.readers
        self._readers = list(readers)
        self._pattern = [rows.active[index] for index in readers]
        self._rows = [index for index in readers if rows.active[index]]
        # By identity, which is that of a row's parameter while this one lives.
        self._keys = list(map(id, state))
        places = {key: place for place, key in enumerate(self._keys)}
        self._places = {index: places.get(id(rows.params[index]), -1) for index in self._rows}
        by_names: dict[tuple[str, ...], list[int]] = {}
        for index in self._rows:
            by_names.setdefault(tuple(readers[index].found), []).append(index)
        self._kinds = [Kind(names, indices) for names, indices in by_names.items() if names]
        self._whole = self._rows == list(range(len(rows.rows)))
        params = [rows.params[index] for index in self._rows]
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
    def of(cls, rows: ReadRows, state: dict[Tensor, Any]) -> FastPath | None:
        """None where torch cannot compare, or a row is sharded."""
        if TensorGuards is None or any(reader.sharded for reader in rows.readers.values()) or not any(rows.active):
            return None
        return cls(rows, state)

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

    def read(self, state: dict[Tensor, Any], rows: ReadRows) -> bool:
        """False: read the rows one by one."""
        held = rows.params
        params = held if self._whole else [held[index] for index in self._readers]
        grads = [param.grad for param in params]
        if [grad is not None for grad in grads] != self._pattern:
            return False
        active: list[Any] = grads
        if not all(self._pattern):
            params = [param for param, grad in zip(params, grads) if grad is not None]
            active = [grad for grad in grads if grad is not None]
        tensors = self._tensors(state, params, active)
        if tensors is None or not self._guards.check(*tensors):
            return False
        addresses = [tensor.data_ptr() for tensor in tensors]
        # An address of 0 is memory that was taken away, unless there are no elements. What is written is where it was.
        count = len(self._rows)
        of_grads = addresses[count : 2 * count]
        if min(of_grads) < LEAST_ADDRESS and not all(
            address == 0 or has_memory(grad) for grad, address in zip(active, of_grads)
        ):
            return False
        if addresses.count(0) != self._nowhere or self._written_of(addresses) != self._written:
            return False
        rows.grads = active
        if self._whole:
            rows.addresses[GRAD] = of_grads
        else:
            for index, address in zip(self._rows, of_grads):
                rows.addresses[GRAD][index] = address
        return True
