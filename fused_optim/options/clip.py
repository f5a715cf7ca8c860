"""Gradient clipping inside the step: computed in the reduce phase, applied in the update; `p.grad` is never written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

NeedClip = Callable[[str, Tensor], bool]


# The kinds of clipping, as `Clip` in csrc/prepare.h numbers them.
NONE, GLOBAL_NORM, NORM, VALUE = range(4)


class ClipOptions(NamedTuple):
    """A clip as the plan reads it."""

    kind: int = NONE
    norm: float = math.inf
    min: float = 0.0
    max: float = 0.0

    def coefficient(self, measured: float) -> float:
        """The eager path's factor for gradients of this norm: at most 1; a NaN spreads."""
        if math.isinf(self.norm) or measured <= self.norm:
            return 1.0
        return self.norm / measured


NO_CLIP = ClipOptions()


class GradClip:
    """Base class of the three clipping strategies."""

    def __init__(self, options: ClipOptions, need_clip: NeedClip | None) -> None:
        if need_clip is not None and not callable(need_clip):
            raise TypeError(f"need_clip must be a callable (name, param) -> bool, got {need_clip!r}")
        self.options = options
        self.need_clip = need_clip

    def __getstate__(self) -> dict[str, Any]:
        # The optimizer has asked it already; a lambda must not make the optimizer unpicklable.
        return {**self.__dict__, "need_clip": None}

    def __repr__(self) -> str:
        """As it was made."""
        by_value = self.options.kind == VALUE
        numbers = [self.options.max, self.options.min] if by_value else [self.options.norm]
        need_clip = [] if self.need_clip is None else [f"need_clip={getattr(self.need_clip, '__name__', '...')}"]
        return f"{type(self).__name__}({', '.join([*map(str, numbers), *need_clip])})"


def _threshold(name: str, value: float) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(f"{name}'s clip_norm must be greater than 0, got {value}")
    return number


class ClipGradByGlobalNorm(GradClip):
    r"""Scale all gradients by one factor, so that their global norm is at most ``clip_norm``.

    .. math::
        g \leftarrow g \cdot \frac{c}{\max(G, c)}, \qquad G = \sqrt{\sum_k \lVert g_k \rVert_2^2}

    The sum runs over all groups (Paddle: group by group). There is no epsilon. A NaN in any gradient makes every
    factor NaN; an infinite element makes the factor 0, and itself NaN.

    Args:
        clip_norm: :math:`c > 0`; ``math.inf`` measures the norm and scales nothing.
        need_clip: ``(name, param) -> bool``; where it is False the parameter is neither counted nor scaled.
            Default None: all parameters.

    Raises:
        ValueError: ``clip_norm`` is not greater than 0.
    """

    def __init__(self, clip_norm: float, *, need_clip: NeedClip | None = None) -> None:
        super().__init__(ClipOptions(GLOBAL_NORM, _threshold("ClipGradByGlobalNorm", clip_norm)), need_clip)


class ClipGradByNorm(GradClip):
    r"""Scale each gradient whose own L2 norm exceeds ``clip_norm`` down to it.

    .. math::
        g \leftarrow g \cdot \frac{c}{\lVert g \rVert_2} \quad \text{if } \lVert g \rVert_2 > c

    Args:
        clip_norm: :math:`c > 0`; ``math.inf`` measures the norms and scales nothing.
        need_clip: ``(name, param) -> bool``; where it is False the parameter is not scaled. Default None: all.

    Raises:
        ValueError: ``clip_norm`` is not greater than 0.
    """

    def __init__(self, clip_norm: float, *, need_clip: NeedClip | None = None) -> None:
        super().__init__(ClipOptions(NORM, _threshold("ClipGradByNorm", clip_norm)), need_clip)


class ClipGradByValue(GradClip):
    r"""Clamp each gradient element to ``[min, max]``; NaN stays NaN.

    Args:
        max: the upper bound.
        min: the lower bound; default ``-max``, for which ``max`` must be greater than 0.
        need_clip: ``(name, param) -> bool``; where it is False the parameter is not clamped. Default None: all.

    Raises:
        ValueError: ``min`` is greater than ``max``, or ``max`` is not greater than 0 where it stands alone.
    """

    def __init__(self, max: float, min: float | None = None, *, need_clip: NeedClip | None = None) -> None:
        if min is None and not max > 0:
            raise ValueError(f"ClipGradByValue's max must be greater than 0 when min is not given, got {max}")
        low = -float(max) if min is None else float(min)
        if not low <= max:
            raise ValueError(f"ClipGradByValue's min must not exceed its max, got min={min} and max={max}")
        super().__init__(ClipOptions(VALUE, math.inf, low, float(max)), need_clip)
