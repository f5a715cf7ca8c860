"""Fused optimizers for PyTorch: one plan for all parameter groups, and launches whose number they do not change.

The rooms: optimizers/ has the classes, each with its formula, written in what rule/ has; options/ what all of them
take; optimizer.py is the step that they share. It has plan/ read which memory is to be stepped with which numbers,
state/ create and check what a parameter keeps, and eager/ step what no fused backend takes. backends/ decides who
steps; report/ says what is installed and what an optimizer does; _C is built from csrc/.
"""

from . import earlier_names
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
from .report.config import __version__, show_config
from .report.description import describe

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
