"""The names and signatures that others call."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from support.sources import sources

import fused_optim
from fused_optim.options import texts
from fused_optim.rule.trust_ratio import TrustRatio

OPTIMIZERS = ("Adam", "AdamW", "AdamWDL", "SGD", "NovoGrad", "LARC", "LARS", "LAMB", "Lion", "Muon")
OURS = {
    "backend": None,
    "lr_scale": None,
    "weight_decay_scale": None,
    "grad_clip": None,
    "master_weights": None,
    "state_dtype": None,
    "rounding": "nearest",
    "seed": 0,
}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_signature_is_torchs_and_then_ours(name: str) -> None:
    ours = inspect.signature(getattr(fused_optim, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    facts = [(p.name, p.kind, p.default) for p in ours.values()]
    assert facts[: len(theirs)] == [(p.name, p.kind, p.default) for p in theirs.values()]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    assert facts[len(theirs) :] == [(key, keyword_only, value) for key, value in [("lazy_mode", False), *OURS.items()]]


ADAMWDL = {
    "layerwise_decay": 1.0,
    "n_layers": 12,
    "set_param_lr_fun": fused_optim.layerwise_lr_decay,
    "name_dict": None,
    "apply_decay_param_fun": None,
    "decay_scaling": "scaled",
    "lazy_mode": False,
    "multi_precision": False,
}


def test_signature_of_adamwdl() -> None:
    """AdamW's positional arguments, its own and AdamW's keywords, ours."""
    ours = list(inspect.signature(fused_optim.AdamWDL).parameters.values())
    theirs = list(inspect.signature(torch.optim.AdamW).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:6]] == [(p.name, p.kind, p.default) for p in theirs[:6]]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[6:])
    keywords = ADAMWDL | {p.name: p.default for p in theirs[6:]} | OURS
    assert [(p.name, p.default) for p in ours[6:]] == list(keywords.items())


SIGNATURES = {
    "NovoGrad": "params, lr=0.001, betas=None, eps=None, weight_decay=0, *, variant='paper', grad_averaging=None, "
    "amsgrad=False, bias_correction=None, init_zero=None, norm_type=None, reg_inside_moment=None, "
    "decoupled_decay=None, weight_decouple=None, fixed_decay=None, eps_root=None, maximize=False, capturable=False",
    "LARS": "params, lr=1.0, momentum=0.9, weight_decay=0, *, variant='timm', trust_coefficient=0.001, eps=None, "
    "nesterov=False, dampening=0, trust_clip=False, always_adapt=False, exclude=None, maximize=False, capturable=False",
    "LAMB": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-06, weight_decay=0.01, *, variant='timm', "
    "bias_correction=True, grad_averaging=True, max_grad_norm=1.0, trust_clip=False, always_adapt=False, exclude=None, "
    "maximize=False, capturable=False",
    "Lion": "params, lr=0.0001, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False, capturable=False",
}
LARC = (
    "optimizer, eta=None, mode='clip', *, eps=None, min_update=None, zero_norm=None, weight_decay_in_ratio=None, "
    "exclude=None, variant=None"
)


def written(signature: inspect.Signature) -> str:
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters)).rpartition(" -> ")[0][1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_and_then_ours(name: str) -> None:
    ours = ", ".join(f"{key}={value!r}" for key, value in OURS.items())
    assert written(inspect.signature(getattr(fused_optim, name))) == f"{SIGNATURES[name]}, {ours}"


def test_signature_of_larc() -> None:
    assert written(inspect.signature(fused_optim.LARC)) == LARC


def test_signature_of_sgd() -> None:
    ours = inspect.signature(fused_optim.SGD).parameters
    theirs = inspect.signature(torch.optim.SGD).parameters
    facts = [(p.name, p.kind, p.default) for p in ours.values()]
    assert facts[: len(theirs)] == [(p.name, p.kind, p.default) for p in theirs.values()]
    assert [(name, default) for name, _, default in facts[len(theirs) :]] == [("capturable", False), *OURS.items()]


def test_norms_are_named() -> None:
    assert fused_optim.Norms._fields == ("names", "grad_norm", "param_norm", "trust_ratio")


FUNCTIONS = {
    "describe": "optimizer, *, file=None",
    "show_config": "*, file=None",
    "fan_in_lr_scale": "model",
    "layer_decay": "model, decay_rate, *, n_layers=None, layer_id=None",
    "layerwise_lr_decay": "decay_rate, name_dict, n_layers, param",
    "matrices_only": "name, param",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_of_a_function(name: str) -> None:
    signature = inspect.signature(getattr(fused_optim, name))
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=parameters)).rpartition(" -> ")[0] == f"({FUNCTIONS[name]})"


def test_signature_of_grad_scaler() -> None:
    ours = inspect.signature(fused_optim.GradScaler).parameters
    theirs = inspect.signature(torch.amp.GradScaler).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


CLIPS: dict[str, dict[str, Any]] = {
    "ClipGradByGlobalNorm": {"clip_norm": inspect.Parameter.empty, "need_clip": None},
    "ClipGradByNorm": {"clip_norm": inspect.Parameter.empty, "need_clip": None},
    "ClipGradByValue": {"max": inspect.Parameter.empty, "min": None, "need_clip": None},
}


@pytest.mark.parametrize("name", CLIPS)
def test_signature_of_a_clip(name: str) -> None:
    parameters = inspect.signature(getattr(fused_optim, name)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == CLIPS[name]
    assert parameters["need_clip"].kind is inspect.Parameter.KEYWORD_ONLY


# As protocol 0 spelled them when every module stood in fused_optim/ itself.
EARLIER_CLIP = (
    "ccopy_reg\n_reconstructor\n(cfused_optim.clip\nClipGradByGlobalNorm\nc__builtin__\nobject\nNtR"
    "(dVoptions\ncfused_optim.clip\nClipOptions\n(I1\nF1.0\nF0.0\nF0.0\ntRsVneed_clip\nNsb."
)
EARLIER_CLASSES = {
    **{name: name.lower() for name in ("AdamW", "AdamWDL", "LAMB", "LARC", "LARS", "Lion", "NovoGrad", "SGD")},
    "Adam": "adamw",
    "ClipGradByGlobalNorm": "clip",
    "ClipGradByNorm": "clip",
    "ClipGradByValue": "clip",
}


def test_a_clip_that_was_pickled_before_there_were_folders() -> None:
    clip = pickle.loads(EARLIER_CLIP.encode())
    assert type(clip) is fused_optim.ClipGradByGlobalNorm
    assert clip.options == fused_optim.ClipGradByGlobalNorm(1.0).options


@pytest.mark.parametrize("name", EARLIER_CLASSES)
def test_a_class_is_found_where_earlier_pickles_look_for_it(name: str) -> None:
    assert pickle.loads(f"cfused_optim.{EARLIER_CLASSES[name]}\n{name}\n.".encode()) is getattr(fused_optim, name)


def test_a_trust_ratio_that_was_pickled_in_an_earlier_module() -> None:
    assert pickle.loads(b"cfused_optim.trust_ratio\nTrustRatio\n.") is TrustRatio


def test_what_is_pickled_now_names_the_new_modules() -> None:
    assert b"fused_optim.options.clip" in pickle.dumps(fused_optim.ClipGradByNorm(1.0), 0)


def test_every_public_name_has_a_docstring() -> None:
    for name in fused_optim.__all__:
        value = getattr(fused_optim, name)
        assert isinstance(value, str) or inspect.getdoc(value), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_explained_once(name: str) -> None:
    optimizer = getattr(fused_optim, name)
    docstring = inspect.cleandoc(optimizer.__doc__)
    assert texts.explained(optimizer.__doc__) == set(inspect.signature(optimizer).parameters)
    for text in texts.TEXTS.values():
        assert docstring.count(inspect.cleandoc(text).splitlines()[0]) <= 1


def test_the_text_of_an_option_stands_in_one_place() -> None:
    sources_of = {path: path.read_text() for path in sources("fused_optim", ".py", at_least=50)}
    for names, text in texts.TEXTS.items():
        if names == ("params",):  # the base class explains it, too
            continue
        first = text.strip("\n").splitlines()[0]
        assert [path.name for path, source in sources_of.items() if first in source] == ["texts.py"], names
