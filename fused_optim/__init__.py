"""Fused optimizers for PyTorch: one plan, one launch for all parameter groups."""

from .adamw import Adam, AdamW
from .adamwdl import AdamWDL, layerwise_lr_decay
from .clip import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue
from .config import __version__, show_config
from .description import describe
from .layers import fan_in_lr_scale, layer_decay
from .optimizer import FusedOptimizer
from .scales import matrices_only

__all__ = [
    "Adam",
    "AdamW",
    "AdamWDL",
    "ClipGradByGlobalNorm",
    "ClipGradByNorm",
    "ClipGradByValue",
    "FusedOptimizer",
    "__version__",
    "describe",
    "fan_in_lr_scale",
    "layer_decay",
    "layerwise_lr_decay",
    "matrices_only",
    "show_config",
]
