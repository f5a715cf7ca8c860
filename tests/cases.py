"""The table: one row an optimizer, one column a backend. Every property test crosses them.

A new optimizer is one more `Case`, a new backend one more entry in `BACKENDS`; no test names either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue, FusedOptimizer

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
class Case:
    optimizer: type[FusedOptimizer]
    reference: type[torch.optim.Optimizer]
    exact: Callable[..., dict[str, Exact]]
    # Constructor arguments by the name of the variant; each is also an argument of the reference.
    variants: dict[str, dict[str, Any]]
    # Trajectories in tests/golden by the file's stem, with what its hyperparameters do not say, or say in words.
    golden: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad_arguments: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.optimizer.__name__

    def options(self, variant: str) -> dict[str, Any]:
        """The arguments of a variant, with tensors of its own."""
        return {key: _cloned(value) for key, value in self.variants[variant].items()}

    def make(self, params: Any, variant: str = "default", **options: Any) -> FusedOptimizer:
        return self.optimizer(params, **{**self.options(variant), **options})

    def make_reference(self, params: Any, variant: str = "default", **options: Any) -> torch.optim.Optimizer:
        return self.reference(params, **{**self.options(variant), "foreach": False, **options})


def _cloned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_cloned, value))
    return value.clone() if isinstance(value, Tensor) else value


ADAM_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"lr": 3e-2, "weight_decay": 0.3},
    "no decay": {"lr": 1e-2, "weight_decay": 0.0},
    "amsgrad": {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
    "maximize": {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
    "all": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    "zero eps": {"lr": 1e-2, "eps": 0.0},
    "zero betas": {"lr": 1e-2, "betas": (0.0, 0.0)},
    "large eps": {"lr": 1e-2, "eps": 1e-1},
    "tensor lr": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
    "tensor betas": {"betas": (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))},
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

CASES = (
    Case(
        fused_optim.AdamW,
        torch.optim.AdamW,
        exact_adam,
        ADAM_VARIANTS,
        golden={
            "torch_adamw_default_float64": {},
            "torch_adamw_bigeps_float64": {},
            "paddle33_adamw_default_float64": {},
            "paddle33_adamw_clip_global_float64": {"grad_clip": fused_optim.ClipGradByGlobalNorm(1.0)},
            "paddle33_adamw_clip_norm_float32": {"grad_clip": fused_optim.ClipGradByNorm(1.0)},
            "paddle33_adamw_clip_value_float64": {"grad_clip": fused_optim.ClipGradByValue(0.5, -0.25)},
        },
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
    Case(
        fused_optim.AdamWDL,
        torch.optim.AdamW,
        exact_adam,
        ADAM_VARIANTS,
        golden={
            "torch_adamw_default_float64": {},
            "paddle33_adamw_default_float64": {},
            "paddle33_adamw_applydecay_float64": {
                "apply_decay_param_fun": lambda name: not any(word in name for word in ("bias", "norm", "scale"))
            },
            "adamwdl_paddle33_wd01_float64": {"decay_scaling": "double"},
            "adamwdl_paddle33_n_layers2_float64": {"decay_scaling": "double"},
            "adamwdl_paddle33_custom_fn_float64": {
                "decay_scaling": "double",
                "set_param_lr_fun": lambda rate, names, n_layers, param: (
                    rate**0.5 if "weight" in names[param.name] else 1.0
                ),
            },
        },
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
    Case(
        fused_optim.Adam,
        torch.optim.Adam,
        exact_adam,
        {**ADAM_VARIANTS, "decoupled": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}},
        bad_arguments=ADAM_BAD_ARGUMENTS,
    ),
)

# The fused backends and the device that each is tested on; all are held to the witness, "eager". Triton's kernels run
# in its interpreter there, which takes its time: test_triton.py has a selection for every day.
BACKENDS = {"cpu": "cpu", "triton": "cpu"}
BACKEND_MARKS: dict[str, tuple[pytest.MarkDecorator, ...]] = {"triton": (pytest.mark.interpreted, pytest.mark.slow)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_variant = pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, variant, id=f"{case.name}-{variant}") for case in CASES for variant in case.variants],
)
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


DECADES = torch.tensor([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], dtype=torch.float64)


def device_of(backend: str) -> str:
    return BACKENDS.get(backend, "cpu")


def new_params(
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[Sequence[int]] = SHAPES,
    device: str = "cpu",
    seed: int = 7,
) -> list[Parameter]:
    """Parameters that are the same for the same arguments, also across dtypes up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes)
    return [Parameter(value.to(device=device, dtype=dtype)) for value in values]


def new_grad(param: Tensor, step: int, position: int = 0, scale: float = 1.0) -> Tensor:
    """A gradient whose elements span eight decades and hold zeros, the same for the same arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * (step + 1) + position)
    shape = tuple(param.shape)
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    decade = torch.randint(0, 8, shape, generator=generator)
    # A table: torch's pow gives other bits at the ends of the pieces that its threads take.
    powers = torch.tensor([10.0**exponent for exponent in range(-6, 2)], dtype=torch.float64)
    zero = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.05
    value = torch.where(zero, 0.0, value * powers[decade] * scale)
    return value.to(device=param.device, dtype=param.dtype)


def set_grads(params: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
    for position, param in enumerate(params):
        param.grad = new_grad(param, step, position, scale)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
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
