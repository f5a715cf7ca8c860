"""The table: one row an optimizer, one column a backend. Property tests cross them.

A new optimizer is one more `Case`, a new backend one more entry in `BACKENDS`. A test takes `each_case` for what every
optimizer does, `each_kind` for what the mechanism does (once for each kind of rule), `each_twin` for what torch's class
of the same name does too, `each_adam` for what is Adam's alone, and `each_rule` for the numbers: every variant of every
row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_optim import (
    LAMB,
    LARC,
    LARS,
    SGD,
    Adam,
    AdamW,
    AdamWDL,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    Lion,
    Muon,
    NovoGrad,
)

GOLDEN = Path(__file__).parent / "golden"


# Mathematics ----------------------------------------------------------------------------------------------------
#
# One step of one parameter in extended precision, from the stored state; written from the published formulas and
# sharing nothing with the package. Each result comes with a bound of its rounding error: for each term the number of
# roundings it goes through times its magnitude, in units of the compute type's 2^-24 or 2^-53. (In units of the
# result an error means nothing after cancellation.) `prepared` is the size of a rounding in the per-tensor scalars,
# which are computed in double, in the same units.


@dataclass
class Exact:
    value: np.ndarray
    bound: np.ndarray


def exact_adam(
    param: np.ndarray, grad: np.ndarray, state: dict[str, np.ndarray], group: dict[str, Any], prepared: float
) -> dict[str, Exact]:
    """Adam (Kingma & Ba), AdamW (Loshchilov & Hutter), AMSGrad (Reddi et al.); `state["step"]`: steps before."""
    step = state["step"] + 1
    lr, eps = (np.longdouble(float(group[key])) for key in ("lr", "eps"))
    weight_decay = np.longdouble(float(group["weight_decay"]))
    beta1, beta2 = (np.longdouble(float(beta)) for beta in group["betas"])
    if group["maximize"]:
        grad = -grad
    grad_bound = np.zeros_like(grad)
    decayed, decayed_bound = param, np.zeros_like(param)
    if group["decoupled_weight_decay"]:
        decayed = param * (1 - lr * weight_decay)
        decayed_bound = 2 * np.abs(decayed) + prepared * (1 + lr * weight_decay) * np.abs(param)
    elif weight_decay != 0:
        grad_bound = np.abs(grad) + 3 * np.abs(weight_decay * param)
        grad = grad + weight_decay * param
    first = beta1 * state["exp_avg"] + (1 - beta1) * grad
    first_bound = 3 * np.abs(beta1 * state["exp_avg"]) + (1 - beta1) * (3 * np.abs(grad) + grad_bound)
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2
    second_bound = 3 * beta2 * state["exp_avg_sq"] + (1 - beta2) * (4 * grad**2 + 2 * np.abs(grad) * grad_bound)
    result = {"exp_avg": Exact(first, first_bound), "exp_avg_sq": Exact(second, second_bound)}
    if group["amsgrad"]:
        second_bound = np.where(second >= state["max_exp_avg_sq"], second_bound, 0)
        second = np.maximum(state["max_exp_avg_sq"], second)
        result["max_exp_avg_sq"] = Exact(second, second_bound)
    denom = np.sqrt(second / (1 - beta2**step)) + eps
    # Relative: the root halves its argument's error; then root, bias correction, product and sum round once each.
    relative = np.divide(second_bound, second, out=np.zeros_like(second), where=second != 0) / 2 + 4 + 5 * prepared
    moved = lr / (1 - beta1**step) * first / denom
    moved_bound = lr / (1 - beta1**step) * first_bound / denom + np.abs(moved) * (relative + 3 + 5 * prepared)
    value = decayed - moved
    result["param"] = Exact(value, decayed_bound + moved_bound + np.abs(value))
    return result


# Rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """A trajectory in tests/golden: what makes the optimizer of its hyperparameters, and how near it is followed."""

    make: Callable[..., Any]
    tolerance: float = 1e-9


@dataclass(frozen=True)
class Case:
    optimizer: type[Any]
    # Constructor arguments by the name of the variant. Every row has `default`, `decay` and `all`; LARC's have the
    # optimizer that it is around, with arguments of its own, under `around`.
    variants: dict[str, dict[str, Any]]
    # torch's class with the same arguments and results.
    reference: type[torch.optim.Optimizer] | None = None
    exact: Callable[..., dict[str, Exact]] | None = None
    golden: dict[str, Golden] = field(default_factory=dict)
    bad_arguments: tuple[dict[str, Any], ...] = ()
    # Variants whose results hang on sums over the tensor: of gradients and parameters, and of the rule's own direction.
    # Backends add in other orders, and agree to the bit only where a sum is exact.
    sums: Collection[str] = ()
    directions: Collection[str] = ()

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def options(self, variant: str, device: str = "cpu") -> dict[str, Any]:
        """The arguments of a variant, with tensors of its own."""
        return {key: _cloned(value, device) for key, value in self.variants[variant].items()}

    def make(self, params: Any, variant: str = "default", *, device: str = "cpu", **options: Any) -> Any:
        """The optimizer; `options` go to the one that steps, which for LARC is the one that it is around."""
        arguments = self.options(variant, device)
        if "around" in arguments:
            around, inner_arguments = arguments.pop("around")
            return self.optimizer(around(params, **{**inner_arguments, **options}), **arguments)
        return self.optimizer(params, **{**arguments, **options})

    def make_reference(self, params: Any, variant: str = "default", **options: Any) -> torch.optim.Optimizer:
        assert self.reference is not None
        return self.reference(params, **{**self.options(variant), "foreach": False, **options})


@dataclass(frozen=True)
class Rule:
    """One variant of a row. Called with parameters and options it is the optimizer."""

    case: Case
    variant: str

    def __call__(self, params: Any, **options: Any) -> Any:
        return self.case.make(params, self.variant, **options)

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.variant}"

    @property
    def sums(self) -> bool:
        return self.variant in self.case.sums

    @property
    def directions(self) -> bool:
        return self.variant in self.case.directions


def _cloned(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_cloned(one, device) for one in value)
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


ADAM_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"lr": 3e-2, "weight_decay": 0.3},
    "all": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "amsgrad": {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
}
ADAM_BAD_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"lr": -1.0},
    {"lr": float("nan")},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.tensor([1e-3, 1e-3])},
    {"lr": torch.tensor(1e-3), "foreach": True},
    {"eps": -1e-8},
    {"betas": (1.0, 0.999)},
    {"betas": (-0.1, 0.999)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, 2.0)},
    {"betas": (0.9, torch.tensor(0.999))},
    {"betas": (0, 0.999)},
    {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.999))},
    {"betas": (torch.tensor(0.9), torch.tensor([0.999, 0.999]))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": True},
    {"betas": (0.9,)},
    {"betas": 0.9},
    {"weight_decay": -0.1},
    {"lr": None},
    {"lr": "1e-3"},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"unknown": 1},
)


# Golden trajectories name hyperparameters as their sources do.


def golden_larc_openseq2seq(
    params: Any, lr: float, *, larc: dict[str, Any], momentum: float = 0.0, **options: Any
) -> LARC:
    inner = SGD(params, lr, momentum, **options)
    return LARC(inner, larc["larc_eta"], larc.get("larc_mode", "clip"), variant="openseq2seq")


def golden_larc_apex(params: Any, lr: float, *, larc: dict[str, Any], sgd: dict[str, Any], **options: Any) -> LARC:
    inner = SGD(params, lr, **{key: value for key, value in sgd.items() if key != "lr"}, **options)
    return LARC(inner, larc["trust_coefficient"], "clip" if larc["clip"] else "scale", variant="apex")


def golden_novograd(params: Any, lr: float, *, variant: str, **hyper: Any) -> NovoGrad:
    hyper.pop("larc", None)
    for beta1, beta2 in (("b1", "b2"), ("beta1", "beta2")):
        if beta1 in hyper:
            hyper["betas"] = (hyper.pop(beta1), hyper.pop(beta2))
    for theirs, ours in (("epsilon", "eps"), ("adam_debias", "bias_correction")):
        if theirs in hyper:
            hyper[ours] = hyper.pop(theirs)
    return NovoGrad(params, lr, variant=variant, **hyper)


def golden_lars(params: Any, lr: float, *, variant: str, **hyper: Any) -> LARS:
    if "trust_coeff" in hyper:
        hyper["trust_coefficient"] = hyper.pop("trust_coeff")
    return LARS(params, lr, variant=variant, **hyper)


def golden_lion(params: Any, lr: float, *, weight_decouple: bool, **hyper: Any) -> Lion:
    assert weight_decouple
    return Lion(params, lr, **hyper)


def golden_muon(params: Any, lr: float, **hyper: Any) -> Muon:
    return Muon(params, lr, ns_dtype=torch.float64, **hyper)


SGD_DECAY: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.125}
NOVOGRAD_DECAY: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.125}
NOVOGRAD_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.01},
    "decay": {"lr": 0.1, "weight_decay": 0.125},
    "all": {**NOVOGRAD_DECAY, "amsgrad": True, "grad_averaging": True, "maximize": True},
    **{
        variant: {**NOVOGRAD_DECAY, "variant": variant}
        for variant in ("paper", "openseq2seq", "apex", "timm", "kozistr", "optax", "tfa")
    },
    "zero": {"lr": 0.01, "init_zero": True},
    "largest": {**NOVOGRAD_DECAY, "variant": "apex", "norm_type": 0},
    "largest, inside": {**NOVOGRAD_DECAY, "variant": "apex", "reg_inside_moment": True, "norm_type": 0},
    "kozistr, fixed": {
        **NOVOGRAD_DECAY,
        **{"variant": "kozistr", "weight_decouple": True, "fixed_decay": True, "bias_correction": True},
    },
    "timm, decoupled": {**NOVOGRAD_DECAY, "variant": "timm", "decoupled_decay": True, "maximize": True},
    "optax, root": {"lr": 0.01, "variant": "optax", "eps_root": 1e-3},
}
LARS_DECAY: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.125, "trust_coefficient": 0.01}
LARS_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.1},
    "decay": LARS_DECAY,
    **{variant: {**LARS_DECAY, "variant": variant} for variant in ("optax", "kozistr")},
    "all": {"lr": 0.01, "trust_clip": True, "always_adapt": True, "nesterov": True, "maximize": True},
}
LAMB_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"lr": 0.03, "weight_decay": 0.3},
    "all": {"lr": 0.01, "betas": (0.8, 0.95), "trust_clip": True, "always_adapt": True, "maximize": True},
    "paper": {"lr": 0.01, "variant": "paper", "trust_clip": True, "bias_correction": False},
    "without ratio": {"lr": 0.01, "weight_decay": 0, "bias_correction": False},
    "without clip": {"lr": 0.01, "weight_decay": 0.125, "max_grad_norm": None},
}
LARC_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"around": (SGD, SGD_DECAY)},
    "AdamW": {"around": (AdamW, {"lr": 0.01, "weight_decay": 0.125}), "mode": "scale"},
    "NovoGrad": {"around": (NovoGrad, NOVOGRAD_DECAY)},
    "openseq2seq": {"around": (AdamW, {"lr": 0.01}), "mode": "scale", "eta": 0.125, "variant": "openseq2seq"},
    "apex": {"around": (SGD, SGD_DECAY), "variant": "apex"},
    "apex, AdamW": {"around": (AdamW, {"lr": 0.01, "weight_decay": 0.125}), "variant": "apex"},
    "apex, NovoGrad": {"around": (NovoGrad, NOVOGRAD_DECAY), "mode": "scale", "variant": "apex"},
}

# Every matrix Muon's, in the least dtype in which products in two orders are near.
MUON: dict[str, Any] = {"use_muon": "auto", "ns_dtype": torch.float64}
MUON_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"lr": 0.02, **MUON},
    "decay": {"lr": 0.02, "weight_decay": 0.3, "adamw_lr": 3e-3, **MUON},
    "all": {
        **{"lr": 0.02, "momentum": 0.8, "nesterov": False, "ns_coefficients": "polar_express", "ns_steps": 6},
        **{"adjust_lr_fn": "match_rms_adamw", "adamw_betas": (0.8, 0.95), "maximize": True},
        **MUON,
    },
    "flat": {"lr": 0.02, "adjust_lr_fn": "spectral_mup", "ns_coefficients": "quintic", "flatten": False, **MUON},
}

CASES = (
    Case(
        AdamW,
        {
            **ADAM_VARIANTS,
            "no decay": {"lr": 1e-2, "weight_decay": 0.0},
            "maximize": {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
            "zero eps": {"lr": 1e-2, "eps": 0.0},
            "zero betas": {"lr": 1e-2, "betas": (0.0, 0.0)},
            "large eps": {"lr": 1e-2, "eps": 1e-1},
            "tensor lr": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
            "tensor betas": {
                "betas": (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
            },
        },
        torch.optim.AdamW,
        exact_adam,
        golden={
            "torch_adamw_default_float64": Golden(AdamW),
            "torch_adamw_bigeps_float64": Golden(AdamW),
            "paddle33_adamw_default_float64": Golden(AdamW),
            "paddle33_adamw_clip_global_float64": Golden(partial(AdamW, grad_clip=ClipGradByGlobalNorm(1.0))),
            "paddle33_adamw_clip_norm_float32": Golden(partial(AdamW, grad_clip=ClipGradByNorm(1.0)), 2e-6),
            "paddle33_adamw_clip_value_float64": Golden(partial(AdamW, grad_clip=ClipGradByValue(0.5, -0.25))),
        },
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
    Case(
        AdamWDL,
        ADAM_VARIANTS,
        torch.optim.AdamW,
        exact_adam,
        golden={
            "torch_adamw_default_float64": Golden(AdamWDL),
            "paddle33_adamw_default_float64": Golden(AdamWDL),
            "paddle33_adamw_applydecay_float64": Golden(
                partial(
                    AdamWDL,
                    apply_decay_param_fun=lambda name: not any(word in name for word in ("bias", "norm", "scale")),
                )
            ),
            "adamwdl_paddle33_wd01_float64": Golden(partial(AdamWDL, decay_scaling="double")),
            "adamwdl_paddle33_n_layers2_float64": Golden(partial(AdamWDL, decay_scaling="double")),
            "adamwdl_paddle33_custom_fn_float64": Golden(
                partial(
                    AdamWDL,
                    decay_scaling="double",
                    set_param_lr_fun=lambda rate, names, n_layers, param: (
                        rate**0.5 if "weight" in names[param.name] else 1.0
                    ),
                )
            ),
        },
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
    Case(
        Adam,
        {**ADAM_VARIANTS, "decoupled": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}},
        torch.optim.Adam,
        exact_adam,
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
    Case(
        SGD,
        {
            "default": {"lr": 0.1, "momentum": 0.9},
            "decay": SGD_DECAY,
            "all": {**SGD_DECAY, "dampening": 0.1, "maximize": True},
            "nesterov": {**SGD_DECAY, "nesterov": True},
            "no momentum": {"lr": 0.1, "weight_decay": 0.125},
            "tensor lr": {"lr": torch.tensor(0.05, dtype=torch.float64), "momentum": 0.9},
        },
        torch.optim.SGD,
        bad_arguments=({"lr": -1.0}, {"momentum": -0.5}, {"weight_decay": -0.1}, {"nesterov": True}),
    ),
    Case(
        Lion,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.125},
            "all": {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.125, "maximize": True},
        },
        golden={"lion_kozistr_default_float64": Golden(golden_lion)},
    ),
    Case(
        NovoGrad,
        NOVOGRAD_VARIANTS,
        golden={
            name: Golden(partial(golden_novograd, variant=variant), tolerance)
            for name, variant, tolerance in (
                ("novograd_apexref_doc_float64", "timm", 1e-9),
                ("novograd_kozistr_decoupled_float64", "kozistr", 1e-9),
                ("novograd_kozistr_doc_float64", "kozistr", 1e-9),
                ("novograd_kozistr_fixed_float64", "kozistr", 1e-9),
                ("novograd_openseq2seq_doc_float32", "openseq2seq", 2e-6),
                ("novograd_optax_default_float64", "optax", 1e-9),
                ("novograd_tfa_default_float64", "tfa", 3e-6),
                ("novograd_timm_amsgrad_float64", "timm", 1e-9),
                ("novograd_timm_decoupled_float64", "timm", 1e-9),
                ("novograd_timm_doc_float64", "timm", 1e-9),
                ("novograd_timm_gradavg_float64", "timm", 1e-9),
            )
        },
        sums=NOVOGRAD_VARIANTS.keys(),
    ),
    Case(
        LARS,
        LARS_VARIANTS,
        golden={
            "lars_kozistr_default_float64": Golden(partial(golden_lars, variant="kozistr")),
            "lars_optax_default_float64": Golden(partial(golden_lars, variant="optax")),
            "lars_timm_clip_float64": Golden(partial(golden_lars, variant="timm")),
            "lars_timm_lars_float64": Golden(partial(golden_lars, variant="timm")),
        },
        sums=LARS_VARIANTS.keys(),
    ),
    Case(
        LAMB,
        LAMB_VARIANTS,
        golden={
            "lamb_timm_default_float64": Golden(LAMB),
            "lamb_timm_plain_float64": Golden(LAMB),
            "lamb_timm_nodecay_float64": Golden(LAMB),
        },
        sums=LAMB_VARIANTS.keys(),
        directions=LAMB_VARIANTS.keys() - {"without ratio"},
    ),
    Case(
        Muon,
        MUON_VARIANTS,
        golden={
            "torch_muon_default_float64": Golden(golden_muon),
            "torch_muon_all_float64": Golden(golden_muon),
            # Theirs add eps to the norm, torch divides by eps at least.
            "kellerjordan_muon_float64": Golden(golden_muon, 2e-8),
            "kellerjordan_muon_aux_float64": Golden(partial(golden_muon, use_muon="auto"), 2e-8),
            "dion_muon_flatten_float64": Golden(golden_muon),
            "dion_muon_polar_express_float64": Golden(golden_muon),
        },
        sums=MUON_VARIANTS.keys(),
        directions=MUON_VARIANTS.keys(),
    ),
    Case(
        LARC,
        LARC_VARIANTS,
        golden={
            "larc_apex_sgd_clip_float64": Golden(golden_larc_apex),
            "larc_apex_sgd_clip_wd_float64": Golden(golden_larc_apex),
            "larc_apex_sgd_scale_float64": Golden(golden_larc_apex),
            "larc_openseq2seq_momentum_clip_float32": Golden(golden_larc_openseq2seq, 2e-6),
            "larc_openseq2seq_momentum_scale_float32": Golden(golden_larc_openseq2seq, 2e-6),
            "larc_openseq2seq_sgd_clip_float32": Golden(golden_larc_openseq2seq, 2e-6),
        },
        sums=LARC_VARIANTS.keys(),
    ),
)
ROWS = {case.name: case for case in CASES}
RULES = {rule.name: rule for case in CASES for rule in (Rule(case, variant) for variant in case.variants)}
# An update of each element; with other columns; with a sum before it; with sums before it and within it.
KINDS = tuple(ROWS[name] for name in ("AdamW", "SGD", "NovoGrad", "LAMB"))
OF_EACH_KIND = (*(f"{case.name} all" for case in KINDS), "Lion decay", "LARC default", "LARS optax")

# Columns --------------------------------------------------------------------------------------------------------

# The fused backends and the device that each is tested on; all are held to the witness, "eager". Triton's kernels run
# in its interpreter there, which takes its time: test_phases.py has a selection for every day.
BACKENDS = {"cpu": "cpu", "triton": "cpu"}
BACKEND_MARKS: dict[str, tuple[pytest.MarkDecorator, ...]] = {"triton": (pytest.mark.interpreted, pytest.mark.slow)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


def each_variant_of(cases: Iterable[Case]) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(case, variant, id=f"{case.name}-{variant}") for case in cases for variant in case.variants
    ]
    return pytest.mark.parametrize(("case", "variant"), parameters)


ADAMS = tuple(case for case in CASES if case.exact is exact_adam)
each_case = each(case for case in CASES if case.optimizer is not LARC)  # which is around one of them
each_kind = each(KINDS)
each_twin = each(case for case in CASES if case.reference is not None)
each_adam = each(ADAMS)
each_adamw = each([ROWS["AdamW"]])  # for what takes variants that it alone has
each_adam_variant = each_variant_of(ADAMS)
each_rule = pytest.mark.parametrize("rule", RULES)
each_backend = pytest.mark.parametrize("backend", [pytest.param(b, marks=BACKEND_MARKS.get(b, ())) for b in BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# The witness is a backend too: what holds for every implementation holds for it.
each_implementation = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=BACKEND_MARKS.get(b, ())) for b in (*BACKENDS, "eager")]
)
# Those of every day, for what each backend must be held to.
each_implementation_daily = pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton", marks=pytest.mark.interpreted), "eager"]
)


def spelled(value: Any) -> str:
    """An id for a value whose own text may hold an address, which is another one in each process."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={spelled(one)}" for key, one in value.items())
    clips = (ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue)
    return type(value).__name__ if isinstance(value, clips) else str(value)


# Parameters and gradients ---------------------------------------------------------------------------------------

# Empty, one element in several forms, less and more than a SIMD register, a tile of 1,024 and more, two dimensions.
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (1, 1), (3,), (7, 5), (1024,), (3, 1031), (2, 3, 3, 3), (64, 64))


def device_of(backend: str) -> str:
    return BACKENDS.get(backend, "cpu")


# Of a test's time more than half went into making the same random numbers again. Elements of a tensor that is
# remembered, and of all parameters of an optimizer: 2 MB each at most.
REMEMBERED = 250_000


def remembers(numel: int) -> bool:
    """Whether numbers are remembered: not under a mode that changes what torch makes, as FakeTensorMode does."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return numel <= REMEMBERED and not modes and not torch.is_inference_mode_enabled()


def new_params(
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[Sequence[int]] = SHAPES,
    device: str = "cpu",
    seed: int = 7,
) -> list[Parameter]:
    """Parameters that are the same for the same arguments, also across dtypes up to rounding."""
    shapes = tuple(map(tuple, shapes))
    make = remembered_numbers if remembers(sum(map(math.prod, shapes))) else made_numbers
    return [Parameter(value.to(device=device, dtype=dtype, copy=True)) for value in make(shapes, seed)]


def made_numbers(shapes: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def new_grad(param: Tensor, step: int, position: int = 0, scale: float = 1.0) -> Tensor:
    """A gradient whose elements span eight decades and hold zeros, the same for the same arguments."""
    make = remembered_grad if remembers(param.numel()) else made_grad
    return make(tuple(param.shape), step, position, scale).to(device=param.device, dtype=param.dtype, copy=True)


def made_grad(shape: tuple[int, ...], step: int, position: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + position)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    decade = torch.randint(0, 8, shape, generator=generator)
    # A table: torch's pow gives other bits at the ends of the pieces that its threads take.
    powers = torch.tensor([10.0**exponent for exponent in range(-6, 2)], dtype=torch.float64)
    zero = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.05
    return torch.where(zero, 0.0, value * powers[decade] * scale)


remembered_numbers = lru_cache(maxsize=32)(made_numbers)
remembered_grad = lru_cache(maxsize=256)(made_grad)


def set_grads(params: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
    for position, param in enumerate(params):
        param.grad = new_grad(param, step, position, scale)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def eighths(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers whose squares add up exactly, in whatever order."""
    make = remembered_eighths if remembers(math.prod(shape)) else made_eighths
    return make(shape, seed).to(dtype, copy=True)


def made_eighths(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, shape, generator=generator) / 8


remembered_eighths = lru_cache(maxsize=256)(made_eighths)


def inner(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LARC) else optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_exactly(optimizer: Any, seed: int = 100) -> None:
    for i, param in enumerate(params_of(optimizer)):
        param.grad = eighths(tuple(param.shape), param.dtype, seed + i).to(param.device)
    optimizer.step()


# Comparison -----------------------------------------------------------------------------------------------------

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as integers, so that -0.0 differs from 0.0. Every NaN is the same."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    tensor = tensor.resolve_neg().clone(memory_format=torch.contiguous_format)
    if tensor.is_floating_point():
        tensor[tensor.isnan()] = torch.nan
    return tensor.view(_INTEGERS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def assert_same_bits(one: Tensor, other: Tensor, what: str = "tensor") -> None:
    assert one.dtype == other.dtype, f"{what}: {one.dtype} and {other.dtype}"
    assert one.shape == other.shape, f"{what}: {tuple(one.shape)} and {tuple(other.shape)}"
    if not torch.equal(bits(one), bits(other)):
        differ = bits(one) != bits(other)
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {one.numel()} elements differ, as {one.detach().flatten()[:4]} and "
            f"{other.detach().flatten()[:4]} (the first four)"
        )


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Copies of every parameter and its state."""
    return [
        {"param": param.detach().clone()}
        | {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(param, {}).items()
        }
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def assert_same_snapshots(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert mine.keys() == theirs.keys(), f"parameter {index}: {sorted(mine)} and {sorted(theirs)}"
        for key, value in mine.items():
            if isinstance(value, Tensor):
                assert_same_bits(value, theirs[key], f"{key} of parameter {index}")
            else:
                assert value == theirs[key]


def assert_same_results(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Every parameter, state and step count of two optimizers is the same, bit for bit."""
    assert_same_snapshots(snapshot(one), snapshot(other))


def assert_near(ours: Any, twin: Any) -> None:
    """As near as sums of squares in two orders bring them."""
    for mine, theirs in zip(snapshot(inner(ours)), snapshot(inner(twin)), strict=True):
        if "param_remainder" in mine:  # bits of one number that only together are near
            for one in (mine, theirs):
                upper = one["param"].view(torch.int16).to(torch.int32) << 16
                one["param"] = (upper + one.pop("param_remainder")).view(torch.float32)
        for key, value in mine.items():
            torch.testing.assert_close(
                value.cpu(), theirs[key].cpu(), equal_nan=True, msg=lambda text, key=key: f"{key}: {text}"
            )
