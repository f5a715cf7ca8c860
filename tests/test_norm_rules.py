"""Rules with per-tensor norms, and those beside AdamW: golden data, float64, corner cases, what contradicts itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    GOLDEN,
    assert_same_bits,
    device_of,
    each_backend,
    each_implementation,
    new_params,
    snapshot,
    train,
)
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import LAMB, LARC, LARS, SGD, Lion, NovoGrad

Make = Callable[..., torch.optim.Optimizer]


def larc_openseq2seq(params: Any, lr: float, *, backend: str, larc: dict[str, Any], momentum: float = 0.0) -> LARC:
    return LARC(
        SGD(params, lr, momentum, backend=backend),
        larc["larc_eta"],
        larc.get("larc_mode", "clip"),
        variant="openseq2seq",
    )


def larc_apex(params: Any, lr: float, *, backend: str, larc: dict[str, Any], sgd: dict[str, Any]) -> LARC:
    options = {key: value for key, value in sgd.items() if key != "lr"}
    mode = "clip" if larc["clip"] else "scale"
    return LARC(SGD(params, lr, backend=backend, **options), larc["trust_coefficient"], mode, variant="apex")


def novograd(variant: str) -> Make:
    def make(params: Any, lr: float, *, backend: str, **hyper: Any) -> NovoGrad:
        for name in ("larc", "b1", "b2", "beta1", "beta2", "epsilon"):
            value = hyper.pop(name, None)
            if name == "epsilon" and value is not None:
                hyper["eps"] = value
            if name in ("b1", "beta1") and value is not None:
                hyper["betas"] = (value, hyper.pop("beta2", hyper.pop("b2", None)))
        return NovoGrad(params, lr, backend=backend, variant=variant, **hyper)

    return make


def lars(variant: str) -> Make:
    def make(params: Any, lr: float, *, backend: str, **hyper: Any) -> LARS:
        if "trust_coeff" in hyper:
            hyper["trust_coefficient"] = hyper.pop("trust_coeff")
        return LARS(params, lr, backend=backend, variant=variant, **hyper)

    return make


GOLDEN_CASES: dict[str, tuple[Make, float]] = {
    "larc_apex_sgd_clip_float64": (larc_apex, 1e-9),
    "larc_apex_sgd_clip_wd_float64": (larc_apex, 1e-9),
    "larc_apex_sgd_scale_float64": (larc_apex, 1e-9),
    "larc_openseq2seq_momentum_clip_float32": (larc_openseq2seq, 2e-6),
    "larc_openseq2seq_momentum_scale_float32": (larc_openseq2seq, 2e-6),
    "larc_openseq2seq_sgd_clip_float32": (larc_openseq2seq, 2e-6),
    "lars_optax_default_float64": (lars("optax"), 1e-9),
    "lars_timm_lars_float64": (lars("timm"), 1e-9),
    "novograd_apexref_doc_float64": (novograd("timm"), 1e-9),
    "novograd_kozistr_doc_float64": (novograd("kozistr"), 1e-9),
    "novograd_openseq2seq_doc_float32": (novograd("openseq2seq"), 2e-6),
    "novograd_optax_default_float64": (novograd("optax"), 1e-9),
    "novograd_tfa_default_float64": (novograd("tfa"), 3e-6),
    "novograd_timm_doc_float64": (novograd("timm"), 1e-9),
    "novograd_timm_gradavg_float64": (novograd("timm"), 1e-9),
    "lamb_timm_default_float64": (LAMB, 1e-9),
    "lamb_timm_plain_float64": (LAMB, 1e-9),
    "lamb_timm_nodecay_float64": (LAMB, 1e-9),
    "lion_kozistr_default_float64": (Lion, 1e-9),
}
NOT_OURS = ("lr", "learning_rate", "foreach", "weight_decouple")


@each_implementation
@pytest.mark.parametrize("golden", GOLDEN_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_trajectory(golden: str, dtype: torch.dtype, backend: str) -> None:
    make, tolerance = GOLDEN_CASES[golden]
    data = np.load(GOLDEN / f"{golden}.npz")
    hyper = {key: value for key, value in json.loads(str(data["meta"]))["hyper"].items() if key not in NOT_OURS}
    shapes = json.loads(str(data["shapes"]))
    sizes = [math.prod(shape) for shape in shapes]

    def split(flat: np.ndarray) -> list[Tensor]:
        pieces = torch.from_numpy(flat).to(device=device_of(backend), dtype=dtype).split(sizes)
        return [piece.reshape(shape).clone() for piece, shape in zip(pieces, shapes, strict=True)]

    named = [(str(name), Parameter(value)) for name, value in zip(data["names"], split(data["p0"]), strict=True)]
    optimizer = make(named, float(data["lr"][0]), backend=backend, **hyper)
    for lr, grads, expected in zip(data["lr"], data["g"], data["p"], strict=True):
        optimizer.param_groups[0]["lr"] = float(lr)
        for (_, param), grad in zip(named, split(grads), strict=True):
            param.grad = grad
        optimizer.step()
        result = torch.cat([param.detach().flatten() for _, param in named]).cpu().to(torch.float64).numpy()
        error = np.abs(result - expected) / np.maximum(1, np.abs(expected))
        # Float32 has its own error beside that of an oracle whose hyperparameters are float32.
        assert error.max() <= tolerance + (2e-6 if dtype == torch.float32 and tolerance != 2e-6 else 0)


def test_every_golden_file_is_held() -> None:
    prefixes = ("larc", "lars", "novograd", "lamb", "lion")
    files = {path.stem for path in GOLDEN.glob("*.npz") if path.stem.startswith(prefixes)}
    assert files == set(GOLDEN_CASES)


# Backends agree, and both with float64 ----------------------------------------------------------------------------

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = (
    {
        "sgd": lambda p, **o: SGD(p, 0.1, weight_decay=0.1, **o),
        "sgd nesterov": lambda p, **o: SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True, **o),
        "sgd dampening": lambda p, **o: SGD(p, 0.1, 0.9, 0.5, 0.1, maximize=True, **o),
        "lion": lambda p, **o: Lion(p, 1e-2, weight_decay=0.1, **o),
        "lars timm": lambda p, **o: LARS(p, 1.0, weight_decay=0.1, trust_coefficient=0.01, **o),
        "lars clip": lambda p, **o: LARS(p, 0.01, trust_clip=True, always_adapt=True, nesterov=True, **o),
        "lars optax": lambda p, **o: LARS(p, 1.0, weight_decay=0.1, variant="optax", trust_coefficient=0.01, **o),
        "lars kozistr": lambda p, **o: LARS(p, 1.0, weight_decay=0.1, variant="kozistr", trust_coefficient=0.01, **o),
        "larc sgd": lambda p, **o: LARC(SGD(p, 0.1, 0.9, weight_decay=0.1, **o), eta=0.02),
        "larc adamw": lambda p, **o: LARC(
            fused_optim.AdamW(p, 0.01, **o), mode="scale", eta=0.1, variant="openseq2seq"
        ),
        "larc apex": lambda p, **o: LARC(SGD(p, 0.1, 0.9, weight_decay=0.1, **o), variant="apex"),
        "larc apex adamw": lambda p, **o: LARC(fused_optim.AdamW(p, 0.01, weight_decay=0.1, **o), variant="apex"),
        "larc apex novograd": lambda p, **o: LARC(
            NovoGrad(p, 0.01, weight_decay=0.1, **o), variant="apex", mode="scale"
        ),
        "lamb": lambda p, **o: LAMB(p, 0.01, weight_decay=0.1, **o),
        "lamb paper": lambda p, **o: LAMB(p, 0.01, variant="paper", trust_clip=True, bias_correction=False, **o),
    }
    | {
        f"novograd {variant}": lambda p, variant=variant, **o: NovoGrad(p, 0.01, weight_decay=0.1, variant=variant, **o)
        for variant in ("paper", "openseq2seq", "apex", "timm", "kozistr", "optax", "tfa")
    }
    | {
        "novograd amsgrad": lambda p, **o: NovoGrad(p, 0.01, weight_decay=0.1, amsgrad=True, grad_averaging=True, **o),
        "novograd zero": lambda p, **o: NovoGrad(p, 0.01, init_zero=True, **o),
        "novograd apex inside": lambda p, **o: NovoGrad(
            p, 0.01, weight_decay=0.1, variant="apex", reg_inside_moment=True, norm_type=0, **o
        ),
        "novograd kozistr fixed": lambda p, **o: NovoGrad(
            p,
            0.01,
            weight_decay=0.1,
            variant="kozistr",
            weight_decouple=True,
            fixed_decay=True,
            bias_correction=True,
            **o,
        ),
        "novograd timm decoupled": lambda p, **o: NovoGrad(
            p, 0.01, weight_decay=0.1, variant="timm", decoupled_decay=True, maximize=True, **o
        ),
        "novograd optax root": lambda p, **o: NovoGrad(p, 0.01, variant="optax", eps_root=1e-3, **o),
    }
)
SIZES = ((), (0,), (1,), (3, 5), (513,), (64, 65), (300, 500))
each_rule = pytest.mark.parametrize("rule", RULES)


def trained(rule: str, dtype: torch.dtype, backend: str, steps: int = 4, **options: Any) -> list[dict[str, Tensor]]:
    params = new_params(dtype, SIZES, device_of(backend))
    optimizer = RULES[rule](params, backend=backend, **options)
    train(optimizer, params, steps)
    return snapshot(optimizer)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], scale: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        expected = other[name].to(torch.float64)
        size = expected.abs().max() if expected.numel() else 0
        assert torch.allclose(value.to(torch.float64), expected, rtol=scale, atol=float(size) * scale), name


@each_rule
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_backend_agrees_with_the_witness(rule: str, dtype: torch.dtype, backend: str, all_native: None) -> None:
    exact = rule.startswith(("sgd", "lion"))
    scale = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    ours = trained(rule, dtype, backend)
    for one, other in zip(ours, trained(rule, dtype, "eager"), strict=True):
        one, other = ({name: value.cpu() for name, value in state.items()} for state in (one, other))
        if exact:
            for name in other:
                assert_same_bits(one[name], other[name], name)
        else:
            assert_close(one, other, scale)


@each_rule
@each_implementation
def test_float32_follows_float64(rule: str, backend: str) -> None:
    """One step from the same numbers: Lion's sign and a zero's neighbourhood apart, rounding is all that differs."""
    narrow, wide = (trained(rule, dtype, backend, steps=1) for dtype in (torch.float32, torch.float64))
    for one, other in zip(narrow, wide, strict=True):
        assert_close(one, other, 2e-6)


@each_rule
@each_implementation
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(rule: str, backend: str, threads: int) -> None:
    before = torch.get_num_threads()
    expected = trained(rule, torch.float32, backend)
    try:
        torch.set_num_threads(threads)
        for one, other in zip(trained(rule, torch.float32, backend), expected, strict=True):
            for name in other:
                assert_same_bits(one[name], other[name], name)
    finally:
        torch.set_num_threads(before)
