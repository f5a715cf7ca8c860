from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

class Plan:
    def __init__(
        self,
        *,
        rules: list[str],
        rows: list[tuple[int, Tensor, float, float, bool, bool, bool, str | None, int]],
        launched: list[list[int]] = ...,
        defaults: dict[str, Any],
        structural: tuple[str, ...],
        exchange_api: object | None,
        kind_of: Callable[[type], int],
        same_placement: Callable[[Any, Any], bool],
        describe: Callable[[Tensor], tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]] | None],
        current_stream: Callable[[int], int] | None = None,
        negative_bit: tuple[int, int, int] | None = None,
        trust_ratio: Callable[[dict[str, Any]], tuple[float, ...] | None] | None = None,
    ) -> None: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> Sequence[tuple[int, str]] | None: ...
    def reduce(
        self,
        grad_scale: float,
        threads: int,
        clip: tuple[int, float, float, float],
        scalars: Sequence[tuple[int, int, int, int, int, int, int]] = (),
        exchange: Callable[[Any], float] | None = None,
        finds_inf: bool = False,
    ) -> float: ...
    def non_finite(self) -> bool: ...
    def run(
        self,
        grad_scale: float,
        threads: int,
        clip: tuple[int, float, float, float],
        global_norm: float | None,
        scalars: Sequence[tuple[int, int, int, int, int, int, int]] = (),
        exchange: Callable[[Any], float] | None = None,
    ) -> None: ...
    def write_table(self, device: int, words: memoryview) -> None: ...
    def captured(self) -> bool: ...
    def touched(self) -> list[Tensor]: ...
    def release(self) -> None: ...
    def norms(self) -> list[tuple[int, float, float, float]]: ...

StateField = tuple[str, bool]  # whether it has one number a tensor
HyperField = tuple[str, int, tuple[str, ...], bool]  # key, element of a pair or -1, choices, optional

def rules() -> dict[str, tuple[tuple[StateField, ...], tuple[HyperField, ...]]]: ...
def build_info() -> dict[str, str]: ...
def cpu_capability() -> str: ...
def has_openmp() -> bool: ...
def why_no_cuda(device: int) -> str: ...
def cuda_launches() -> int: ...
