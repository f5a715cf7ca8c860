"""Factors per parameter: of the learning rate and of the weight decay.

A factor is a column of the plan, so any number of different ones costs no launch and no param group.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor
from torch.nn import Parameter

from ..parameters import ByParameter

Scale = Callable[[str, Tensor], float] | Mapping[Parameter | str, float] | Sequence[float]
Exclude = Callable[[str, Tensor], bool] | Sequence[str]

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.")
# The arguments that take a mapping by Parameter, which needs no names.
BY_PARAMETER = ("lr_scale", "weight_decay_scale")


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, torch.compile, FSDP, activation checkpointing and PEFT put into it."""
    for wrapper in WRAPPERS:
        while name.startswith(wrapper):
            name = name[len(wrapper) :]
        name = name.replace("." + wrapper, ".")
    return name


def excluded(exclude: Exclude | None) -> Scale | None:
    """What is excluded as a column: 0 where a parameter is, otherwise 1.

    Raises:
        TypeError: neither a callable nor a sequence of name patterns.
    """
    if exclude is None:
        return None
    if callable(exclude):
        function = exclude

        def included(name: str, param: Tensor) -> float:
            return 0.0 if function(name, param) else 1.0

        included.__name__ = getattr(exclude, "__name__", "a function")
        included.needs_name = getattr(exclude, "needs_name", True)  # type: ignore[attr-defined]
        return included
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(
            f"exclude must be a callable (name, param) -> bool or a sequence of name patterns, got {exclude!r}"
        )
    return dict.fromkeys(exclude, 0.0)


def matrices_only(name: str, param: Tensor) -> float:
    """1 for tensors of two or more dimensions, 0 for biases and the scales of norms.

    For ``weight_decay_scale=matrices_only``: the usual "no decay for biases and norms".

    Args:
        name: the parameter's name; not looked at, and not asked for: ``model.parameters()`` will do.
        param: the parameter.

    Returns:
        1.0 or 0.0.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = fused_optim.AdamW(
        ...     model.parameters(), weight_decay=0.1, weight_decay_scale=fused_optim.matrices_only)
    """
    return 1.0 if param.ndim >= 2 else 0.0


matrices_only.needs_name = False  # type: ignore[attr-defined]


class ScaleColumn:
    """One factor a parameter, asked for once and then remembered as a number.

    Args:
        argument: the name of the optimizer's argument, for messages.
        scale: a callable ``(name, param) -> float``; a mapping by parameter or by name pattern
            (`fnmatch.fnmatchcase` on the whole name, first match wins, unmatched 1.0); a sequence in the order of the
            parameters; or None for 1.0 everywhere.

    Only the numbers are pickled, and a mapping: a lambda must not make the optimizer unpicklable.
    """

    def __init__(self, argument: str, scale: Scale | None) -> None:
        if scale is not None and not callable(scale) and not isinstance(scale, (Mapping, Sequence)):
            raise TypeError(
                f"{argument} must be a callable (name, param) -> float, a mapping by parameter or name pattern, or a "
                f"sequence of floats, got {type(scale).__name__}"
            )
        self.argument = argument
        self.source: Scale | None = scale
        self.has_patterns = isinstance(scale, Mapping) and any(isinstance(key, str) for key in scale)
        self.values: ByParameter[float] = ByParameter()
        self.lost_source = False

    def __getstate__(self) -> dict[str, Any]:
        keep = self.source is None or isinstance(self.source, Mapping)
        return {
            **self.__dict__,
            "source": self.source if keep else None,
            "lost_source": self.lost_source or not keep,
        }

    def resolve(self, params: Sequence[tuple[str | None, str, Tensor]]) -> None:
        """Ask for the factor of every (name or None, place, parameter); called by the constructor.

        Raises:
            ValueError: a sequence of the wrong length, a pattern that matches nothing, a name that is needed and
                missing, a factor that is negative or not finite.
            TypeError: a factor that is no number.
        """
        if self.source is None:
            return
        if isinstance(self.source, Sequence):
            if len(self.source) != len(params):
                raise ValueError(
                    f"{self.argument} has {len(self.source)} factors, but the optimizer has {len(params)} parameters"
                )
            for (_, place, param), value in zip(params, self.source):
                self.values[param] = self._checked(value, place)
            return
        if isinstance(self.source, Mapping):
            self._check_patterns(self.source, params)
        for name, place, param in params:
            self.values[param] = self._ask(name, place, param)

    def of(self, name: str | None, place: str, param: Tensor) -> float:
        """The factor of a parameter, which is asked for if it came after the constructor."""
        if self.source is None and not self.lost_source:
            return 1.0
        value = self.values.get(param)
        if value is None:
            if self.lost_source or isinstance(self.source, Sequence):
                kind = "function" if self.lost_source else "sequence"
                raise ValueError(
                    f"{place} was added after {self.argument} was resolved, and its {kind} cannot say the factor of a "
                    "new parameter; build a new optimizer, or give a callable or a mapping"
                )
            value = self.values[param] = self._ask(name, place, param)
        return value

    @property
    def asks(self) -> bool:
        """Whether a factor depends on the parameter or its name."""
        return self.source is not None or self.lost_source

    def knows(self, param: Tensor) -> bool:
        """Whether a parameter's factor has been asked for."""
        return not self.asks or self.values.get(param) is not None

    def forget_the_dead(self) -> None:
        self.values.forget_the_dead()

    def __repr__(self) -> str:
        """What was given, in a few words."""
        source = self.source
        if source is None:
            return "the factors that were pickled" if self.lost_source else "1.0"
        if callable(source):
            return getattr(source, "__name__", type(source).__name__).replace("<lambda>", "a function")
        if isinstance(source, Mapping) and self.has_patterns and len(source) <= 4:
            return repr(list(source) if self.argument == "exclude" else dict(source))
        return f"{len(source)} {'entries' if isinstance(source, Mapping) else 'factors'}"

    def _ask(self, name: str | None, place: str, param: Tensor) -> float:
        source = self.source
        if source is None:
            return 1.0
        if isinstance(source, Mapping):
            if not self.has_patterns:  # 3,000 parameters took 214 ms by going through the keys, 6 ms so
                return self._checked(source.get(cast(Parameter, param), 1.0), place)
            for key, value in source.items():
                if key is param or (isinstance(key, str) and fnmatchcase(plain_name(name or ""), key)):
                    return self._checked(value, place)
            return 1.0
        assert callable(source)
        asked = self._needed(name, place) if getattr(source, "needs_name", True) else plain_name(name or "")
        return self._checked(source(asked, param), place)

    def _needed(self, name: str | None, place: str) -> str:
        if name is None:
            by_parameter = ", or a mapping keyed by Parameter" if self.argument in BY_PARAMETER else ""
            raise ValueError(
                f"{self.argument} asks for names, but {place} has none; pass model.named_parameters() instead of "
                f"model.parameters(){by_parameter}; where a framework makes the groups, as Trainer of transformers "
                "does, make the optimizer yourself and hand it over: Trainer(..., optimizers=(optimizer, None))"
            )
        return plain_name(name)

    def _checked(self, value: Any, place: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{self.argument} of {place} must be a number, got {value!r}") from None
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{self.argument} of {place} must be finite and not negative, got {number}")
        return number

    def _check_patterns(
        self, source: Mapping[Parameter | str, float], params: Sequence[tuple[str | None, str, Tensor]]
    ) -> None:
        patterns = [key for key in source if isinstance(key, str)]
        names = [self._needed(name, place) for name, place, _ in params] if patterns else []
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise ValueError(
                    f"{self.argument}: the pattern {pattern!r} matches no parameter; near: {', '.join(near)}"
                )
        known = {id(param) for _, _, param in params}
        if source and not patterns and not any(id(key) in known for key in source):
            raise ValueError(f"{self.argument}: none of its {len(source)} keys is a parameter of this optimizer")


class ScaleProduct(ScaleColumn):
    """The product of several columns, such as a user's ``lr_scale`` times a ratio that the optimizer computes."""

    def __init__(self, *columns: ScaleColumn) -> None:
        super().__init__(" times ".join(column.argument for column in columns), None)
        self.columns = columns

    def resolve(self, params: Sequence[tuple[str | None, str, Tensor]]) -> None:
        for column in self.columns:
            column.resolve(params)
        for name, place, param in params:
            self.of(name, place, param)

    def of(self, name: str | None, place: str, param: Tensor) -> float:
        return self._checked(math.prod(column.of(name, place, param) for column in self.columns), place)

    @property
    def asks(self) -> bool:
        return any(column.asks for column in self.columns)

    def __repr__(self) -> str:
        return " times ".join(f"{column.argument} ({column!r})" for column in self.columns if column.asks)

    def knows(self, param: Tensor) -> bool:
        return all(column.knows(param) for column in self.columns)

    def forget_the_dead(self) -> None:
        for column in self.columns:
            column.forget_the_dead()


def column_of(argument: str, scale: Scale | ScaleColumn | None) -> ScaleColumn:
    """The column of an optimizer's argument; a subclass of the optimizer may have made it already."""
    return scale if isinstance(scale, ScaleColumn) else ScaleColumn(argument, scale)
