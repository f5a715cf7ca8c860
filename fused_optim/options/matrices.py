"""Which parameters are matrices, and how, where an optimizer makes the directions of matrices orthogonal."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..parameters import Place
from ..rule.hyperparameters import is_number, shown
from ..rule.orthogonal import Matrices
from .scales import ScaleColumn


@dataclass
class MatrixOptions:
    """What an optimizer of matrices was told beyond its hyperparameters and the options that every optimizer has."""

    default: bool | str  # of groups that do not say whether they are matrices: True, False or "auto"
    others: dict[str, Any] = field(default_factory=dict)  # hyperparameters of groups whose parameters are no matrices
    heads: ScaleColumn = field(default_factory=lambda: ScaleColumn("heads", None))
    flatten: bool | None = None
    dtype: torch.dtype | None = None
    resolved: bool = False  # the constructor has asked for the heads of its parameters

    def of(self, place: Place) -> Matrices:
        """How a parameter is matrices.

        Raises:
            ValueError: it is none, or cannot be split into its heads; the text names it.
        """
        name = place.name
        check_matrix(place.param, name)
        shape = tuple(place.param.shape)
        flatten = place.group.get("flatten", self.flatten)
        flatten = len(shape) > 3 if flatten is None else flatten
        batch, rows, columns = 1, shape[0], prod(shape[1:])
        if not flatten and len(shape) > 2:
            batch, rows, columns = prod(shape[:-2]), shape[-2], shape[-1]
        heads = self.heads.of(place.own_name, name, place.param)
        if heads != int(heads) or heads < 1 or rows % int(heads) != 0:
            raise ValueError(
                f"heads of {name} is {heads:g}, into which the {rows} rows of its shape {shape} cannot be split; give "
                "the number of equal parts of dimension 0, as 3 * num_heads for a fused weight of query, key and value"
            )
        return Matrices(batch * int(heads), rows // int(heads), columns)


def checked_are_matrices(value: Any, what: str) -> bool | Literal["auto"]:
    """Whether a group's parameters are matrices, as Python says it: a configuration may have numpy's booleans, or 0
    and 1.

    Raises:
        ValueError: the text says ``what`` must be which.
    """
    if isinstance(value, str) and value == "auto":
        return "auto"
    if is_number(value) and value in (True, False):
        return bool(value)
    raise ValueError(f"{what} must be True, False or 'auto', got {shown(value)}")


def check_flatten(value: Any, what: str) -> None:
    """Refuse another ``flatten`` than those there are.

    Raises:
        ValueError: the text says ``what`` must be which.
    """
    if value is not None and not (is_number(value) and value in (True, False)):
        raise ValueError(f"{what} must be True, False or None, got {shown(value)}")


def check_shape(param: Tensor, name: str) -> None:
    """Refuse a parameter whose shape is not known yet.

    Raises:
        ValueError: the text names it and the remedy.
    """
    if is_lazy(param):
        raise ValueError(
            f"the shape of {name} is not known yet, and so not whether it is a matrix: run one forward pass of its "
            "lazy module before making the optimizer, or give it to a group with use_muon=False"
        )


def is_matrix(param: Tensor, name: str) -> bool:
    """Whether a parameter is a matrix or several: two of its dimensions are larger than 1.

    Raises:
        ValueError: as `check_shape`.
    """
    check_shape(param, name)
    return sum(size > 1 for size in param.shape) >= 2 and not param.is_complex()


def check_matrix(param: Tensor, name: str) -> None:
    """Refuse what cannot be made orthogonal.

    Raises:
        ValueError: a vector or a complex parameter, or one whose shape is not known yet; the text names it and the
            remedy.
    """
    check_shape(param, name)
    if param.ndim < 2:
        raise ValueError(
            f"only parameters of 2 or more dimensions are matrices, and {name} has shape {tuple(param.shape)}; give "
            "it to a group with use_muon=False, or make the optimizer with use_muon='auto'"
        )
    if param.is_complex():
        raise ValueError(
            f"complex matrices are not supported, and {name} has dtype {param.dtype}; give it to a group with "
            "use_muon=False"
        )
