"""What the constructor was told beyond hyperparameters: one value, which is pickled with the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..parameters import Place
from ..trust_ratio import TrustRatio
from .clip import NO_CLIP, ClipOptions, GradClip
from .scales import Exclude, Scale, ScaleColumn, column_of, excluded


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

    def forget_all_but(self, params: set[Tensor]) -> None:
        for column in self.columns:
            column.forget_all_but(params)


def no_factors() -> Factors:
    return Factors.of_arguments(None, None, None, None)


@dataclass
class Options:
    """The options of one optimizer."""

    backend: str | None = None  # the one that is forced
    state_dtype: torch.dtype | None = None
    master_weights: str | None = None
    grad_clip: GradClip | None = None
    lazy_mode: bool = False
    trust_ratio: TrustRatio | None = None  # of what is around this optimizer
    factors: Factors = field(default_factory=no_factors)

    @property
    def clip(self) -> ClipOptions:
        return NO_CLIP if self.grad_clip is None else self.grad_clip.options
