"""What is stepped: the shapes of a model's parameters and their param groups, in a file of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

Shape = tuple[int, ...]


class Group(NamedTuple):
    """A param group: factors of the learning rate and of the weight decay, and shapes by name."""

    lr_scale: float
    weight_decay_scale: float
    tensors: dict[str, Shape]


@dataclass(frozen=True)
class Model:
    """The parameters of a model: no weights, no layers."""

    name: str
    groups: tuple[Group, ...]
    source: str = ""

    @property
    def tensors(self) -> int:
        return sum(len(group.tensors) for group in self.groups)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for group in self.groups for shape in group.tensors.values())

    def merged(self) -> Model:
        """All parameters in one group, as if they had one learning rate and one weight decay."""
        tensors = {name: shape for group in self.groups for name, shape in group.tensors.items()}
        return Model(self.name, (Group(1.0, 1.0, tensors),), self.source)

    def twin(self) -> Model:
        """The same groups and numbers of dimensions, with two elements a tensor: what is left is the host's work.

        Not one element: such tensors are checked more closely, and 1,000 of them took the host 260 µs more.
        """
        groups = (
            Group(group.lr_scale, group.weight_decay_scale, {name: small(s) for name, s in group.tensors.items()})
            for group in self.groups
        )
        return Model(self.name, tuple(groups), self.source)


def small(shape: Shape) -> Shape:
    return (1,) * (len(shape) - 1) + (2,) if shape else ()


def grouped(name: str, source: str, tensors: dict[str, tuple[Shape, float, float]]) -> Model:
    """A model whose groups are the pairs of factors that occur."""
    groups: dict[tuple[float, float], dict[str, Shape]] = {}
    for tensor, (shape, lr_scale, weight_decay_scale) in tensors.items():
        groups.setdefault((lr_scale, weight_decay_scale), {})[tensor] = shape
    return Model(name, tuple(Group(*factors, found) for factors, found in groups.items()), source)


Source = nn.Module | Optimizer | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def named_parameters(source: Source) -> list[tuple[str, Tensor]]:
    """Names and parameters of whatever has some; those without names are numbered.

    Raises:
        TypeError: it is no model, no optimizer and no parameters.
    """
    if isinstance(source, nn.Module):
        return list(source.named_parameters())
    found: list[Any] = []
    if isinstance(source, Optimizer):
        for group in source.param_groups:
            found += zip(group["param_names"], group["params"]) if "param_names" in group else group["params"]
    elif isinstance(source, Iterable) and not isinstance(source, (Tensor, str, bytes)):
        found = list(source)
    named = [entry if isinstance(entry, tuple) else (f"{index}", entry) for index, entry in enumerate(found)]
    if not named or not all(len(e) == 2 and isinstance(e[0], str) and isinstance(e[1], Tensor) for e in named):
        got = f"{type(source).__name__}" + ("" if named or not found else f" of {type(found[0]).__name__}")
        raise TypeError(
            "write_shapes takes a model, an optimizer, model.parameters() or model.named_parameters() as its first "
            f"argument, got {got}; parameters that were gone through before are used up"
        )
    return named


def shapes_of(source: Source, optimizer: Optimizer | None = None) -> Model:
    """The shapes of the parameters that need a gradient, in one group or in those of an optimizer.

    Raises:
        TypeError: neither a model, nor an optimizer, nor parameters.
        ValueError: the optimizer has a parameter that the model has not, or there is none to train.
    """
    title = type(source).__name__ if isinstance(source, (nn.Module, Optimizer)) else "parameters"
    names = {param: name for name, param in named_parameters(source) if param.requires_grad}
    if not names:
        raise ValueError(f"model: {title} has no parameter that needs a gradient")
    if isinstance(source, Optimizer) and optimizer is None:
        optimizer = source
    if optimizer is None:
        return Model(title, (Group(1.0, 1.0, {name: tuple(param.shape) for param, name in names.items()}),))
    largest = {
        key: max((float(group.get(key, 0.0)) for group in optimizer.param_groups), default=0.0)
        for key in ("lr", "weight_decay")
    }

    def scale(group: dict[str, Any], key: str) -> float:
        return 1.0 if largest[key] == 0 else float(group.get(key, 0.0)) / largest[key]

    def named(param: Tensor) -> str:
        if param not in names:
            raise ValueError(f"optimizer: a parameter of shape {tuple(param.shape)} is not one that the model trains")
        return names[param]

    trained_alone = isinstance(source, Optimizer)  # whose frozen parameters are left out, as a model's are
    groups = (
        Group(
            scale(group, "lr"),
            scale(group, "weight_decay"),
            {named(param): tuple(param.shape) for param in group["params"] if param.requires_grad or not trained_alone},
        )
        for group in optimizer.param_groups
    )
    return Model(title, tuple(group for group in groups if group.tensors))


def write_shapes(model: Source, path: str | Path, *, optimizer: Optimizer | None = None) -> None:
    """Write the shapes of a model's parameters to a file, for ``python -m fused_optim.bench step --shapes FILE``.

    Args:
        model: a module, which may be on the meta device; an optimizer, whose groups are kept; ``model.parameters()``;
            or ``model.named_parameters()``. Parameters with ``requires_grad`` False are left out.
        path: the file to write.
        optimizer: whose param groups to keep, with their learning rates and weight decays relative to the largest.
            Default None: one group.

    Raises:
        TypeError: ``model`` is of another kind than these.
        ValueError: the model has nothing to train, or the optimizer has parameters that are not the model's.

    Example:
        >>> import torch
        >>> from fused_optim.bench import write_shapes
        >>> write_shapes(torch.nn.Linear(8, 4), "shapes.json")  # doctest: +SKIP
    """
    Path(path).write_text(dump(shapes_of(model, optimizer)))


def dump(model: Model) -> str:
    """The text of a shapes file, a line a tensor."""
    groups = []
    for group in model.groups:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(shape)}" for name, shape in group.tensors.items())
        head = f'"lr_scale": {group.lr_scale!r}, "weight_decay_scale": {group.weight_decay_scale!r}'
        groups.append(f'  {{{head}, "tensors": {{\n{lines}\n  }}}}')
    body = ",\n".join(groups)
    return f'{{"name": {json.dumps(model.name)}, "groups": [\n{body}\n]}}\n'


def read_shapes(path: str | Path) -> Model:
    """A model from a shapes file.

    Raises:
        ValueError: the file cannot be read or is no shapes file; the text says where.
    """
    remedy = "write it with fused_optim.bench.write_shapes(model, path)"
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--shapes {path}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"--shapes {path} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict) or not isinstance(content.get("groups"), list) or not content["groups"]:
        raise ValueError(f"--shapes {path} has no list of groups; {remedy}")
    groups, seen = [], set()
    for index, group in enumerate(content["groups"]):
        place = f"--shapes {path}, groups[{index}]"
        tensors = group.get("tensors") if isinstance(group, dict) else None
        if not isinstance(tensors, dict) or not tensors:
            raise ValueError(f"{place} has no mapping of tensors, as {{'weight': [4, 8]}}; {remedy}")
        factors = [group.get(key, 1.0) for key in ("lr_scale", "weight_decay_scale")]
        if not all(isinstance(f, (int, float)) and math.isfinite(f) and f >= 0 for f in factors):
            raise ValueError(f"{place}: lr_scale and weight_decay_scale are numbers of 0 or more, not {factors}")
        for name, shape in tensors.items():
            if name in seen:
                raise ValueError(f"{place}: {name!r} stands there a second time")
            seen.add(name)
            if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{place}: the shape of {name!r} is a list of sizes of 0 or more, not {shape!r}")
        groups.append(Group(*map(float, factors), {name: tuple(shape) for name, shape in tensors.items()}))
    name = content.get("name")
    return Model(name if isinstance(name, str) and name else Path(path).stem, tuple(groups), str(path))
