from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class Plan:
    def __init__(
        self,
        *,
        rules: list[str],
        rows: list[tuple[int, Tensor, float, float, bool, bool, str | None, int]],
        defaults: dict[str, Any],
        structural: tuple[str, ...],
        exchange_api: object | None,
        is_plain: Callable[[type], bool],
        describe: Callable[[Tensor], tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]] | None],
    ) -> None: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> Sequence[tuple[int, str]] | None: ...
    def run(
        self,
        grad_scale: float,
        threads: int,
        clip: int = 0,
        clip_norm: float = ...,
        clip_min: float = 0.0,
        clip_max: float = 0.0,
    ) -> None: ...
    def release(self) -> None: ...
    def touched(self) -> list[Tensor]: ...
    def versions(self) -> list[int]: ...
    @property
    def active_elements(self) -> int: ...
    @property
    def grad_norm(self) -> float: ...

def build_info() -> dict[str, str]: ...
def cpu_capability() -> str: ...
def has_openmp() -> bool: ...
