"""Fused optimizers for PyTorch: one plan for all parameter groups, and launches whose number they do not change."""

from .adamw import Adam, AdamW
from .adamwdl import AdamWDL, layerwise_lr_decay
from .clip import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue
from .config import __version__, show_config
from .description import describe
from .grad_scaler import GradScaler
from .lamb import LAMB
from .larc import LARC
from .lars import LARS
from .layers import fan_in_lr_scale, layer_decay
from .lion import Lion
from .norms import Norms
from .novograd import NovoGrad
from .optimizer import FusedOptimizer
from .scales import matrices_only
from .sgd import SGD

__all__ = [
    "LAMB",
    "LARC",
    "LARS",
    "SGD",
    "Adam",
    "AdamW",
    "AdamWDL",
    "ClipGradByGlobalNorm",
    "ClipGradByNorm",
    "ClipGradByValue",
    "FusedOptimizer",
    "GradScaler",
    "Lion",
    "Norms",
    "NovoGrad",
    "__version__",
    "describe",
    "fan_in_lr_scale",
    "layer_decay",
    "layerwise_lr_decay",
    "matrices_only",
    "show_config",
]
