"""States of a byte, masters of 24 bits and stochastic rounding: what a step, a copy and a checkpoint make of them."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    GOLDEN,
    OF_EACH_KIND,
    ROWS,
    RULES,
    Case,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    each_case,
    each_dtype,
    each_kind,
    eighths,
    inner,
    new_grad,
    new_params,
    params_of,
    snapshot,
    spelled,
    step_exactly,
    train,
)
from torch import Tensor

import fused_optim
from fused_optim import AdamW
from fused_optim.state import codec, formats, masters

# Codes in several tiles and rows, and in a tile that is not full; too small; rows that hold no whole groups; a vector.
SHAPES = ((64, 96), (5, 4, 256), (64, 64, 1, 1), (131, 32), (31, 32), (200, 33), (5000,), ())
CODED = 4
OPTIONS: tuple[dict[str, Any], ...] = (
    {"state_dtype": "8bit"},
    {"state_dtype": "8bit", "rounding": "stochastic", "seed": 3},
    {"rounding": "stochastic"},
    {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
    {"state_dtype": {"exp_avg": "8bit", "momentum_buffer": "8bit"}},
    {"master_weights": "split8"},
    {"master_weights": "split8", "state_dtype": "8bit"},
    {"master_weights": "split", "state_dtype": "8bit"},
    {"master_weights": "float32", "state_dtype": torch.bfloat16, "rounding": "stochastic"},
)
each_option = pytest.mark.parametrize("options", OPTIONS, ids=spelled)


def fitting(case: Case, options: dict[str, Any], variant: str = "default") -> dict[str, Any]:
    """The options with a mapping's names that this optimizer has."""
    wanted = options.get("state_dtype")
    if not isinstance(wanted, dict):
        return options
    optimizer = inner(case.make(new_params(torch.bfloat16, [(2, 2)]), variant))
    names = optimizer.state_names(optimizer.param_groups[0])
    return {**options, "state_dtype": {name: dtype for name, dtype in wanted.items() if name in names}}


def trained(case: Case, options: dict[str, Any], steps: int = 3, dtype: torch.dtype = torch.bfloat16) -> Any:
    params = new_params(dtype, SHAPES)
    optimizer = case.make(params, **fitting(case, options))
    train(optimizer, params, steps)
    return optimizer


# What a step does -----------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_which_states_are_codes(case: Case, dtype: torch.dtype) -> None:
    optimizer = trained(case, {"state_dtype": "8bit"}, 1, dtype)
    names = optimizer.state_names(optimizer.param_groups[0])
    for index, param in enumerate(params_of(optimizer)):
        state = optimizer.state[param]
        for name in names:
            if index >= CODED:
                assert state[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert f"{name}_scale" not in state
                continue
            assert state[name].dtype == (torch.uint8 if name == "exp_avg_sq" else torch.int8)
            assert state[name].shape == param.shape
            assert state[f"{name}_scale"].dtype == torch.uint8
            assert state[f"{name}_scale"].shape == (len(param), param.numel() // len(param) // 32)


def test_amsgrads_maximum_is_no_code() -> None:
    (param,) = params = new_params(torch.float32, [(64, 64)])
    optimizer = AdamW(params, amsgrad=True, state_dtype="8bit")
    train(optimizer, params, 2)
    before = optimizer.state[param]["max_exp_avg_sq"].clone()
    assert before.dtype == torch.float32
    train(optimizer, params, 2, first=2)
    assert (optimizer.state[param]["max_exp_avg_sq"] >= before).all()


@pytest.mark.parametrize("order", ["transposed", "channels last"])
def test_a_parameter_whose_elements_are_not_in_order_keeps_wider_states(order: str) -> None:
    if order == "transposed":
        param = torch.nn.Parameter(torch.ones(64, 96).t())
    else:
        param = torch.nn.Parameter(torch.ones(64, 32, 3, 3).to(memory_format=torch.channels_last))
    optimizer = AdamW([param], state_dtype="8bit")
    train(optimizer, [param], 1)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def reference_step(state: dict[str, Tensor], grad: Tensor, place: int, step: int, seed: int) -> dict[str, Tensor]:
    """AdamW's averages, and their codes, by MEMORY's definition of a step: rounded from what they were in registers."""
    m, v = (formats.numbers_of(name, state, grad) for name in ("exp_avg", "exp_avg_sq"))
    m = 0.9 * m + (1 - 0.9) * grad
    v = 0.999 * v + (1 - 0.999) * grad * grad
    words = codec.random_words(torch.arange(grad.numel()), codec.random_key(seed, step, place, grad.device))
    result = {"exp_avg": m, "exp_avg_sq": v}
    for name, value in (("exp_avg", m), ("exp_avg_sq", v)):
        dtype = formats.CODES[name]
        result[name], result[f"{name}_scale"] = codec.encode(value, dtype, words.view(grad.shape))
    return result


def test_found_states_of_a_row_that_draws_no_words_are_rounded_to_nearest() -> None:
    """The master is whole and new states are float32: nothing asks for random words, and 16-bit states that somebody
    has put there are stored as ever."""
    results = []
    for options in ({}, {"rounding": "stochastic"}):
        params = new_params(torch.bfloat16, [(64, 96)])
        optimizer = AdamW(params, master_weights="float32", **options)
        train(optimizer, params, 1)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[params[0]][name] = optimizer.state[params[0]][name].bfloat16()
        train(optimizer, params, 2, first=1)
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
        results.append(snapshot(optimizer))
    assert_same_snapshots(*results)


def test_codes_are_those_of_the_places_the_step_and_the_seed() -> None:
    params = new_params(torch.float32, SHAPES[:CODED])
    optimizer = AdamW(params, state_dtype="8bit", seed=11)
    train(optimizer, params, 1)
    for step in (2, 3):
        before = copy.deepcopy([optimizer.state[param] for param in params])
        train(optimizer, params, 1, first=step)
        for place, param in enumerate(params):
            assert param.grad is not None
            expected = reference_step(before[place], param.grad, place, step, 11)
            for key, value in expected.items():
                assert_same_bits(optimizer.state[param][key], value, key)


@each_kind
@each_option
def test_seed_counts_and_groups_do_not(case: Case, options: dict[str, Any]) -> None:
    results = []
    for split, seed in ((False, 5), (True, 5), (False, 6)):
        params = new_params(torch.bfloat16, SHAPES)
        groups: Any = [{"params": params[:2]}, {"params": params[2:]}] if split else params
        optimizer = case.make(groups, **{**fitting(case, options), "seed": seed})
        train(optimizer, params, 3)
        results.append(snapshot(optimizer))
    assert_same_snapshots(results[0], results[1])
    with pytest.raises(AssertionError):
        assert_same_snapshots(results[0], results[2])


def test_a_drift_below_the_parameters_precision_arrives() -> None:
    """A step of about 1e-6 of the parameter: bfloat16 rounded to nearest never moves."""
    found = {}
    for name, options in {
        "nearest": {},
        "stochastic": {"rounding": "stochastic"},
        "split8": {"master_weights": "split8"},
        "float32": {"master_weights": "float32"},
    }.items():
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = fused_optim.SGD([param], lr=2.0**-20, **options)
        for _ in range(2000):
            param.grad = torch.ones_like(param)
            optimizer.step()
        state = optimizer.state[param]
        key = next((key for key in masters.STATES if key in state), None)
        whole = param.detach().float() if key is None else masters.read(param, state, key)
        found[name] = float((1 - whole.double()).mean()) / (2000 * 2.0**-20)
    assert found["nearest"] == 0
    assert abs(found["stochastic"] - 1) < 0.1
    assert abs(found["split8"] - 1) < 0.01
    assert found["float32"] == 1


def test_the_spike_makes_no_giant_steps() -> None:
    """One gradient of 10^4 times in 1 % of the elements: the next updates are no larger than without codes."""
    params, largest = new_params(torch.float32, [(128, 128)]), 0.0
    optimizer = AdamW(params, lr=1.0, weight_decay=0, state_dtype="8bit")
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        grad = torch.randn(128, 128, generator=generator)
        if step == 20:
            grad[torch.rand(128, 128, generator=generator) < 0.01] *= 1e4
        params[0].grad = grad
        before = params[0].detach().clone()
        optimizer.step()
        largest = max(largest, float((params[0].detach() - before).abs().max()))
    assert largest < 4


def test_a_fall_of_the_gradients_is_followed() -> None:
    """3,000 steps after the gradients fell to a tenth the averages of squares are those of the small ones."""
    params = new_params(torch.float32, [(64, 64)])
    optimizer = AdamW(params, lr=0.0, state_dtype="8bit")
    generator = torch.Generator().manual_seed(0)
    half = torch.arange(4096).view(64, 64) % 2 == 0
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for step in range(4000):
        grad = torch.randn(64, 64, generator=generator)
        params[0].grad = torch.where(half, grad / 10, grad) if step >= 1000 else grad
        optimizer.step()
        exact = 0.999 * exact + 0.001 * params[0].grad.double() ** 2
    ratio = (formats.numbers_of("exp_avg_sq", optimizer.state[params[0]], params[0]).double() / exact).sqrt()[half]
    low, middle, high = torch.quantile(ratio, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    assert low > 0.65
    assert 0.95 < middle < 1.05
    assert high < 1.5


# The backends and the witness -----------------------------------------------------------------------------------


def each_rule_and_option() -> pytest.MarkDecorator:
    """Crosses backends, rules and options: rules of each kind, and on the cpu backend the others with every third
    option in turn; in an interpreter most of them in two settings."""
    of_each_kind = crossed((*OF_EACH_KIND, "Muon all"))
    others = [rule for rule in RULES if rule not in dict(of_each_kind)]
    on_cpu = of_each_kind + [(rule, option) for i, rule in enumerate(others) for option in OPTIONS[i % 3 :: 3]]
    parameters = [pytest.param("cpu", *row, id=f"cpu-{row[0]}-{spelled(row[1])}") for row in on_cpu]
    for rule, options in of_each_kind:
        marks = pytest.mark.requires("g++")
        parameters.append(pytest.param("cuda", rule, options, id=f"cuda-{rule}-{spelled(options)}", marks=marks))
    for plan, (rule, options) in itertools.product(("", ", python plan"), of_each_kind):
        in_full = rule == "AdamW all" and not plan
        daily = in_full or (options in SETTINGS_OF_EVERY_DAY and (not plan or rule in ("AdamW all", "Lion decay")))
        marks = (pytest.mark.interpreted, *(() if daily else (pytest.mark.slow,)))
        name = f"triton{plan}"
        parameters.append(pytest.param(name, rule, options, id=f"{name}-{rule}-{spelled(options)}", marks=marks))
    return pytest.mark.parametrize(("any_backend", "rule", "options"), parameters, indirect=["any_backend"])


SETTINGS_OF_EVERY_DAY = (OPTIONS[1], {"master_weights": "split8", "state_dtype": "8bit"})


def crossed(rules: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    return list(itertools.product(rules, OPTIONS))


@each_rule_and_option()
def test_backends_and_witness_agree_to_the_bit(
    any_backend: str, rule: str, options: dict[str, Any], all_native: None
) -> None:
    """Where a sum over a parameter counts, in the first step alone, in which it is exact; where that of a direction
    does, in all but the parameter."""
    chosen = RULES[rule]
    options = fitting(chosen.case, options, chosen.variant)
    shapes, steps = (SHAPES[CODED - 1 :], 2) if any_backend == "triton" else (SHAPES, 3)
    for dtype in (torch.bfloat16,) if "master_weights" in options else (torch.bfloat16, torch.float32):
        found = []
        for backend in (any_backend, "eager"):
            params = [torch.nn.Parameter(eighths(shape, dtype, 7)) for shape in shapes]
            optimizer = chosen(params, backend=backend, **options)
            for step in range(1 if chosen.sums or chosen.directions else steps):
                step_exactly(optimizer, 100 * step)
            found.append(snapshot(inner(optimizer)))
        if chosen.directions:
            for mine, theirs in zip(*found):
                torch.testing.assert_close(mine.pop("param"), theirs.pop("param"))
                for state in (mine, theirs):
                    for key in masters.STATES:
                        state.pop(key, None)
        assert_same_snapshots(*found)


# Copies and checkpoints -----------------------------------------------------------------------------------------


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@each_case
@each_option
def test_a_resumed_run_is_the_uninterrupted_one(case: Case, options: dict[str, Any]) -> None:
    options = fitting(case, options)
    optimizer = trained(case, options)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]
    other = case.make(others, **options)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_results(optimizer, other)
    train(optimizer, params_of(optimizer), 3, first=3)
    train(other, others, 3, first=3)
    assert_same_results(optimizer, other)


@each_kind
@each_option
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_alike(case: Case, options: dict[str, Any], way: str) -> None:
    optimizer = trained(case, options)
    twin = COPIES[way](optimizer)
    train(optimizer, params_of(optimizer), 2, first=3)
    train(twin, params_of(twin), 2, first=3)
    assert_same_results(optimizer, twin)


def test_torchs_states_are_encoded_to_nearest_and_go_back_as_numbers() -> None:
    params = new_params(torch.float32, SHAPES)
    theirs = torch.optim.AdamW(params)
    train(theirs, params, 3)
    ours = AdamW([torch.nn.Parameter(param.detach().clone()) for param in params], state_dtype="8bit")
    ours.load_state_dict(theirs.state_dict())
    back = ours.state_dict_for_torch()
    assert back.keys() == {"state", "param_groups"}
    for index, (mine, param) in enumerate(zip(params_of(ours), params)):
        found, exact = ours.state[mine], theirs.state[param]
        assert back["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq"):
            if index >= CODED:
                assert_same_bits(found[name], exact[name])
                continue
            codes, scale = codec.encode(exact[name], formats.CODES[name], codec.middle_words(param))
            assert_same_bits(found[name], codes)
            assert_same_bits(found[f"{name}_scale"], scale)
            assert_same_bits(back["state"][index][name], codec.decode(codes, scale))
    theirs.load_state_dict(back)
    train(theirs, params, 1, first=3)


class OptimState8bit(Tensor):
    """As torchao's: a tensor that holds codes and nothing that torch's operations could read."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, qmap: Tensor) -> OptimState8bit:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale, made.qmap = codes, scale, qmap
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} of a foreign state")


def foreign_state(library: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state as its library's own code wrote it, and the numbers that it decodes."""
    with np.load(GOLDEN / f"states_{library}_adamw8bit.npz", allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "version"}
    expected = {name: arrays.pop(f"decoded_{name}") for name in ("exp_avg", "exp_avg_sq")}
    step = arrays.pop("step")
    if library == "bitsandbytes":
        return {"step": int(step), "__bnb_optimizer_quant_state__": arrays}, expected
    parts = ("codes", "scale", "qmap")
    return {
        "step": step,
        **{name: OptimState8bit(*(arrays[f"{name}_{part}"] for part in parts)) for name in expected},
    }, expected


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "8bit"}], ids=spelled)
def test_8bit_states_of_other_libraries_load(library: str, options: dict[str, Any]) -> None:
    state, expected = foreign_state(library)
    (param,) = params = new_params(torch.float32, [(40, 128)])
    optimizer = AdamW(params, **options)
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    found = optimizer.state[param]
    assert set(found) == {"step", *expected, *(f"{name}_scale" for name in expected if options)}
    for name, value in expected.items():
        if options:
            codes, scale = codec.encode(value, formats.CODES[name], codec.middle_words(value))
            assert_same_bits(found[name], codes, name)
            assert_same_bits(found[f"{name}_scale"], scale, name)
        else:
            assert_same_bits(found[name], value, name)
    train(optimizer, params, 1)
    assert float(found["step"]) == 4


def test_states_of_bitsandbytes_before_its_blocks_were_smaller_load() -> None:
    state, _ = foreign_state("bitsandbytes")
    arrays = state["__bnb_optimizer_quant_state__"]
    for number in (1, 2):
        arrays[f"absmax{number}"] = torch.linspace(0.5, 2, 3)
    assert arrays["state1"].numel() == 2.5 * 2048
    optimizer = AdamW(new_params(torch.float32, [(40, 128)]))
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    (param,) = params_of(optimizer)
    scale = torch.linspace(0.5, 2, 3).repeat_interleave(2048)[:5120].view(40, 128)
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        expected = arrays[f"qmap{number}"][arrays[f"state{number}"].long()] * scale
        assert_same_bits(optimizer.state[param][name], expected)


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        (torch.ones(7), "'absmax1' holds 7 scales for 5120 codes of bitsandbytes, which has one for 256 or 2048"),
        (None, "there is no 'absmax1' beside bitsandbytes' codes: states of block_wise=False are not read"),
    ],
)
def test_scales_of_bitsandbytes_that_do_not_fit_are_refused(scales: Any, text: str) -> None:
    state, _ = foreign_state("bitsandbytes")
    state["__bnb_optimizer_quant_state__"]["absmax1"] = scales
    optimizer = AdamW(new_params(torch.float32, [(40, 128)]))
    with pytest.raises(ValueError, match=rf"the state of .* in the state dict: {text}"):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 2.0**40])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_step_that_is_no_count_draws_the_same_words_everywhere(name: str, step: float) -> None:
    results = []
    for backend in ("cpu", "eager", "triton"):
        optimizer = ROWS[name].make(new_params(shapes=SHAPES[:1]), "default", state_dtype="8bit", backend=backend)
        (param,) = params_of(optimizer)
        train(optimizer, [param], 1)
        optimizer.state[param]["step"].fill_(step)
        train(optimizer, [param], 1, first=1)
        results.append(optimizer)
    for other in results[1:]:
        assert_same_results(results[0], other)


def test_a_count_that_the_plan_does_not_read_is_the_reason_that_the_log_gives(
    fallbacks: list[str],
) -> None:
    optimizer = ROWS["Lion"].make(new_params(shapes=SHAPES[:1]), "default", state_dtype="8bit", backend="cpu")
    (param,) = params_of(optimizer)
    train(optimizer, [param], 1)
    optimizer.state[param]["step"] = torch.tensor(1)
    train(optimizer, [param], 1)
    assert fallbacks[-1].endswith("its state 'step' has dtype torch.int64, not torch.float32")


def test_foreign_states_that_are_not_read_are_refused_by_name() -> None:
    params = new_params(torch.float32, [(40, 128)])
    optimizer = AdamW(params)
    groups = optimizer.state_dict()["param_groups"]
    state = {"step": 3, "exp_avg::quantized": torch.zeros(40, 128, dtype=torch.int8)}
    with pytest.raises(
        ValueError, match=r"the state of param_groups\[0\]\['params'\]\[0\].*flashoptim's code of 8 bits"
    ):
        optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    assert not optimizer.state


def test_masters_are_left_behind_for_torch() -> None:
    optimizer = trained(ROWS["AdamW"], {"master_weights": "split8", "state_dtype": "8bit"})
    for state in optimizer.state_dict_for_torch()["state"].values():
        assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.float32
        )
    assert trained(ROWS["Lion"], {"rounding": "stochastic"}).state_dict_for_torch()["state"][0].keys() == {"exp_avg"}


def test_an_optimizer_without_codes_reads_them() -> None:
    optimizer = trained(ROWS["AdamW"], {"state_dtype": "8bit"}, dtype=torch.float32)
    other = AdamW(new_params(torch.float32, SHAPES))
    other.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(params_of(other), params_of(optimizer)):
        assert other.state[mine].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(other.state[mine][name], formats.numbers_of(name, optimizer.state[theirs], theirs))


@pytest.mark.parametrize("found", ["float32", "split", "split8"])
@pytest.mark.parametrize("wanted", ["float32", "split", "split8"])
def test_masters_of_one_kind_become_another(found: str, wanted: str) -> None:
    optimizer = trained(ROWS["AdamW"], {"master_weights": found})
    others = [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]
    other = AdamW(others, master_weights=wanted)
    other.load_state_dict(optimizer.state_dict())
    train(other, others, 1, first=3)
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in params_of(optimizer)]
    again = AdamW(fresh, master_weights=wanted)
    again.load_state_dict(optimizer.state_dict())
    for param in fresh:
        param.grad = None
    assert {other.state[param][masters.KEYS[wanted]].dtype for param in others} == {masters.DTYPES[wanted]}
    for param, state in ((param, optimizer.state[param]) for param in params_of(optimizer)):
        before = masters.read(param, state, masters.KEYS[found])
        changed = masters.converted(state, param, wanted)
        assert changed is not None
        after = masters.read(param, {masters.KEYS[wanted]: changed}, masters.KEYS[wanted])
        if wanted != "split8":
            assert_same_bits(after, before)
        else:  # half of 2^-16 of the number; 2^-16 where rounding would change the parameter
            assert ((after - before).abs() <= before.abs() * 2.0**-15).all()


def test_a_rule_that_counts_no_steps_counts_them_for_its_words() -> None:
    for case, options in ((ROWS["Lion"], {"state_dtype": "8bit"}), (ROWS["SGD"], {"rounding": "stochastic"})):
        params = new_params(torch.bfloat16, SHAPES[:CODED])
        optimizer = case.make(params, "default", **options)
        train(optimizer, params, 3)
        assert {float(optimizer.state[param]["step"]) for param in params} == {3.0}
    plain = new_params(torch.bfloat16, SHAPES)
    optimizer = fused_optim.Lion(plain)
    train(optimizer, plain, 1)
    assert {tuple(optimizer.state[param]) for param in plain} == {("exp_avg",)}


@pytest.mark.parametrize("name", ["Lion", "Muon"])
@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"rounding": "stochastic"}, {"master_weights": "split8"}])
def test_the_count_for_random_words_begins_where_a_checkpoint_has_none(name: str, options: dict[str, Any]) -> None:
    """torch's Muon keeps no step, and neither does a rule that counts none before it draws words."""
    shapes = SHAPES[:1]
    before = ROWS[name].make(new_params(torch.bfloat16, shapes), "default")
    train(before, params_of(before), 2)
    optimizer = ROWS[name].make(new_params(torch.bfloat16, shapes), "default", **options)
    optimizer.load_state_dict(before.state_dict())
    train(optimizer, params_of(optimizer), 1)
    (param,) = params_of(optimizer)
    assert float(optimizer.state[param]["step"]) == 1


def test_a_group_that_is_added_takes_part(caplog: pytest.LogCaptureFixture) -> None:
    params = new_params(torch.bfloat16, SHAPES)
    first = CODED - 1
    optimizer = AdamW(params[:first], state_dtype="8bit", master_weights="split8")
    train(optimizer, params[:first], 2)
    with caplog.at_level(logging.INFO, "fused_optim"):
        optimizer.add_param_group({"params": params[first:]})
    assert "exp_avg, exp_avg_sq of param_groups[1]['params'][1]: it has fewer than 4,096 elements" in caplog.text
    train(optimizer, params, 2, first=2)
    assert optimizer.state[params[first]]["exp_avg"].dtype == torch.int8


def test_rows_that_a_sparse_gradient_lists() -> None:
    """lazy_mode: codes and scales of listed rows are those of a dense step, all others stay."""
    rows = torch.tensor([3, 40, 41])
    weights = [*new_params(torch.bfloat16, [(64, 96)]), *new_params(torch.bfloat16, [(64, 96)])]
    options: dict[str, Any] = {"state_dtype": "8bit", "master_weights": "split8", "lazy_mode": True, "backend": "eager"}
    sparse, dense = (AdamW([weight], **options) for weight in weights)
    for weight, optimizer in zip(weights, (sparse, dense)):
        weight.grad = new_grad(weight, 0)
        optimizer.step()
    before = snapshot(sparse)[0]
    grad = new_grad(weights[0], 1)
    weights[0].grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad[rows], (64, 96), check_invariants=True)
    weights[1].grad = grad
    for optimizer in (sparse, dense):
        optimizer.step()
    others = torch.ones(64, dtype=torch.bool).index_fill(0, rows, False)
    for key, value in snapshot(sparse)[0].items():
        if value.ndim:
            assert_same_bits(value[rows], snapshot(dense)[0][key][rows], key)
            assert_same_bits(value[others], before[key][others], key)


# Refusals and what is said --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"state_dtype": "4bit"}, "state_dtype='4bit' is not .*'8bit'"),
        ({"state_dtype": torch.float64}, "state_dtype=torch.float64 is not"),
        ({"state_dtype": {"exp_avg": "4bit"}}, "state_dtype='4bit' of 'exp_avg' is not"),
        ({"state_dtype": {"exp_avgs": "8bit"}}, "'exp_avgs' is no state; .* are 'exp_avg', 'exp_avg_sq'"),
        ({"state_dtype": {"step": "8bit"}}, "'step' is a number for each parameter"),
        ({"rounding": "up"}, "rounding='up' is not 'nearest' or 'stochastic'"),
        ({"seed": -1}, "seed=-1 is no integer"),
        ({"seed": 2**32}, "seed=4294967296 is no integer"),
        ({"seed": 1.0}, "seed=1.0 is no integer"),
        ({"seed": True}, "seed=True is no integer"),
        ({"seed": None}, "seed=None is no integer"),
        ({"master_weights": "split16"}, "master_weights='split16' is not 'float32', 'split', 'split8'"),
    ],
    ids=str,
)
def test_other_words_are_refused(options: dict[str, Any], text: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=text):
        AdamW(new_params(dtype, SHAPES), **options)


def test_what_cannot_be_codes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'8bit': param_groups\[0\]\['params'\]\[1\] is torch.int64"):
        AdamW([torch.ones(64, 64), torch.ones(64, 64, dtype=torch.int64)], state_dtype="8bit")
    with pytest.raises(ValueError, match=r"'split8' keeps 8 of the 16 bits.* is torch.float16"):
        AdamW(new_params(torch.float16, SHAPES), master_weights="split8")
    params = new_params(torch.float32, SHAPES)
    optimizer = AdamW(params, state_dtype="8bit", differentiable=True)
    with pytest.raises(RuntimeError, match=r"differentiable, which .* states of 8 bits are not"):
        train(optimizer, params, 1)
    assert not optimizer.state


def broken_dicts() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "no scale": lambda state: state.pop("exp_avg_scale"),
        "another shape": lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][1:]),
        "another dtype": lambda state: state.update(exp_avg_scale=state["exp_avg_scale"].float()),
        "swapped codes": lambda state: state.update(exp_avg=state["exp_avg"].to(torch.uint8)),
    }


@pytest.mark.sparingly(fault="another shape")
@pytest.mark.parametrize("fault", broken_dicts())
def test_scales_that_do_not_fit_their_codes_are_refused(fault: str, any_backend: str) -> None:
    optimizer = trained(ROWS["AdamW"], {"state_dtype": "8bit", "backend": any_backend}, 1)
    before = snapshot(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    broken_dicts()[fault](saved["state"][1])
    with pytest.raises(
        ValueError, match=r"the state of param_groups\[0\]\['params'\]\[1\] in the state dict cannot be"
    ):
        optimizer.load_state_dict(saved)
    assert_same_snapshots(snapshot(optimizer), before)
    broken_dicts()[fault](optimizer.state[params_of(optimizer)[1]])
    with pytest.raises(RuntimeError, match=r"the state of param_groups\[0\]\['params'\]\[1\] cannot be read"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
@pytest.mark.parametrize(
    "other",
    [lambda old: old.t().contiguous().t(), lambda old: torch.ones(2, 3), lambda old: torch.ones(96, 64)],
    ids=["transposed", "smaller", "of another shape"],
)
def test_a_parameter_of_another_shape_or_layout(other: Callable[[Tensor], Tensor], name: str, backend: str) -> None:
    """Which states are codes, whose steps are counted, and from which words, is asked again."""
    shapes = SHAPES[:1]
    options = {"state_dtype": "8bit", "backend": backend}
    optimizer = ROWS[name].make(new_params(shapes=shapes), "default", **options)
    (param,) = params_of(optimizer)
    train(optimizer, [param], 2)
    param.data, param.grad = other(param.data), None
    if param.shape != shapes[0]:
        optimizer.state.clear()
    twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.preserve_format))
    fresh = ROWS[name].make([twin], "default", **options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, [param], 2, first=2)
    train(fresh, [twin], 2, first=2)
    assert_same_results(optimizer, fresh)
    codes = param.numel() > 4096 and param.is_contiguous()
    assert optimizer.state[param]["exp_avg"].dtype == (torch.int8 if codes else torch.float32)


def test_what_stays_wider_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Linear(64, 128)
    module.logit_scale = torch.nn.Parameter(torch.tensor(2.6))
    with caplog.at_level(logging.INFO, "fused_optim"):
        optimizer = AdamW(module.named_parameters(), state_dtype="8bit")
    said = [record for record in caplog.records if "wider than 8 bits" in record.message]
    assert [record.levelno for record in said] == [logging.INFO]
    for place, name in enumerate(("bias", "logit_scale"), 1):
        who = f"exp_avg, exp_avg_sq of '{name}' (param_groups[0]['params'][{place}])"
        assert f"{who}: it has fewer than 4,096 elements" in said[0].message
    assert "'weight'" not in said[0].message
    train(optimizer, params_of(optimizer), 1)
    assert {name: str(optimizer.state[param]["exp_avg"].dtype) for name, param in module.named_parameters()} == {
        "weight": "torch.int8",
        "bias": "torch.float32",
        "logit_scale": "torch.float32",
    }
    out = io.StringIO()
    fused_optim.describe(optimizer, file=out)
    (line,) = (line for line in out.getvalue().splitlines() if "logit_scale" in line)
    assert "float32" in line


def test_describe_shows_formats_and_bytes_before_and_after_a_step() -> None:
    module = torch.nn.Linear(64, 128).bfloat16()
    optimizer = AdamW(module.named_parameters(), state_dtype="8bit", master_weights="split8")
    tables = []
    for _ in range(2):
        out = io.StringIO()
        fused_optim.describe(optimizer, file=out)
        tables.append(out.getvalue())
        module(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert tables[0] == tables[1]
    elements = 64 * 128
    weight, bias = tables[0].splitlines()[-2:]
    assert f"{3 * elements + 2 * elements // 32 + 4:,}" in weight
    assert "int8: exp_avg, param_remainder" in weight
    assert f"{(4 + 4 + 1) * 128 + 4:,}" in bias
