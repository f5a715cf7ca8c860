"""What cannot be served: a clear error that names the parameter and the remedy, before anything has changed; or the
witness, with one log line."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    Case,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    device_of,
    each_adamw,
    each_backend,
    each_implementation,
    each_implementation_daily,
    each_kind,
    new_grad,
    new_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import fused_optim

FEW = [(5,), (3, 4), (6,)]
PLACE = r"param_groups\[0\]\['params'\]\[1\]"

# Wrong input ----------------------------------------------------------------------------------------------------
#
# Each makes the second of three parameters, or its state, unusable.


def _sparse(optimizer: Any, param: Any) -> None:
    param.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 4), (3, 4))


def _csr(optimizer: Any, param: Any) -> None:
    param.__class__ = Compressed


class Elsewhere(Parameter):
    """A parameter whose gradient is on another device, which torch's own setter would not accept."""

    grad = property(lambda self: torch.ones(self.shape, device="meta"), lambda self, value: None)  # type: ignore[assignment]


class Compressed(Parameter):
    """A parameter with a gradient of another sparse layout, which torch's own setter would not accept."""

    grad = property(lambda self: torch.ones(self.shape).to_sparse_csr(), lambda self, value: None)  # type: ignore[assignment]


def _meta_grad(optimizer: Any, param: Any) -> None:
    param.__class__ = Elsewhere


def _other_shape(optimizer: Any, param: Any) -> None:
    param.grad = torch.ones(3, 4)
    param.data = torch.ones(4, 3)
    optimizer.state.pop(param, None)


def _fewer_elements(optimizer: Any, param: Any) -> None:
    param.grad = torch.ones(3, 4)
    param.data = torch.ones(2, 2)
    optimizer.state.pop(param, None)


def _integer_param(optimizer: Any, param: Any) -> None:
    param.grad = None
    param.requires_grad_(False)
    param.data = torch.ones(3, 4, dtype=torch.int64)
    param.grad = torch.ones(3, 4, dtype=torch.int64)
    optimizer.state.pop(param, None)


def _integer_grad(optimizer: Any, param: Any) -> None:
    param.grad_dtype = None
    param.grad = torch.ones(3, 4, dtype=torch.int32)


def _complex_grad(optimizer: Any, param: Any) -> None:
    param.grad_dtype = None
    param.grad = torch.ones(3, 4, dtype=torch.complex64)


def _state_shape(optimizer: Any, param: Any) -> None:
    optimizer.state[param]["exp_avg"] = torch.zeros(4, 3)


def _state_missing(optimizer: Any, param: Any) -> None:
    del optimizer.state[param]["exp_avg_sq"]


def _state_none(optimizer: Any, param: Any) -> None:
    optimizer.state[param]["exp_avg"] = None


def _step_missing(optimizer: Any, param: Any) -> None:
    del optimizer.state[param]["step"]


def _step_of_two(optimizer: Any, param: Any) -> None:
    optimizer.state[param]["step"] = torch.zeros(2)


def _step_text(optimizer: Any, param: Any) -> None:
    optimizer.state[param]["step"] = "three"


def _stale_shape(optimizer: Any, param: Any) -> None:
    """The parameter was replaced by one of another shape, the state forgotten."""
    param.grad = None
    param.data = torch.ones(2, 5)
    param.grad = torch.ones(2, 5)


WRONG: dict[str, tuple[Callable[[Any, Any], None], str, str]] = {
    # how, what the text names, the remedy that it gives
    "sparse gradient": (_sparse, "sparse", "SparseAdam"),
    "CSR gradient": (_csr, "sparse", "SparseAdam"),
    "gradient on another device": (_meta_grad, "meta", "move"),
    "gradient of another shape": (_other_shape, r"\(3, 4\).*\(4, 3\)", r"zero_grad\(\)"),
    "gradient of more elements": (_fewer_elements, r"\(3, 4\).*\(2, 2\)", r"zero_grad\(\)"),
    "integer parameter": (_integer_param, "torch.int64", "floating"),
    "integer gradient": (_integer_grad, "torch.int32", "floating"),
    "complex gradient": (_complex_grad, "complex", "real"),
    "state of another shape": (_state_shape, r"'exp_avg'.*\(3, 4\).*\(4, 3\)", r"delete optimizer.state\[param\]"),
    "state missing": (_state_missing, "'exp_avg_sq'", r"delete optimizer.state\[param\]"),
    "state None": (_state_none, "'exp_avg'.*None", r"delete optimizer.state\[param\]"),
    "step missing": (_step_missing, "'step'", r"delete optimizer.state\[param\]"),
    "step of two": (_step_of_two, "'step'", r"delete optimizer.state\[param\]"),
    "step a text": (_step_text, "'step'.*three", r"delete optimizer.state\[param\]"),
    "stale state": (_stale_shape, r"\(2, 5\).*\(3, 4\)", r"delete optimizer.state\[param\]"),
}


def deep_snapshot(optimizer: Any) -> list[Any]:
    """Copies of everything, also of what is no plain tensor, as the objects' identities and bits."""
    entries: list[Any] = []
    for group in optimizer.param_groups:
        entries.append({key: value for key, value in group.items() if key != "params"})
        for param in group["params"]:
            grad = param.grad
            state = optimizer.state.get(param, {})
            entries.append(
                (
                    param.detach().clone(),
                    param._version,
                    id(grad) if type(param) is Parameter else None,
                    {key: (id(value), copy.deepcopy(value)) for key, value in state.items()},
                )
            )
    return entries


def assert_unchanged(optimizer: Any, before: list[Any]) -> None:
    for old, new in zip(before, deep_snapshot(optimizer), strict=True):
        if isinstance(old, dict):
            assert old == new
            continue
        assert_same_bits(old[0], new[0], "parameter")
        assert old[1:3] == new[1:3]
        assert old[3].keys() == new[3].keys()
        for key, (identity, value) in old[3].items():
            assert new[3][key][0] == identity, f"state {key!r} was replaced"
            if isinstance(value, Tensor):
                assert_same_bits(value, new[3][key][1], key)
            else:
                assert value == new[3][key][1]


@pytest.mark.filterwarnings("ignore:Sparse")
@each_implementation
@each_adamw
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("steps", [0, 2])
def test_wrong_input_is_refused_before_anything_changes(case: Case, wrong: str, steps: int, backend: str) -> None:
    spoil, names, remedy = WRONG[wrong]
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, "decay", backend=backend)
    train(optimizer, params, max(steps, 1))
    if steps == 0:
        # The others have no state yet either: creating it would be a change.
        optimizer.state = type(optimizer.state)(dict, {params[1]: optimizer.state[params[1]]})
    set_grads(params, 9)
    spoil(optimizer, params[1])
    before = deep_snapshot(optimizer)
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            optimizer.step()
        text = str(caught.value)
        for part in (PLACE, names, remedy):
            assert re.search(part, text, re.DOTALL), f"{part!r} is not in: {text}"
        assert_unchanged(optimizer, before)


@each_implementation
@each_kind
def test_refusal_uses_the_name_of_named_parameters(case: Case, backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = case.make(model.named_parameters(), backend=backend)
    model.bias.grad = torch.ones(2)
    model.bias.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="'bias'"):
        optimizer.step()


@each_implementation
@each_kind
def test_optimizer_works_on_after_a_refusal(case: Case, backend: str) -> None:
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    optimizer, twin = (case.make(each, "decay", backend=backend) for each in (params, twins))
    train(optimizer, params, 2)
    train(twin, twins, 2)
    set_grads(params, 9)
    params[1].grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    train(optimizer, params, 2, first=2)
    train(twin, twins, 2, first=2)
    assert_same_results(optimizer, twin)


BAD_VALUES: dict[str, tuple[str, Any]] = {
    "lr None": ("lr", None),
    "lr text": ("lr", "fast"),
    "lr of two": ("lr", torch.tensor([0.1, 0.2])),
    "lr a number in quotes": ("lr", "0.1"),
    "betas of one": ("betas", (0.9,)),
    "betas of three": ("betas", (0.9, 0.99, 0.999)),
    "betas None": ("betas", None),
    "betas a number": ("betas", 0.9),
    "eps None": ("eps", None),
    "weight_decay text": ("weight_decay", "much"),
}


@each_implementation
@each_adamw
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_hyperparameter_that_cannot_be_used_changes_nothing(case: Case, bad: str, backend: str) -> None:
    key, value = BAD_VALUES[bad]
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], "decay", backend=backend)
    train(optimizer, params, 2)
    set_grads(params, 9)
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = value
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)
    assert key in str(caught.value)
    assert "param_groups[1]" in str(caught.value)
    optimizer.param_groups[1][key] = good
    optimizer.step()
    assert [int(entry["step"]) for entry in snapshot(optimizer)] == [3, 3, 3]


BETAS = [
    *(getattr(fused_optim, name) for name in ("Adam", "AdamW", "AdamWDL", "Lion", "NovoGrad", "LAMB")),
    partial(fused_optim.Muon, use_muon=False),
]


@pytest.mark.parametrize("make", BETAS)
def test_betas_that_are_not_two_are_refused_by_the_constructor(make: Any) -> None:
    """Not at the first step, as torch does of three; of others Adam says what torch's does."""
    key = "adamw_betas" if isinstance(make, partial) else "betas"
    for betas, shown in (((0.9, 0.99, 0.999), r"\(0.9, 0.99, 0.999\)"), (torch.full((3,), 0.5), "a Tensor of shape")):
        with pytest.raises(ValueError, match=rf"^betas must be two numbers, got {shown}"):
            make(new_params(shapes=FEW), lr=0.1, **{key: betas})
    for betas in ((0.9,), 0.9):
        with pytest.raises((TypeError, ValueError, IndexError)):
            make(new_params(shapes=FEW), lr=0.1, **{key: betas})


OUT_OF_RANGE: dict[str, tuple[str, Any, str]] = {
    "lr": ("lr", -0.5, "Invalid learning rate: -0.5"),
    "lr NaN": ("lr", math.nan, "Invalid learning rate: nan"),
    "lr a Tensor": ("lr", torch.tensor(-0.5), r"Invalid learning rate: -0.5"),
    "lr an array": ("lr", np.array(-0.5), "Invalid learning rate: -0.5"),
    "beta1": ("betas", (1.5, 0.9), "Invalid beta parameter at index 0: 1.5"),
    "beta2": ("betas", [0.9, 1.0], "Invalid beta parameter at index 1: 1.0"),
    "beta1 negative": ("betas", (-0.5, 0.9), "Invalid beta parameter at index 0: -0.5"),
    "beta2 NaN": ("betas", (0.9, math.nan), "Invalid beta parameter at index 1: nan"),
    "beta2 a Tensor": ("betas", (0.9, torch.tensor(1.0)), "Invalid beta parameter at index 1: 1.0"),
    "betas a Tensor": ("betas", torch.tensor([0.9, 1.0]), "Invalid beta parameter at index 1: 1.0"),
    "eps": ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
    "weight_decay": ("weight_decay", -0.5, "Invalid weight_decay value: -0.5"),
    "momentum": ("momentum", -0.5, "Invalid momentum value: -0.5"),
    "trust_coefficient": ("trust_coefficient", -0.5, "Invalid trust_coefficient value: -0.5"),
}
OF_RULES: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, **o: fused_optim.AdamW(params, weight_decay=0.1, **o),
    "SGD": lambda params, **o: fused_optim.SGD(params, momentum=0.9, **o),
    "LARS": lambda params, **o: fused_optim.LARS(params, weight_decay=0.1, **o),
    "LAMB": fused_optim.LAMB,
    "Lion": fused_optim.Lion,
    "Muon": lambda params, **o: fused_optim.Muon(params, use_muon="auto", **o),
    "NovoGrad": fused_optim.NovoGrad,
    "LARC": lambda params, **o: fused_optim.LARC(fused_optim.AdamW(params, **o)).optimizer,
}


@pytest.mark.sparingly(bad=("lr a Tensor", "beta1", "beta2", "eps", "weight_decay", "momentum"), steps=2)
@each_implementation_daily
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("rule", OF_RULES)
def test_a_hyperparameter_out_of_range_in_a_group_is_refused_as_by_the_constructor(
    rule: str, bad: str, steps: int, backend: str
) -> None:
    """In the second of two groups, before anything in the first has changed: the same words from every backend."""
    key, value, text = OUT_OF_RANGE[bad]
    params = new_params(shapes=FEW, device=device_of(backend))
    if rule == "Muon":
        params = new_params(shapes=[(2, 3), (3, 4), (5, 2)], device=device_of(backend))
    optimizer = OF_RULES[rule]([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    if key not in optimizer.defaults:
        return
    train(optimizer, params, steps)
    set_grads(params, 9)
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = value
    before, states = snapshot(optimizer), set(optimizer.state)
    with pytest.raises(ValueError, match=f"{text}$") as caught:
        optimizer.step()
    if key != "trust_coefficient":
        assert str(caught.value).startswith(f"param_groups[1]['{key}']: ")
    assert_same_snapshots(snapshot(optimizer), before)
    assert set(optimizer.state) == states
    optimizer.param_groups[1][key] = good
    optimizer.step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("rule", OF_RULES)
def test_a_group_out_of_range_in_a_checkpoint_changes_nothing(rule: str, bad: str) -> None:
    key, value, text = OUT_OF_RANGE[bad]
    params = new_params(shapes=FEW)
    optimizer = OF_RULES[rule](params)
    if key not in optimizer.defaults:
        return
    train(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=f"{text}$") as caught:
        optimizer.load_state_dict(saved)
    if key != "trust_coefficient":
        assert str(caught.value).startswith(f"param_groups[0]['{key}'] of the state dict: ")
    assert optimizer.param_groups == groups


@each_implementation_daily
@pytest.mark.parametrize("kind", [torch.zeros(3, 4), [torch.zeros(3, 4)], {"a": torch.zeros(3)}])
def test_a_tensor_in_a_group_is_not_shown(kind: Any, backend: str) -> None:
    param = Parameter(torch.ones(2, device=device_of(backend)))
    optimizer = fused_optim.AdamW([param], backend=backend)
    optimizer.param_groups[0]["lr"] = kind
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] must hold numbers") as caught:
        optimizer.step()
    assert "tensor(" not in str(caught.value)


# Tensors without memory of their own ----------------------------------------------------------------------------


class Wrapper(Tensor):
    """A wrapper subclass, as quantized and distributed tensors are: its own memory is empty."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> Wrapper:
        self = Tensor._make_wrapper_subclass(cls, elem.shape, dtype=elem.dtype, requires_grad=elem.requires_grad)
        self.elem = elem.detach()
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        unwrapped = tree_map_only(Wrapper, lambda wrapper: wrapper.elem, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        if func._schema.is_mutable:
            return args[0]
        return tree_map_only(Tensor, Wrapper, result)


@each_implementation
@each_kind
def test_wrapper_subclass_goes_through_the_witness(case: Case, backend: str) -> None:
    plain = new_params(shapes=FEW)
    wrapped = [Parameter(Wrapper(param.detach().clone())) for param in plain]
    optimizer = case.make(wrapped, "decay", backend=backend)
    other = case.make(plain, "decay", backend="eager")
    for step in range(3):
        for position, (param, twin) in enumerate(zip(wrapped, plain, strict=True)):
            twin.grad = new_grad(twin, step, position)
            param.grad = Wrapper(twin.grad.clone())
        optimizer.step()
        other.step()
    for param, twin in zip(wrapped, plain, strict=True):
        assert_same_bits(param.data.elem, twin)


@each_implementation
@each_kind
def test_wrapped_gradient_of_a_plain_parameter(case: Case, backend: str) -> None:
    params, twins = (new_params(shapes=FEW, device=device_of(backend)) for _ in range(2))
    optimizer, other = case.make(params, backend=backend), case.make(twins, backend="eager")
    train(optimizer, params, 1)
    train(other, twins, 1)
    set_grads(twins, 2)
    for param, twin in zip(params, twins, strict=True):
        param.grad = Wrapper(twin.grad.clone())
    try:
        optimizer.step()
    except (RuntimeError, TypeError):
        return  # a clear error is right too; a crash or wrong numbers are not
    other.step()
    for param, twin in zip(params, twins, strict=True):
        value = param.detach()
        assert_same_bits(value.elem if isinstance(value, Wrapper) else value, twin)


@each_implementation
@each_adamw
def test_meta_parameters_step_without_memory(case: Case, backend: str) -> None:
    """As torch's: shapes and states come out, no number."""
    real = new_params(shapes=FEW, device=device_of(backend))
    meta = [Parameter(torch.empty(shape, device="meta")) for shape in FEW]
    twins = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make([*real, *meta], backend=backend)
    other = case.make(twins, backend=backend)
    for step in range(2):
        set_grads(real, step)
        set_grads(twins, step)
        for param in meta:
            param.grad = torch.empty_like(param)
        optimizer.step()
        other.step()
    for param, twin in zip(real, twins, strict=True):
        assert_same_bits(param, twin)
    for param in meta:
        name = optimizer.state_names(optimizer.param_groups[0])[0]
        assert optimizer.state[param][name].device.type == "meta"


@each_adamw
def test_fake_tensors_step_without_memory(case: Case) -> None:
    """As torch's do."""
    with FakeTensorMode():
        params = [Parameter(torch.empty(shape)) for shape in FEW]
        optimizer = case.make(params, "all")
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
        for param in params:
            name = optimizer.state_names(optimizer.param_groups[0])[0]
            assert optimizer.state[param][name].shape == param.shape


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "8bit"},
        {"master_weights": "split8"},
        {"rounding": "stochastic"},
        {"grad_clip": fused_optim.ClipGradByGlobalNorm(1.0)},
        {"grad_clip": fused_optim.ClipGradByNorm(1.0)},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
@pytest.mark.parametrize("rule", ["AdamW", "LAMB", "NovoGrad", "Muon", "Lion"])
def test_no_option_asks_tensors_without_memory_for_numbers(rule: str, options: dict[str, Any], kind: str) -> None:
    """As a plan for memory has it: the states of a run are the real ones' in name, shape and dtype."""

    def trained(device: str) -> Any:
        param = Parameter(torch.ones(128, 64, dtype=torch.bfloat16, device=device))
        others = {"max_grad_norm": None} if rule == "LAMB" else {}
        optimizer = getattr(fused_optim, rule)([param], **options, **others, backend="eager")
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return {key: (value.shape, value.dtype) for key, value in optimizer.state[param].items()}

    with FakeTensorMode() if kind == "fake" else nullcontext():
        found = trained("meta" if kind == "meta" else "cpu")
    assert found == trained("cpu")


def test_a_grad_scaler_looks_at_real_gradients_alone() -> None:
    real, meta = Parameter(torch.ones(4)), Parameter(torch.ones(4, device="meta"))
    optimizer = fused_optim.AdamW([real, meta])
    for bad, steps in ((1.0, 1), (math.inf, 1), (1.0, 2)):
        scaler = fused_optim.GradScaler("cpu", 1.0)
        scaler.scale((bad * real).sum()).backward()
        meta.grad = torch.ones_like(meta)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.state[real]["step"] == steps


@each_implementation
@each_kind
def test_storage_that_was_freed(case: Case, backend: str) -> None:
    """FSDP resizes storages to 0: such a parameter must not be written through address 0."""
    params = new_params(shapes=FEW, device=device_of(backend))
    optimizer = case.make(params, backend=backend)
    train(optimizer, params, 2)
    set_grads(params, 3)
    params[1].untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, IndexError)):
        optimizer.step()


@each_implementation
@each_adamw
def test_uninitialized_parameter(case: Case, backend: str) -> None:
    lazy = nn.LazyLinear(3, bias=False)
    (plain,) = new_params(shapes=[(5,)], device=device_of(backend))
    optimizer = case.make([lazy.weight, plain], backend=backend)
    plain.grad = new_grad(plain, 0)
    optimizer.step()
    assert optimizer.state[plain]["step"] == 1
    lazy(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert lazy.weight.shape == (3, 4)
    assert optimizer.state[lazy.weight]["exp_avg"].shape == (3, 4)
    assert optimizer.state[plain]["step"] == 2


@each_implementation
@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_parameter_that_cannot_be_written(kind: str, backend: str) -> None:
    """Found before the witness steps those before it."""
    with torch.inference_mode(kind == "inference"):
        written = torch.zeros(1).expand(6) if kind == "expanded" else torch.zeros(6)
    params: list[Any] = [*new_params(shapes=FEW[:2], device=device_of(backend)), written]
    optimizer = fused_optim.AdamW(params, backend=backend)
    params[0].grad = torch.ones(params[0].shape)
    params[1].grad = torch.ones(params[1].shape[::-1]).t()
    params[2].grad = torch.ones(6)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=re.escape("param_groups[0]['params'][2]")):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


def test_differentiable_step_of_a_leaf_is_refused() -> None:
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fused_optim.AdamW([param], differentiable=True)
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        optimizer.step()
    assert not optimizer.state


# Log lines ------------------------------------------------------------------------------------------------------


def _column(params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(8, 8)[:, 0]))
    params.append(Parameter(torch.ones(8, 8)[:, 1]))


def _complex(params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(4, dtype=torch.complex64)))
    params.append(Parameter(torch.ones(5, dtype=torch.complex64)))


def _overlap(params: list[Parameter]) -> None:
    buffer = torch.ones(12)
    params.extend([Parameter(buffer[:8]), Parameter(buffer[4:])])


def _wrapper(params: list[Parameter]) -> None:
    params.append(Parameter(Wrapper(torch.ones(3))))


FALLBACKS: dict[str, tuple[Callable[[list[Parameter]], None], str]] = {
    "gaps": (_column, "strides"),
    "complex": (_complex, "complex64"),
    "overlap": (_overlap, "shares memory"),
    "wrapper": (_wrapper, "Wrapper"),
}


@each_backend
@each_kind
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_fallback_is_logged_once(case: Case, fallback: str, backend: str, fallbacks: list[str]) -> None:
    add, reason = FALLBACKS[fallback]
    params = new_params(shapes=FEW)
    add(params)
    optimizer = case.make(params, backend=backend)
    assert fallbacks == []  # nothing is known to be slow before a step
    for step in range(3):
        for position, param in enumerate(params):
            grad = torch.ones(param.shape, dtype=param.dtype) * (step + position)
            param.grad = Wrapper(grad) if isinstance(param, Wrapper) or type(param.data) is Wrapper else grad
        optimizer.step()
    lines = [line for line in fallbacks if reason in line]
    assert len(lines) == 1, fallbacks
    assert lines[0].startswith("WARNING: ")
    assert case.name in lines[0]
    assert "param_groups[0]['params'][3]" in lines[0]
    assert "eager" in lines[0]
    if fallback != "gaps":
        assert len(fallbacks) == 1, fallbacks
    other = case.make(new_params(shapes=FEW), backend=backend)
    train(other, other.param_groups[0]["params"], 1)
    assert len([line for line in fallbacks if reason in line]) == 1


@each_backend
@each_kind
def test_second_optimizer_reports_for_itself(case: Case, backend: str, fallbacks: list[str]) -> None:
    for _ in range(2):
        param = Parameter(torch.ones(8, 8)[:, 0])
        optimizer = case.make([param], backend=backend)
        param.grad = torch.ones(8)
        optimizer.step()
        optimizer.step()
    assert len(fallbacks) == 2


@each_backend
@each_kind
def test_gradient_layout_is_reported_with_both_strides(case: Case, backend: str, fallbacks: list[str]) -> None:
    (param,) = new_params(shapes=[(3, 4)])
    optimizer = case.make([param], backend=backend)
    for _ in range(3):
        param.grad = torch.ones(4, 3).t()
        optimizer.step()
    (line,) = fallbacks
    assert "(1, 3)" in line
    assert "(4, 1)" in line


@each_kind
def test_chosen_witness_is_not_reported(case: Case, fallbacks: list[str]) -> None:
    """Who asks for the eager backend need not be told."""
    param = Parameter(torch.ones(8, 8)[:, 0])
    optimizer = case.make([param], backend="eager")
    param.grad = torch.ones(8)
    optimizer.step()
    assert fallbacks == []


@each_implementation
@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda p, b: fused_optim.AdamW(p, backend=b), "decay_scaling"),
        (lambda p, b: fused_optim.NovoGrad(p, backend=b), "variant"),
    ],
)
def test_a_word_in_a_group_that_is_none(make: Any, key: str, backend: str) -> None:
    param = Parameter(torch.ones(2, device=device_of(backend)))
    optimizer = make([param], backend)
    for begun in (False, True):
        param.grad = torch.ones_like(param)
        before = snapshot(optimizer)
        kept = optimizer.param_groups[0].get(key)
        optimizer.param_groups[0][key] = "triple"
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{key}'\] must be one of '.*', got 'triple'"):
            optimizer.step()
        assert_same_snapshots(snapshot(optimizer), before)
        if kept is None:
            del optimizer.param_groups[0][key]
        else:
            optimizer.param_groups[0][key] = kept
        if not begun:
            optimizer.step()
