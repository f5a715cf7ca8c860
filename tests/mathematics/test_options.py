"""Factors per parameter, clipping and master weights: the same from every backend, and what they say they are."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from cases import device_of, each_implementation_daily
from torch.nn import Parameter

import fused_optim
from fused_optim import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue
from fused_optim.state import masters

SHAPES = {"bias": (16,), "0.weight": (3, 5), "scale": (), "1.weight": (200, 333), "empty": (0,), "one": (1,)}
LOW = (torch.bfloat16, torch.float16)

CLIPS = {
    "none": None,
    "global": ClipGradByGlobalNorm(1.0),
    "measured": ClipGradByGlobalNorm(math.inf),
    "norm": ClipGradByNorm(2.0),
    "value": ClipGradByValue(0.5),
    "value, excluded": ClipGradByValue(0.5, -0.1, need_clip=lambda name, param: name != "bias"),
    "global, excluded": ClipGradByGlobalNorm(1.0, need_clip=lambda name, param: param.ndim > 1),
}
SCALES: dict[str, dict[str, Any]] = {
    "none": {},
    "patterns": {"lr_scale": {"*.weight": 0.5, "bias": 0.0}, "weight_decay_scale": fused_optim.matrices_only},
    "sequence": {"lr_scale": [1, 0.5, 0.25, 2, 0, 3.0]},
}
MASTERS = [
    (dtype, kind)
    for dtype in (torch.float32, torch.float64, *LOW)
    for kind in (None, "float32", "split")
    if kind != "split" or dtype == torch.bfloat16
]


def named(dtype: torch.dtype = torch.float32) -> list[tuple[str, Parameter]]:
    torch.manual_seed(1)
    return [(name, Parameter(torch.randn(shape).to(dtype))) for name, shape in SHAPES.items()]


def train(dtype: torch.dtype, steps: int = 4, **options: Any) -> tuple[list[Parameter], fused_optim.AdamW]:
    parameters = named(dtype)
    optimizer = fused_optim.AdamW(parameters, weight_decay=0.1, **options)
    torch.manual_seed(7)
    for _ in range(steps):
        for _, param in parameters:
            param.grad = torch.randn_like(param) * 3
        grads = [param.grad.clone() for _, param in parameters if param.grad is not None]
        optimizer.step()
        for (_, param), grad in zip(parameters, grads, strict=True):
            assert param.grad is not None
            assert torch.equal(param.grad, grad), "a gradient was written"
    return [param for _, param in parameters], optimizer


# Every clip beside every scale in every dtype; `maximize` alternates, and so meets each of them.
TOGETHER = [
    pytest.param(clip, scale, dtype, kind, (i + j + k) % 2 == 1, id=f"{clip}-{scale}-{dtype}-{kind}")
    for i, clip in enumerate(CLIPS)
    for j, scale in enumerate(SCALES)
    for k, (dtype, kind) in enumerate(MASTERS)
]


@pytest.mark.parametrize(("clip", "scale", "dtype", "kind", "maximize"), TOGETHER)
def test_backends_agree(clip: str, scale: str, dtype: torch.dtype, kind: str | None, maximize: bool) -> None:
    options = {"grad_clip": CLIPS[clip], "master_weights": kind, "maximize": maximize, **SCALES[scale]}
    params, optimizer = train(dtype, **options)
    expected, witness = train(dtype, backend="eager", **options)
    assert optimizer.backend == "cpu"
    measured = clip in ("global", "norm", "global, excluded")
    for param, other in zip(params, expected, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-13)
        elif measured:  # the coefficient comes from sums in another order; one rounding of it is seen in the result
            epsilon = torch.finfo(dtype).eps
            torch.testing.assert_close(param, other, rtol=4 * epsilon, atol=4 * epsilon)
        else:
            assert torch.equal(param, other)
        if kind is not None and dtype in LOW and not measured:
            key = masters.KEYS[kind]
            assert torch.equal(optimizer.state[param][key], witness.state[other][key])
    if optimizer.last_grad_norm is not None:
        torch.testing.assert_close(optimizer.last_grad_norm, witness.last_grad_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_global_norm_clip_is_torchs(backend: str) -> None:
    params, optimizer = train(torch.float32, backend=backend, grad_clip=ClipGradByGlobalNorm(1.0))
    expected = [param for _, param in named()]
    torch_optimizer = torch.optim.AdamW(expected, weight_decay=0.1, foreach=False)
    torch.manual_seed(7)
    for _ in range(4):
        for param in expected:
            param.grad = torch.randn_like(param) * 3
        norm = torch.nn.utils.clip_grad_norm_(expected, 1.0)
        torch_optimizer.step()
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_split_into_groups_does_not_change_the_clip(backend: str) -> None:
    whole, _ = train(torch.float32, backend=backend, grad_clip=ClipGradByGlobalNorm(0.5))
    parameters = named()
    groups = [{"params": [param]} for _, param in parameters]
    optimizer = fused_optim.AdamW(groups, weight_decay=0.1, backend=backend, grad_clip=ClipGradByGlobalNorm(0.5))
    torch.manual_seed(7)
    for _ in range(4):
        for _, param in parameters:
            param.grad = torch.randn_like(param) * 3
        optimizer.step()
    assert all(torch.equal(param, other) for (_, param), other in zip(parameters, whole, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15, 3e19])
def test_norm_neither_overflows_nor_underflows(size: float, backend: str) -> None:
    param = Parameter(torch.zeros(5000))
    param.grad = torch.full((5000,), size)
    optimizer = fused_optim.AdamW([param], grad_clip=ClipGradByGlobalNorm(math.inf), backend=backend)
    optimizer.step()
    assert optimizer.last_grad_norm is not None
    assert optimizer.last_grad_norm.item() == pytest.approx(size * math.sqrt(5000), rel=1e-6)


@each_implementation_daily
@pytest.mark.parametrize(
    "make", [lambda p, **o: fused_optim.AdamW(p, grad_clip=CLIPS["measured"], **o), fused_optim.LAMB]
)
def test_the_norm_of_no_gradient_is_zero(make: Any, backend: str) -> None:
    """Not that of the step before."""
    params = [Parameter(torch.ones(4, device=device_of(backend))), Parameter(torch.ones(2, device=device_of(backend)))]
    optimizer = make(params, backend=backend)
    for grads, norm in (([2.0, None], 4.0), ([None, None], 0.0), ([None, 0.5], 0.5**0.5), ([None, None], 0.0)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else torch.full_like(param, grad)
        optimizer.step()
        assert optimizer.last_grad_norm is not None
        assert optimizer.last_grad_norm.item() == pytest.approx(norm, rel=1e-7)
        if norm == 0:
            assert optimizer.last_norms is None


def test_nan_spreads_and_infinity_zeroes_as_in_paddle() -> None:
    for bad, finite in ((math.nan, False), (math.inf, True)):
        good, hurt = Parameter(torch.ones(4)), Parameter(torch.ones(4))
        good.grad, hurt.grad = torch.ones(4), torch.tensor([1.0, bad, 1.0, 1.0])
        optimizer = fused_optim.AdamW([good, hurt], grad_clip=ClipGradByGlobalNorm(1.0), weight_decay=0.0)
        optimizer.step()
        assert bool(good.isfinite().all()) is finite
        assert bool(hurt[1].isnan())
        if finite:
            assert torch.equal(good, torch.ones(4))  # a factor of 0


def test_a_parameter_comes_back_to_the_factor_that_a_sequence_gave_it() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = fused_optim.SGD(params, lr=1.0, lr_scale=[0.5, 0.25])
    optimizer.param_groups[0]["params"] = params[:1]
    optimizer.step()
    optimizer.param_groups[0]["params"] = params
    optimizer.step()
    assert [param[0].item() for param in params] == [0.0, 0.75]


def test_resolved_numbers_are_pickled_not_functions() -> None:
    parameters = named()
    clip = ClipGradByNorm(1.0, need_clip=lambda name, param: name != "bias")
    optimizer = fused_optim.AdamW(parameters, lr_scale=lambda name, param: len(name) / 10, grad_clip=clip)
    twin = pickle.loads(pickle.dumps(optimizer))
    params = [param for _, param in parameters]
    twins = twin.param_groups[0]["params"]
    for param, other in zip(params, twins, strict=True):
        param.grad = torch.ones_like(param)
        other.grad = torch.ones_like(other)
    optimizer.step()
    twin.step()
    assert all(torch.equal(param, other) for param, other in zip(params, twins, strict=True))
    with pytest.raises(ValueError, match=r"param_groups\[1\].*lr_scale"):
        twin.add_param_group({"params": [Parameter(torch.ones(1))], "param_names": ["new"]})
    assert len(twin.param_groups) == 1


def test_later_parameters_are_asked_again() -> None:
    optimizer = fused_optim.AdamW(
        named(), lr=1.0, weight_decay=0.0, lr_scale=lambda name, param: float(name[:3] != "new")
    )
    later = Parameter(torch.ones(3))
    later.grad = torch.ones(3)
    optimizer.add_param_group({"params": [later], "param_names": ["new.weight"]})
    optimizer.step()
    assert torch.equal(later, torch.ones(3))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pattern": ({"lr_scale": {"x*": 1.0}}, ValueError, "'x\\*' matches no parameter; near:"),
    "length": ({"lr_scale": [1.0]}, ValueError, "1 factors, but the optimizer has 6 parameters"),
    "negative": ({"lr_scale": lambda name, param: -1}, ValueError, "'bias'.*not negative"),
    "not finite": ({"weight_decay_scale": lambda name, param: math.nan}, ValueError, "'bias'.*finite"),
    "None": ({"lr_scale": lambda name, param: None}, TypeError, "'bias'.*must be a number"),
    "kind": ({"lr_scale": 3}, TypeError, "lr_scale must be a callable"),
    "foreign keys": ({"lr_scale": {Parameter(torch.ones(1)): 1.0}}, ValueError, "none of its 1 keys"),
    "clip": ({"grad_clip": 1.0}, TypeError, "grad_clip must be ClipGradByGlobalNorm"),
    "master": ({"master_weights": "half"}, ValueError, "master_weights='half'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_constructor_refuses(wrong: str) -> None:
    options, error, text = WRONG[wrong]
    with pytest.raises(error, match=text):
        fused_optim.AdamW(named(), **options)


def of_trainer(**options: Any) -> fused_optim.AdamW:
    """Two groups without names, as Trainer makes them from a class and its arguments."""
    params = [param for _, param in named()]
    return fused_optim.AdamW(
        [
            {"params": [param for param in params if param.ndim >= 2], "weight_decay": 0.5},
            {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
        ],
        **options,
    )


def test_matrices_only_asks_for_no_name() -> None:
    optimizer = of_trainer(weight_decay_scale=fused_optim.matrices_only)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2)), Parameter(torch.ones(2, 2))]})
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    factors = [(row.param.ndim >= 2, row.weight_decay_scale) for row in optimizer.plan.rows]
    assert all(factor == (1.0 if matrix else 0.0) for matrix, factor in factors)


def test_matrices_only_as_what_is_clipped_and_excluded_asks_for_no_name() -> None:
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))]
    clip = ClipGradByNorm(1.0, need_clip=fused_optim.matrices_only)
    optimizer = fused_optim.LARC(fused_optim.SGD(params, 0.1, grad_clip=clip), exclude=fused_optim.matrices_only)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    rows = optimizer.optimizer.plan.rows
    assert [row.clipped for row in rows] == [True, False]
    assert [row.has_trust_ratio for row in rows] == [False, True]


@pytest.mark.parametrize("scale", [{"weight": 0.5}, lambda name, param: 1.0])
def test_what_trainers_users_can_do_about_names(scale: Any) -> None:
    remedy = r"or a mapping keyed by Parameter; .*Trainer\(\.\.\., optimizers=\(optimizer, None\)\)"
    with pytest.raises(ValueError, match=remedy):
        of_trainer(lr_scale=scale)
    with pytest.raises(ValueError, match=r"model.parameters\(\); where a framework"):  # which takes no mapping
        of_trainer(grad_clip=ClipGradByNorm(1.0, need_clip=lambda name, param: True))


def test_constructor_refuses_missing_names_and_split_float16() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        fused_optim.AdamW([Parameter(torch.ones(1))], lr_scale=lambda name, param: 1.0)
    with pytest.raises(ValueError, match="master_weights='float32'"):
        fused_optim.AdamW([Parameter(torch.ones(1).half())], master_weights="split")


@pytest.mark.parametrize("make", [ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue])
@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_clip_refuses_a_threshold_that_is_not_positive(make: Any, threshold: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        make(threshold)


@pytest.mark.parametrize(
    "name",
    [
        "module._orig_mod.block._checkpoint_wrapped_module.weight",
        "base_model.model.block.weight",  # PEFT's
        "module.base_model.model._orig_mod.block.weight",
        "_orig_mod.base_model.model.module.block.weight",
    ],
)
def test_wrappers_are_stripped_from_names(name: str) -> None:
    param = Parameter(torch.ones(2))
    optimizer = fused_optim.AdamW([(name, param)], lr=1.0, weight_decay=0.0, lr_scale={"block.weight": 0.0})
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(param, torch.ones(2))


FITTING: dict[str, dict[str, Any]] = {
    "lr_scale": {"lr_scale": {"*.weight": 0.5}},
    "matrices_only": {"weight_decay_scale": fused_optim.matrices_only},
    "need_clip": {"grad_clip": ClipGradByNorm(1.0, need_clip=lambda name, param: "bias" not in name)},
}


def flat_tensor(params: list[Parameter]) -> None:
    params[:] = [Parameter(torch.cat([param.detach().flatten() for param in params]))]


def first_taken_out(params: list[Parameter]) -> None:
    del params[0]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("change", [flat_tensor, first_taken_out])
@pytest.mark.parametrize("option", FITTING)
def test_names_that_fit_no_more_are_refused(option: str, change: Any, backend: str) -> None:
    optimizer = fused_optim.AdamW(named(), backend=backend, **FITTING[option])
    group = optimizer.param_groups[0]
    change(group["params"])
    before = [param.detach().clone() for param in group["params"]]
    for param in group["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] has \d parameters and 6 names"):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(group["params"], before, strict=True))
    if change is first_taken_out:
        del group["param_names"][0]
        optimizer.step()


@pytest.mark.parametrize("option", ["matrices_only", "mapping"])
def test_parameters_that_nobody_was_asked_for_are_refused(option: str) -> None:
    params = [param for _, param in named()]
    options = {"lr_scale": {params[1]: 0.5}} if option == "mapping" else FITTING[option]
    optimizer = fused_optim.AdamW(params, **options)
    flat_tensor(optimizer.param_groups[0]["params"])
    (flat,) = optimizer.param_groups[0]["params"]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] is not a parameter that"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = params[2:]  # those that are left are known
    optimizer.step()


def test_messages_name_nobody_by_anothers_name() -> None:
    optimizer = fused_optim.AdamW(named())
    del optimizer.param_groups[0]["params"][0]
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match=r"SparseAdam instead: param_groups\[0\]\['params'\]\[0\] has"):
        optimizer.step()
