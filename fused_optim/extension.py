"""The compiled extension, or the reason why there is none."""

from __future__ import annotations

from types import ModuleType

_C: ModuleType | None
missing: str | None

try:
    from . import _C

    missing = None
except ImportError as error:
    _C = None
    missing = (
        "the compiled extension fused_optim._C is not installed (no C++ compiler was found when the package "
        f"was built, or the source tree is imported without being built): {error}"
    )
