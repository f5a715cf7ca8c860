"""Fused optimizers for PyTorch: one plan, one launch for all parameter groups."""

from .adamw import Adam, AdamW
from .config import __version__, show_config
from .optimizer import FusedOptimizer

__all__ = ["Adam", "AdamW", "FusedOptimizer", "__version__", "show_config"]
