"""Fused optimizers for PyTorch: one plan for all parameter groups, and launches whose number they do not change.

The rooms: optimizers/ has the classes, each with its formula; options/ what all of them take; optimizer.py is the step
that they share. It has plan/ read which memory is to be stepped with which numbers, state/ create and check what a
parameter keeps, and eager/ step what no fused backend takes. backends.py decides who steps; _C is built from csrc/.
"""

from . import earlier_names
from .config import __version__, show_config
from .description import describe
from .grad_scaler import GradScaler
from .norms import Norms
from .optimizer import FusedOptimizer
from .optimizers.adamw import Adam, AdamW
from .optimizers.adamwdl import AdamWDL, layerwise_lr_decay
from .optimizers.lamb import LAMB
from .optimizers.larc import LARC
from .optimizers.lars import LARS
from .optimizers.lion import Lion
from .optimizers.muon import Muon, muon_groups
from .optimizers.novograd import NovoGrad
from .optimizers.sgd import SGD
from .options.clip import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue
from .options.layers import fan_in_lr_scale, layer_decay
from .options.scales import matrices_only

earlier_names.give_to(__name__)

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
    "Muon",
    "Norms",
    "NovoGrad",
    "__version__",
    "describe",
    "fan_in_lr_scale",
    "layer_decay",
    "layerwise_lr_decay",
    "matrices_only",
    "muon_groups",
    "show_config",
]
