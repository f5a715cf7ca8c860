"""Master weights: the parameter is what counts, at every element and every step; the master adds the bits below it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import assert_same_bits, each_implementation_daily
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.state import masters

KINDS = ("float32", "split")
each_kind = pytest.mark.parametrize("kind", KINDS)

# A gradient of which 64 sum up to a step of bfloat16 beside 1, with lr=1.
TINY = 2.0**-10


def bits_of(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def make(params: Any, kind: str | None, backend: str, **options: Any) -> fused_optim.SGD:
    return fused_optim.SGD(params, **{"lr": 1.0, "master_weights": kind, "backend": backend, **options})


def ones(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Parameter]:
    return [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes or ((64,),)]


def step(optimizer: Any, grad: float = TINY, steps: int = 1) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, grad)
        optimizer.step()


def params_of(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def whole(optimizer: Any) -> list[Tensor]:
    """The float32 numbers of all parameters, as the next step will see them."""
    found = []
    for param in params_of(optimizer):
        state = optimizer.state[param]
        (key,) = set(state) & set(masters.STATES)
        found.append(masters.read(param, state, key))
    return found


# What is equal, and what a master is ----------------------------------------------------------------------------


def test_split_master_is_the_float32_master(everywhere: str) -> None:
    torch.manual_seed(3)
    values = [torch.randn(shape).bfloat16() for shape in ((16,), (3, 5), (), (40, 333), (0,))]
    runs = []
    for kind in KINDS:
        params = [Parameter(value.clone()) for value in values]
        optimizer = fused_optim.AdamW(params, master_weights=kind, weight_decay=0.1, backend=everywhere)
        torch.manual_seed(7)
        for _ in range(8):
            for param in params:
                param.grad = torch.randn_like(param) * 3
            optimizer.step()
        runs.append((params, whole(optimizer)))
    for one, two in zip(*runs, strict=True):
        for a, b in zip(one, two, strict=True):
            assert_same_bits(a, b)


def test_remainder_holds_every_float32() -> None:
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64).to(torch.int32)
    value = bits.view(torch.float32)
    value = value[~value.isnan()]
    param = masters.round_ties_away(value, torch.bfloat16)
    state = {"param_remainder": masters.remainder_of(value, param)}
    assert torch.equal(masters.read(param, state, "param_remainder").view(torch.int32), value.view(torch.int32))


def is_right(upper: Tensor, remainder: Tensor, found: Tensor) -> Tensor:
    """Whether numbers are what parameters and remainders stand for; upper: bits of bfloat16, remainder: int32."""
    pair = (upper << 16) + remainder
    number = pair.view(torch.float32)
    rounded = (pair + 0x8000) >> 16 << 16  # of what is no NaN
    is_split = ~torch.isnan(number) & (rounded == upper << 16)
    expected = torch.where(is_split, pair, upper << 16)
    nan = torch.isnan(expected.view(torch.float32))
    return torch.where(nan, torch.isnan(found), found.view(torch.int32) == expected)


REMAINDERS = torch.arange(-0x8000, 0x8000, dtype=torch.int32)
# Bits of zeros, subnormals, the smallest normal, 1, the largest finite, infinities and NaNs.
CORNERS = [
    sign | bits
    for sign in (0, 0x8000)
    for bits in (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF)
]


def as_bfloat16(upper: Tensor) -> Tensor:
    return upper.to(torch.int16).view(torch.bfloat16)


def test_a_remainder_that_makes_a_nan_counts_as_zero(everywhere: str) -> None:
    """Every remainder beside the corners: the step reads the number that it should."""
    upper = torch.tensor(CORNERS, dtype=torch.int32).repeat_interleave(REMAINDERS.numel())
    remainder = REMAINDERS.repeat(len(CORNERS))
    if everywhere == "triton":  # an interpreter: those next to the corners of the remainder, too
        some = (remainder.abs() < 3) | (remainder.abs() > 0x7FFD) | (remainder % 509 == 0)
        upper, remainder = upper[some], remainder[some]
    param = Parameter(as_bfloat16(upper))
    optimizer = make([param], "split", everywhere, lr=0.0)
    optimizer.state[param]["param_remainder"] = remainder.to(torch.int16)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    # A step of 0 writes back what it has read; of a pair that is the split of a float these are the same bits.
    found = masters.read(param, optimizer.state[param], "param_remainder")
    assert is_right(upper, remainder, found).all()
    nan = torch.isnan(as_bfloat16(upper).float())
    assert torch.equal(torch.isnan(param.detach().float()), nan)


@pytest.mark.slow
def test_every_pair_of_parameter_and_remainder() -> None:
    for first in range(0, 0x10000, 64):
        upper = torch.arange(first, first + 64, dtype=torch.int32).repeat_interleave(REMAINDERS.numel())
        upper = torch.where(upper >= 0x8000, upper - 0x10000, upper)
        remainder = REMAINDERS.repeat(64)
        state = {"param_remainder": remainder.to(torch.int16)}
        found = masters.read(as_bfloat16(upper), state, "param_remainder")
        assert is_right(upper, remainder, found).all(), hex(first)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_element_is_compared_by_itself(kind: str, dtype: torch.dtype, everywhere: str) -> None:
    """Of numbers of every size a third is written, a third to what it was; each third keeps what is right for it."""
    if kind == "split" and dtype == torch.float16:
        kind = "float32"
    torch.manual_seed(1)
    values = (torch.randn(2100) * torch.logspace(-6, 3, 2100)).to(dtype)
    optimizer = make([Parameter(values.clone()) for _ in range(2)], kind, everywhere, lr=2.0**-9)
    step(optimizer, 1.0, steps=3)
    before = whole(optimizer)
    assert not torch.equal(before[0], before[0].to(dtype).float())
    written, _ = params_of(optimizer)
    with torch.no_grad():
        written[::3] = 7.0
        written[1::3] = written[1::3].clone()
    step(optimizer, 0.0)
    after = whole(optimizer)
    assert_same_bits(after[1], before[1])
    kept = torch.arange(2100) % 3 != 0
    assert_same_bits(after[0][kept], before[0][kept])
    assert torch.equal(written[::3].float(), torch.full((700,), 7.0))


# Writes that change nothing, and swaps ---------------------------------------------------------------------------


def clamp(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        param.clamp_(-1e3, 1e3)


def renorm(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        if param.dim() == 2:
            torch.embedding_renorm_(param, torch.arange(len(param)), 1e6, 2.0)


def copy_in_place(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        param.copy_(param.clone())


def write_data(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        param.data.mul_(1.0)


def replace_data(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        param.data = param.data.clone()


def swap(optimizer: Any) -> Any:
    """As weights that are averages are swapped in for an evaluation."""
    kept = [param.detach().clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.fill_(3.0)
    for param, value in zip(params_of(optimizer), kept, strict=True):
        param.copy_(value)


def swap_around_a_skipped_step(optimizer: Any) -> Any:
    kept = [param.detach().clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.data.fill_(3.0)
        param.grad = torch.full_like(param, float("inf"))
    scaler = fused_optim.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    for param, value in zip(params_of(optimizer), kept, strict=True):
        param.data.copy_(value)


def swap_around_a_save(optimizer: Any) -> Any:
    kept = [param.detach().clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.fill_(3.0)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    optimizer.load_state_dict(saved)
    for param, value in zip(params_of(optimizer), kept, strict=True):
        param.copy_(value)


def swap_around_a_copy(optimizer: Any) -> Any:
    kept = [param.detach().clone() for param in params_of(optimizer)]
    for param in params_of(optimizer):
        param.fill_(3.0)
    optimizer = copy.deepcopy(optimizer)
    for param, value in zip(params_of(optimizer), kept, strict=True):
        param.copy_(value)
    return optimizer


def pickle_it(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def plan_anew(optimizer: Any) -> Any:
    optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.bfloat16))]})
    del optimizer.param_groups[-1]


def load_the_optimizer_first(optimizer: Any) -> Any:
    saved, values = optimizer.state_dict(), [param.detach().clone() for param in params_of(optimizer)]
    params = [Parameter(torch.randn_like(value)) for value in values]
    groups = [{**group, "params": [params.pop(0) for _ in group["params"]]} for group in optimizer.param_groups]
    other = type(optimizer)(groups, master_weights=optimizer.kind, backend=optimizer.asked)  # type: ignore[call-arg]
    other.load_state_dict(saved)
    for param, value in zip(params_of(other), values, strict=True):
        param.copy_(value)
    return other


def step_another_optimizer(optimizer: Any) -> Any:
    for param in params_of(optimizer):
        param.grad = torch.zeros_like(param)
    make(params_of(optimizer), optimizer.kind, optimizer.asked, lr=0.0).step()


NOTHING: list[Callable[[Any], Any]] = [
    clamp,
    renorm,
    copy_in_place,
    write_data,
    replace_data,
    swap,
    swap_around_a_skipped_step,
    swap_around_a_save,
    swap_around_a_copy,
    pickle_it,
    plan_anew,
    load_the_optimizer_first,
    step_another_optimizer,
]


def of_rule(rule: str, kind: str, backend: str) -> Any:
    torch.manual_seed(2)
    params = [Parameter(torch.randn(shape).bfloat16()) for shape in ((64,), (3, 350), (5, 1))]
    options: dict[str, Any] = {"master_weights": kind, "backend": backend, "lr": 1e-4}
    optimizer = getattr(fused_optim, rule)(params, **options)
    optimizer.kind, optimizer.asked = kind, backend
    return optimizer


def train(optimizer: Any, between: Callable[[Any], Any] | None = None, steps: int = 3) -> Any:
    torch.manual_seed(5)
    grads = [[torch.randn(param.shape).bfloat16() for param in params_of(optimizer)] for _ in range(steps)]
    for of_step in grads:
        for param, grad in zip(params_of(optimizer), of_step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        if between is not None:
            kind, asked = optimizer.kind, optimizer.asked
            with torch.no_grad():
                changed = between(optimizer)
            optimizer = optimizer if changed is None else changed
            optimizer.kind, optimizer.asked = kind, asked
    return optimizer


@cache
def undisturbed(kind: str, backend: str) -> list[Tensor]:
    """Parameters and masters after a run."""
    optimizer = train(of_rule("AdamW", kind, backend))
    return [*params_of(optimizer), *whole(optimizer)]


@each_kind
@pytest.mark.parametrize("between", NOTHING)
def test_what_changes_nothing_is_nothing(between: Callable[[Any], Any], kind: str, everywhere: str) -> None:
    disturbed = train(of_rule("AdamW", kind, everywhere), between)
    found = [*params_of(disturbed), *whole(disturbed)]
    for one, two in zip(undisturbed(kind, everywhere), found, strict=True):
        assert_same_bits(one, two)


@each_kind
@pytest.mark.parametrize("rule", ["LARS", "LAMB", "NovoGrad", "Lion"])
def test_every_phase_compares(rule: str, kind: str, everywhere: str) -> None:
    """Those that reduce, and the second pass of a rule with a direction: they see the same numbers as apply."""
    runs = []
    for value in (None, 40.0):  # to which no master of before rounds
        optimizer = of_rule(rule, kind, everywhere)
        train(optimizer, steps=2)
        for param in params_of(optimizer):
            if value is not None:  # swapped in, and the masters beside them are of other numbers
                param.data.fill_(value)
            else:
                optimizer.state[param].pop("master_param", None)
                optimizer.state[param].pop("param_remainder", None)
                param.data.fill_(40.0)
        if kind == "split":  # a remainder counts beside every number: only one that is 0 adds nothing
            optimizer.refresh_masters()
        train(optimizer, steps=2)
        runs.append(optimizer)
    for one, two in zip(*map(params_of, runs), strict=True):
        assert_same_bits(one, two)
    for one, two in zip(*map(whole, runs), strict=True):
        assert_same_bits(one, two)


@each_kind
def test_a_clamp_after_each_step_does_not_stop_a_training(kind: str, everywhere: str) -> None:
    (param,) = ones()
    optimizer = make([param], kind, everywhere)
    for _ in range(64):
        step(optimizer)
        with torch.no_grad():
            param.clamp_(-1e3, 1e3)
    assert torch.equal(param.float(), torch.full((64,), 1 - 64 * TINY))


@each_kind
def test_views_of_one_buffer_have_masters_of_their_own(kind: str, everywhere: str) -> None:
    flat = torch.ones(8, dtype=torch.bfloat16)
    optimizer = make([Parameter(flat[:4]), Parameter(flat[4:])], kind, everywhere)
    step(optimizer, steps=64)
    assert torch.equal(flat.float(), torch.full((8,), 1 - 64 * TINY))


# Writes that count ------------------------------------------------------------------------------------------------


def fill(optimizer: Any, param: Any) -> None:
    with torch.no_grad():
        param.fill_(7)


def fill_data(optimizer: Any, param: Any) -> None:
    param.data.fill_(7)


def other_memory(optimizer: Any, param: Any) -> None:
    param.data = torch.full_like(param.data, 7)


def through_numpy(optimizer: Any, param: Any) -> None:
    param.data.view(torch.int16).numpy()[...] = torch.tensor(7.0).bfloat16().view(torch.int16).item()


def before_a_new_plan(optimizer: Any, param: Any) -> None:
    other_memory(optimizer, param)
    plan_anew(optimizer)


def while_it_is_away(optimizer: Any, param: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [other for other in params if other is not param]
    step(optimizer)
    fill(optimizer, param)
    optimizer.param_groups[0]["params"] = params


def before_a_refused_step(optimizer: Any, param: Any) -> None:
    fill(optimizer, param)
    param.grad = torch.zeros_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def before_a_refused_learning_rate(optimizer: Any, param: Any) -> None:
    fill(optimizer, param)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\]"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0


def and_refresh(optimizer: Any, param: Any) -> None:
    fill_data(optimizer, param)
    optimizer.refresh_masters()


@each_kind
@pytest.mark.parametrize(
    "write",
    [
        fill,
        fill_data,
        other_memory,
        through_numpy,
        before_a_new_plan,
        while_it_is_away,
        before_a_refused_step,
        before_a_refused_learning_rate,
        and_refresh,
    ],
)
def test_what_was_written_counts(write: Callable[[Any, Any], None], kind: str, everywhere: str) -> None:
    optimizer = make(ones((4,), (6,)), kind, everywhere)
    step(optimizer, steps=3)
    param, _ = params_of(optimizer)
    write(optimizer, param)
    step(optimizer, 0.0)
    assert param.tolist() == [7.0] * 4
    step(optimizer, 1.0)
    assert param.tolist() == [6.0] * 4


@each_kind
@each_implementation_daily
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle_it, swap_around_a_copy], ids=["copy", "pickle", "swap"])
def test_a_copy_follows_what_was_written_before_it(duplicate: Any, kind: str, backend: str) -> None:
    optimizer = make(ones((4,), (6,)), kind, backend)
    step(optimizer, steps=3)
    with torch.no_grad():
        params_of(optimizer)[0].fill_(7)
        optimizer = duplicate(optimizer)
    step(optimizer, 0.0)
    assert params_of(optimizer)[0].tolist() == [7.0] * 4


def zero(param: Any) -> None:
    param.data.zero_()


def mask(param: Any) -> None:
    param.data.mul_((torch.arange(param.numel()) % 2).to(param.dtype))


def replace_by_zeros(param: Any) -> None:
    param.data = torch.zeros_like(param.data)


def minus_zero(param: Any) -> None:
    param.data.fill_(-0.0)


def infinite(param: Any) -> None:
    param.data.fill_(float("inf"))


@each_kind
@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, pickle_it], ids=["itself", "copy", "pickle"])
@pytest.mark.parametrize("write", [zero, mask, replace_by_zeros, minus_zero, infinite])
def test_pruning_makes_no_nan(write: Callable[[Any], None], duplicate: Any, kind: str, everywhere: str) -> None:
    torch.manual_seed(4)
    optimizer = make([Parameter(torch.randn(64).bfloat16())], kind, everywhere, lr=0.01)
    for _ in range(3):
        for param in params_of(optimizer):
            param.grad = torch.randn_like(param)
        optimizer.step()
    if duplicate is not None:
        optimizer = duplicate(optimizer)
    (param,) = params_of(optimizer)
    write(param)
    expected = param.detach().clone()
    step(optimizer, 0.0)
    assert torch.equal(param, expected)


# Other dtypes -----------------------------------------------------------------------------------------------------


@each_kind
def test_a_parameter_that_became_float32_is_its_own_master(kind: str, everywhere: str) -> None:
    module = torch.nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    optimizer = make(module.parameters(), kind, everywhere)
    step(optimizer)
    module.float()
    step(optimizer, 0.125)
    assert module.weight.dtype == torch.float32
    assert module.weight.tolist() == [[0.875] * 8]


@each_kind
def test_a_parameter_that_became_bfloat16_gets_a_master(kind: str, everywhere: str) -> None:
    module = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    optimizer = make(module.parameters(), kind, everywhere)
    step(optimizer)
    module.bfloat16()
    step(optimizer, steps=64)
    assert module.weight.tolist() == [[1 - 64 * TINY] * 8]
    assert masters.KEYS[kind] in optimizer.state[module.weight]


# Checkpoints ------------------------------------------------------------------------------------------------------


@each_kind
def test_a_checkpoint_follows_what_was_written_before_it(kind: str) -> None:
    optimizer = make(ones((4,), (6,)), kind, "cpu")
    step(optimizer, steps=3)
    with torch.no_grad():
        params_of(optimizer)[0].fill_(7)
    other = make([Parameter(param.detach().clone()) for param in params_of(optimizer)], kind, "cpu")
    other.load_state_dict(optimizer.state_dict())
    step(other, 0.0)
    assert params_of(other)[0].tolist() == [7.0] * 4


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("loaded", KINDS)
def test_masters_survive_a_checkpoint(saved: str, loaded: str, model_first: bool, everywhere: str) -> None:
    """Of either kind, and whether the model is loaded before the optimizer or after it."""
    optimizer = of_rule("AdamW", saved, everywhere)
    train(optimizer)
    other = of_rule("AdamW", loaded, everywhere)
    state_dict = pickle.loads(pickle.dumps(optimizer.state_dict()))
    if not model_first:
        other.load_state_dict(state_dict)
    for one, two in zip(params_of(optimizer), params_of(other), strict=True):
        two.data.copy_(one)
    if model_first:
        other.load_state_dict(state_dict)
    train(optimizer)
    train(other)
    for one, two in zip(params_of(optimizer), params_of(other), strict=True):
        assert_same_bits(one, two)
    for one, two in zip(whole(optimizer), whole(other), strict=True):
        assert_same_bits(one, two)
    for param in params_of(other):
        assert set(other.state[param]) & set(masters.STATES) == {masters.KEYS[loaded]}
