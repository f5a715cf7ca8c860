"""Fused optimizers for PyTorch: one plan, one launch for all parameter groups."""

from .adamw import Adam, AdamW
from .clip import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue
from .config import __version__, show_config
from .optimizer import FusedOptimizer
from .scales import matrices_only

__all__ = [
    "Adam",
    "AdamW",
    "ClipGradByGlobalNorm",
    "ClipGradByNorm",
    "ClipGradByValue",
    "FusedOptimizer",
    "__version__",
    "matrices_only",
    "show_config",
]
