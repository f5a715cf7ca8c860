"""What the constructor was told beyond hyperparameters: one value, which is pickled with the optimizer."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from ..parameters import Place, parameters
from ..rule.trust_ratio import TrustRatio
from .clip import NO_CLIP, ClipOptions, GradClip
from .matrices import MatrixOptions
from .scales import Exclude, Scale, ScaleColumn, column_of, excluded

StateDtype = torch.dtype | str | Mapping[str, torch.dtype | str]
EIGHT_BIT = "8bit"
NARROW = (torch.bfloat16, torch.float16)
ROUNDINGS = ("nearest", "stochastic")


def check_state_dtype(wanted: Any) -> None:
    """Refuse another ``state_dtype`` than those there are.

    Raises:
        ValueError: the text names it.
    """
    for name, dtype in wanted.items() if isinstance(wanted, Mapping) else (("", wanted),):
        if dtype not in (None, torch.float32, *NARROW, EIGHT_BIT):
            of = f" of {name!r}" if isinstance(wanted, Mapping) else ""
            raise ValueError(
                f"state_dtype={dtype!r}{of} is not torch.float32, torch.bfloat16, torch.float16 or '8bit', or a "
                "mapping to those by the names of states"
            )


def checked_seed(seed: Any) -> int:
    """A seed as an int.

    Raises:
        ValueError: no integer of 32 bits.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise ValueError(f"seed={seed!r} is no integer from 0 to 2**32 - 1")
    return number


def check_rounding(rounding: Any) -> None:
    """Refuse another ``rounding`` than those there are.

    Raises:
        ValueError: the text names it.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not 'nearest' or 'stochastic'")


@dataclass
class Factors:
    """Factors per parameter, each asked for once and then remembered."""

    lr: ScaleColumn
    weight_decay: ScaleColumn
    clips: ScaleColumn  # 1 where a parameter takes part in clipping, else 0
    has_trust_ratio: ScaleColumn  # 1 or 0

    @classmethod
    def of_arguments(
        cls,
        lr_scale: Scale | ScaleColumn | None,
        weight_decay_scale: Scale | ScaleColumn | None,
        grad_clip: GradClip | None,
        exclude: Exclude | None,
    ) -> Factors:
        return cls(
            column_of("lr_scale", lr_scale),
            column_of("weight_decay_scale", weight_decay_scale),
            ScaleColumn("need_clip", None if grad_clip is None else grad_clip.need_clip),
            ScaleColumn("exclude", excluded(exclude)),
        )

    @property
    def columns(self) -> tuple[ScaleColumn, ...]:
        return self.lr, self.weight_decay, self.clips, self.has_trust_ratio

    def resolve(self, places: Sequence[Place]) -> None:
        """Ask for the factors of all parameters; see `ScaleColumn.resolve`."""
        named = [place.named for place in places]
        for column in self.columns:
            column.resolve(named)

    def of(self, place: Place) -> tuple[float, float, float, float]:
        """The four factors of one parameter; see `ScaleColumn.of`."""
        named = place.named
        lr, weight_decay, clips, has_trust_ratio = (column.of(*named) for column in self.columns)
        return lr, weight_decay, clips, has_trust_ratio

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse groups whose parameters are no longer those that the factors were asked for.

        Raises:
            RuntimeError: a wrapper has put other parameters into a group, as DeepSpeed's and FSDP1 do, or some were
                taken out without their names; the text names the group.
        """
        asking = [column for column in self.columns if column.asks]
        for column in asking:
            column.forget_the_dead()
        for index, group in enumerate(groups) if asking else ():
            names, params = group.get("param_names"), group["params"]
            if names and len(names) != len(params):
                raise RuntimeError(
                    f"param_groups[{index}] has {len(params)} parameters and {len(names)} names, by which "
                    f"{asking[0].argument} goes: take a parameter out together with its entry of 'param_names', or, if "
                    "a wrapper has put other parameters there, make the optimizer from those"
                )
            for place, column in product(parameters([group]) if not names else (), asking):
                if not column.knows(place.param):
                    name = f"param_groups[{index}]['params'][{place.position}]"
                    raise RuntimeError(
                        f"{name} is not a parameter that {column.argument} was asked for: add parameters by "
                        "add_param_group(), or, if a wrapper has put others there, make the optimizer from those"
                    )


def no_factors() -> Factors:
    return Factors.of_arguments(None, None, None, None)


@dataclass
class Options:
    """The options of one optimizer."""

    backend: str | None = None  # the one that is forced
    state_dtype: StateDtype | None = None
    master_weights: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    grad_clip: GradClip | None = None
    lazy_mode: bool = False
    trust_ratio: TrustRatio | None = None  # of what is around this optimizer
    factors: Factors = field(default_factory=no_factors)
    matrices: MatrixOptions | None = None  # which parameters are matrices, and how

    @classmethod
    def of_arguments(cls, *, state_dtype: Any, rounding: Any, seed: Any, grad_clip: Any, **unchecked: Any) -> Options:
        """The options that the constructor's arguments give, without factors.

        Raises:
            ValueError, TypeError: an argument that is not one of its choices; the text names it.
        """
        check_state_dtype(state_dtype)
        check_rounding(rounding)
        if grad_clip is not None and not isinstance(grad_clip, GradClip):
            raise TypeError(
                f"grad_clip must be ClipGradByGlobalNorm, ClipGradByNorm or ClipGradByValue, got {grad_clip!r}"
            )
        return cls(
            state_dtype=dict(state_dtype) if isinstance(state_dtype, Mapping) else state_dtype,
            rounding=rounding,
            seed=checked_seed(seed),
            grad_clip=grad_clip,
            **unchecked,
        )

    @property
    def clip(self) -> ClipOptions:
        return NO_CLIP if self.grad_clip is None else self.grad_clip.options

    def shown(self) -> list[str]:
        """Every option that is not its default, as ``name: value``; the trust ratio is shown by who has attached it."""
        factors = {"lr_scale": self.factors.lr, "weight_decay_scale": self.factors.weight_decay}
        if self.trust_ratio is None:  # otherwise LARC's
            factors["exclude"] = self.factors.has_trust_ratio
        found = {
            "grad_clip": (self.grad_clip, None),
            "master_weights": (self.master_weights, None),
            "state_dtype": (self.state_dtype, None),
            "rounding": (self.rounding, "nearest"),
            "seed": (self.seed, 0),
            "lazy_mode": (self.lazy_mode, False),
        }
        if self.matrices is not None:
            factors["heads"] = self.matrices.heads
            found |= {"flatten": (self.matrices.flatten, None), "ns_dtype": (self.matrices.dtype, None)}
        shown = [f"{name}: {value}" for name, (value, default) in found.items() if value != default]
        return shown + [f"{name}: {column!r}" for name, column in factors.items() if column.asks]
