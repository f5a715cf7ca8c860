"""What is the Triton backend's alone, without a GPU: its kernels run in Triton's interpreter, on CPU tensors.

Everything is the product: plan, table, launches, kernels. Results are test_phases.py's; what the compiler makes of the
kernels is test_triton_offline.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    RULES,
    assert_near,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    eighths,
    inner,
    new_params,
    params_of,
    set_grads,
    snapshot,
    spelled,
    step_exactly,
    train,
)
from torch.nn import Parameter

from fused_optim import LARC, SGD, AdamW, ClipGradByGlobalNorm, ClipGradByNorm, row
from fused_optim.backends import choice, extension
from fused_optim.plan import python_plan
from fused_optim.state import codec, masters

pytestmark = pytest.mark.interpreted

TILE, CHUNK = 1024, 8 * 1024  # kernels/columns.py, kernels/reduce.py
# Around the 16-byte vector and the tile.
RAGGED = tuple((n,) for n in (0, 1, 3, 5, 9, 1023, 1024, 1025, 2049))


@pytest.fixture(params=["compiled plan", "python plan"])
def either_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it before the Triton optimizer is made, for a plan that reads through the extension or without it."""

    def choose() -> None:
        if request.param == "python plan":
            monkeypatch.setattr(extension, "_C", None)

    return choose


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_C", None)


def phases_of(optimizer: Any) -> Any:
    ((_, _, phases),) = inner(optimizer).plan.native._devices
    return phases


def launches_of(optimizer: Any, step: Callable[[], None] | None = None) -> int:
    """How many kernels a step launches; the refresh of the table is a copy."""
    before = phases_of(optimizer).launches
    (step or optimizer.step)()
    return phases_of(optimizer).launches - before


# Launches ---------------------------------------------------------------------------------------------------------


def test_the_plan_in_python_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, all_native: None) -> None:
    optimizers = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(extension, "_C", None)
        optimizers.append(RULES["AdamW all"](new_params(shapes=RAGGED), backend="triton"))
        train(optimizers[-1], params_of(optimizers[-1]), 2)
        assert isinstance(optimizers[-1].plan.native._reader, python_plan.PythonPlan) != compiled
    assert_same_results(*optimizers)


def test_mixed_dtypes_are_a_bucket_each(all_native: None) -> None:
    optimizers = []
    for backend in ("triton", "cpu"):
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        params = [param for dtype in dtypes for param in new_params(dtype, RAGGED)]
        optimizers.append(AdamW(params, backend=backend))
        train(optimizers[-1], params, 2)
    assert_same_results(*optimizers)
    assert launches_of(optimizers[0]) == 1 + 3  # prepare, and apply in each


def test_hundreds_of_tensors_and_groups(either_plan: Callable[[], None], all_native: None) -> None:
    optimizers = []
    for backend in ("cpu", "triton"):
        if backend == "triton":
            either_plan()
        params = new_params(torch.float32, [(1 + 7 * i % 23,) for i in range(200)])
        groups = [{"params": [param], "lr": 1e-3 * (1 + i % 5)} for i, param in enumerate(params)]
        optimizers.append(AdamW(groups, backend=backend))
        train(optimizers[-1], params, 1)
    assert_same_results(*optimizers)
    set_grads(params_of(optimizers[1]), 7)
    assert launches_of(optimizers[1]) == 2


@pytest.mark.parametrize(
    ("rule", "options", "launches"),
    [
        ("SGD no momentum", {}, 2),  # prepare, apply
        ("SGD all", {}, 2),
        ("Lion decay", {}, 2),
        ("SGD no momentum", {"grad_clip": ClipGradByGlobalNorm(1.0)}, 4),  # reduce, sums of large tensors
        ("NovoGrad decay", {}, 4),
        ("LARC default", {}, 4),
        ("LARS decay", {"grad_clip": ClipGradByNorm(1.0)}, 4),
        ("LAMB default", {}, 6),  # accumulate, directions
    ],
    ids=spelled,
)
def test_launches(rule: str, options: dict[str, Any], launches: int) -> None:
    ours = RULES[rule]([Parameter(torch.ones(n)) for n in (3, 1025, CHUNK + 1)], backend="triton", **options)
    step_exactly(ours)
    for i, param in enumerate(params_of(ours)):
        param.grad = eighths(tuple(param.shape), param.dtype, i)
    assert launches_of(inner(ours)) == launches


def test_the_chunks_of_long_rows_are_longer(monkeypatch: pytest.MonkeyPatch, all_native: None) -> None:
    import triton.language as tl
    from fused_optim.kernels import layout, reduce

    most = tl.constexpr(3)
    for module in (layout, reduce):
        monkeypatch.setattr(module, "MOST_CHUNKS", most)
    results = []
    for backend in ("triton", "cpu"):
        sizes = (5, CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 77)
        params = [Parameter(eighths((n,), torch.float32, n)) for n in sizes]
        results.append(RULES["LARC default"](params, backend=backend))
        step_exactly(results[-1])
    assert phases_of(results[0])._layout.totals[:, 2].tolist() == [3, 3]
    assert_same_results(*map(inner, results))


def test_directions_of_long_rows_are_added_in_pieces(monkeypatch: pytest.MonkeyPatch, all_native: None) -> None:
    import triton.language as tl
    from fused_optim.kernels import layout, prepare

    monkeypatch.setattr(prepare, "ADDED_TILES", tl.constexpr(2))
    for name, number in (("ADDED_TILES", 2), ("FEW_TILES", 3), ("MOST_PIECES", 4)):
        monkeypatch.setattr(layout, name, tl.constexpr(number))
    results, launches = [], []
    for backend in ("triton", "cpu"):
        # Of 1, 3, 4, and of 11 tiles: these are too many for pieces of two.
        params = [Parameter(eighths((n,), torch.float32, n)) for n in (5, 3 * TILE, 4 * TILE, 10 * TILE + 77)]
        results.append(RULES["LAMB default"](params, backend=backend))
        step_exactly(results[-1])
        if backend == "triton":
            launches.append(launches_of(results[-1], lambda: step_exactly(results[0], 200)))
        else:
            step_exactly(results[-1], 200)
    of_triton = phases_of(results[0])._layout
    assert of_triton.pieces[:, 1].tolist() == [2, 2, 3, 3, 3, 2]
    assert of_triton.directions["lamb"][:, 2].tolist() == [1, 3, 2, 4]
    assert_near(*results)
    norms = [optimizer.last_norms.trust_ratio for optimizer in results]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    assert launches == [7]  # one more than without


def test_a_capture_for_which_nothing_is_laid_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_optim.kernels import refresh

    params = new_params()
    set_grads(params, 0)
    optimizer = AdamW(params, backend="triton", capturable=True)
    before = [param.detach().clone() for param in params]
    with monkeypatch.context() as patch:
        patch.setattr(refresh.DeviceTable, "captured", lambda self: True)
        with pytest.raises(RuntimeError, match=r"not ready.*take one step"):
            optimizer.step()
    assert not optimizer.state
    assert all(map(torch.equal, params, before))
    optimizer.step()
    assert len(optimizer.state) == len(params)


def test_several_rules_share_a_step(all_native: None) -> None:
    results = []
    for backend in ("triton", "cpu"):
        groups = [
            {"params": [Parameter(eighths((n,), dtype, n)) for n in (3, TILE + 1)], "momentum": momentum}
            for momentum in (0.0, 0.9)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        optimizer = LARC(SGD(groups, 0.1, weight_decay=0.125, backend=backend))
        step_exactly(optimizer)
        results.append(inner(optimizer))
    assert_same_results(*results)
    step_exactly(results[0])
    assert launches_of(results[0], lambda: step_exactly(results[0])) <= 3 + 2 * 4


def test_the_order_of_rows_does_not_change_the_global_norm() -> None:
    """Nor, then, the split into groups."""
    from fused_optim.kernels import prepare, table

    rows = 1000
    generator = torch.Generator().manual_seed(3)
    squares = torch.rand(rows, generator=generator, dtype=torch.float64).pow(8)
    words = torch.zeros(len(table.HEADER) + len(table.ROW) * rows, dtype=torch.int64)
    for field in ("active", "clipped"):
        begin = len(table.HEADER) + table.ROW.index(field) * rows
        words[begin : begin + rows] = 1
    results = set()
    for order in (torch.arange(rows), *(torch.randperm(rows, generator=generator) for _ in range(5))):
        sums = torch.zeros(rows, 6, dtype=torch.float64)
        sums[:, 0] = squares[order]
        total = torch.zeros(1, dtype=torch.float64)
        prepare.grad_sq_kernel[(1,)](words, 0, rows, sums, total)
        results.add(total.item())
    assert results == {math.fsum(squares.tolist())}


# The table --------------------------------------------------------------------------------------------------------


def test_only_what_has_changed_is_sent(either_plan: Callable[[], None]) -> None:
    either_plan()
    params = new_params(shapes=[(5,)] * 50)
    optimizer = AdamW(params, backend="triton")
    train(optimizer, params, 1)
    phases = phases_of(optimizer)
    before = phases.table.sent
    optimizer.step()
    assert phases.table.sent == before  # the same gradients
    kept = [param.grad for param in params]
    set_grads(params, 1)
    assert len(kept) == 50
    optimizer.step()
    assert phases.table.sent - before <= 2 * len(params)  # addresses of gradients
    before = phases.table.sent
    optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.step()
    assert 0 < phases.table.sent - before < 100  # one group


def test_python_and_cpp_know_the_same_rules() -> None:
    """Names, states in order, and where the hyperparameters stand; and the table that both write."""
    from fused_optim.kernels import apply, phases, table

    assert extension._C is not None
    theirs = extension._C.rules()
    assert phases.rules().keys() == theirs.keys()
    for name, rule in phases.rules().items():
        states, hyper = theirs[name]
        assert tuple(map(tuple, states)) == rule.states
        assert [tuple(field) for field in hyper] == [
            (field.key, field.index, field.choices, field.optional) for field in rule.hyper
        ]
        assert len(rule.hyper) == len(rule.hyper_type._fields)
        assert rule.hyper_type._fields[0] == "lr"
        assert 4 + rule.scalar_count <= apply.KEY.value
    assert extension._C.table_fields() == (table.GROUP, table.ROW)
    assert (table.COLUMNS, table.MAX_STATES, table.MAX_HYPER) == (row.COLUMNS, row.MAX_STATES, row.MAX_HYPER)
    columns = (table.PARAM, table.GRAD, table.MASTER, table.FIRST_STATE)
    assert [column.value for column in columns] == [row.PARAM, row.GRAD, row.MASTER, row.FIRST_STATE]
    formats = (table.FLOAT32, table.FLOAT64, table.BFLOAT16, table.FLOAT16, table.REMAINDER, table.INT8, table.UINT8)
    assert [number.value for number in formats] == list(row.DTYPES.values())


# Addresses, which are those of a run.
PLACES = ("grad", "param", "master", "counter", *(f"{kind}{i}" for kind in ("state", "scale") for i in range(4)))


@pytest.mark.parametrize(
    "options",
    [{"master_weights": "split"}, {"master_weights": "split8", "state_dtype": "8bit", "seed": 3}],
    ids=spelled,
)
@pytest.mark.parametrize("rule", ["SGD nesterov", "LARC NovoGrad", "LAMB default", "LARS kozistr", "Lion decay"])
def test_both_plans_write_the_same_table(rule: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_optim.kernels import table

    words = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(extension, "_C", None)
        shapes = (*RAGGED, (129, 32))
        params = [Parameter(eighths(shape, torch.bfloat16, i)) for i, shape in enumerate(shapes)]
        optimizer = RULES[rule](params, backend="triton", lr_scale=[0.5] * len(params), **options)
        step_exactly(optimizer)
        params[3].grad = None
        optimizer.step()
        phases = phases_of(optimizer)
        groups = phases.words[: phases.table.rows_at - phases.table.groups_at].tolist()
        rows = {name: phases.table.row_field(field).tolist() for field, name in enumerate(table.ROW)}
        words.append(
            (groups, {name: [word != 0 for word in row] if name in PLACES else row for name, row in rows.items()})
        )
    assert words[0] == words[1]
    draws = options["master_weights"] == "split8"
    assert all(word & table.DRAWS == (table.DRAWS if draws else 0) for word in words[0][1]["storages"])
    assert words[0][1]["seed"] == [options.get("seed", 0)] * len(shapes)
    assert any(words[0][1]["scale0"] + words[0][1]["scale1"] + words[0][1]["scale2"]) == draws
    assert any(words[0][1]["counter"]) == (draws and rule == "Lion decay")


# The plan in Python -----------------------------------------------------------------------------------------------


def stepped(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """An optimizer on the plan in Python after two steps."""
    without_extension(monkeypatch)
    optimizer = AdamW(new_params(shapes=[(5,), (3, 4), (1,)]), backend="triton", **options)
    train(optimizer, params_of(optimizer), 2)
    return optimizer


def test_addresses_alone_change_on_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepped(monkeypatch)
    reads: list[Any] = []
    rows = optimizer.plan.native._reader._rows
    monkeypatch.setattr(rows, "read", lambda state: reads.append(state) or [])
    for _ in range(3):
        set_grads(params_of(optimizer), 5)
        optimizer.step()
    assert reads == []


def change_param_data(optimizer: Any) -> None:
    param = params_of(optimizer)[0]
    param.data = param.data.clone()


def replace_state(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[1]]
    state["exp_avg"] = state["exp_avg"].clone()


def replace_states(optimizer: Any) -> None:
    param = params_of(optimizer)[0]
    optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}


def transpose_gradient(optimizer: Any) -> None:
    param = params_of(optimizer)[1]
    param.grad = torch.ones(4, 3).t()


def negative_gradient(optimizer: Any) -> None:
    param = params_of(optimizer)[2]
    param.grad = torch._neg_view(torch.ones(1))


def narrow_state(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[1]]
    state["exp_avg"] = state["exp_avg"].to(torch.float64)


def share_state(optimizer: Any) -> None:
    first, second = params_of(optimizer)[0], Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [second]})
    second.grad = torch.ones(5)
    optimizer.state[second] = optimizer.state[first]


def no_gradient(optimizer: Any) -> None:
    params_of(optimizer)[1].grad = None


def frozen(optimizer: Any) -> None:
    params_of(optimizer)[1].requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        change_param_data,
        replace_state,
        replace_states,
        transpose_gradient,
        negative_gradient,
        narrow_state,
        share_state,
        no_gradient,
        frozen,
    ],
    ids=lambda change: change.__name__,
)
def test_changes_are_seen_without_the_extension(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user may do between two steps gives the witness's results; with the extension too."""
    results = []
    for compiled, backend in ((True, "eager"), (True, "triton"), (False, "triton")):
        if not compiled:
            without_extension(monkeypatch)
        optimizer = AdamW(new_params(shapes=[(5,), (3, 4), (1,)]), backend=backend)
        train(optimizer, params_of(optimizer), 2)
        for step in (2, 3):
            set_grads(params_of(optimizer), step)
            if step == 2:
                change(optimizer)
            optimizer.step()
        results.append(optimizer)
    assert_same_results(results[0], results[1])
    assert_same_results(results[0], results[2])


def test_a_rule_without_states_has_a_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)
    params = new_params(shapes=[(5,), (3, 4)])
    optimizer = SGD(params, 0.5, backend="triton")
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        before = params[0].detach().clone()
        optimizer.state.clear()
        optimizer.step()
        assert_same_bits(params[0], before - 0.5)


def test_a_group_may_hold_more_than_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a user's own, which are replaced: nothing of it is compared as a number."""
    optimizer = stepped(monkeypatch)
    for _ in range(3):
        optimizer.param_groups[0]["mask"] = torch.ones(4)
        train(optimizer, params_of(optimizer), 1)


def test_a_parameter_of_another_layout_calls_for_a_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepped(monkeypatch)
    plan = optimizer.plan
    param = params_of(optimizer)[1]
    param.data = torch.ones(4, 3).t()
    param.grad = torch.ones(4, 3).t()
    optimizer.step()
    assert optimizer.plan is not plan
    assert bool((param != 1).all())


@pytest.mark.parametrize("offset", [0, 4])
def test_a_storage_without_memory_is_refused(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepped(monkeypatch)
    params = params_of(optimizer)
    set_grads(params, 2)
    before = snapshot(optimizer)
    whole = torch.ones(offset + params[0].numel())
    params[0].grad = whole[offset:].view(params[0].shape)
    whole.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was resized to 0"):
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)


def test_overlapping_parameters_go_to_the_witness(monkeypatch: pytest.MonkeyPatch, fallbacks: list[str]) -> None:
    without_extension(monkeypatch)
    memory = torch.ones(6)
    params = [Parameter(memory[:4]), Parameter(memory[2:]), Parameter(torch.ones(3))]
    optimizer = AdamW(params, backend="triton")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(fallbacks) == 1
    assert "shares memory" in fallbacks[0]
    torch.testing.assert_close(params[2].detach(), torch.full((3,), 1 - 1e-5 - 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        ("lr", "fast", TypeError, r"param_groups\[0\]\['lr'\] must hold numbers"),
        ("betas", (0.9,), TypeError, r"param_groups\[0\]\['betas'\] must hold numbers"),
        ("decay_scaling", "none", ValueError, r"param_groups\[0\]\['decay_scaling'\] must be one of .*, got 'none'"),
        ("eps", None, TypeError, r"param_groups\[0\]\['eps'\] must hold numbers"),
    ],
)
def test_hyperparameters_that_are_none_are_refused(
    key: str, value: Any, error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = stepped(monkeypatch)
    optimizer.param_groups[0][key] = value
    set_grads(params_of(optimizer), 2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert_same_snapshots(snapshot(optimizer), before)


def test_masters_follow_a_parameter_that_somebody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for compiled in (True, False):
        if not compiled:
            without_extension(monkeypatch)
        params = new_params(torch.bfloat16, [(5,), (3, 4)])
        optimizer = AdamW(params, backend="triton" if not compiled else "cpu", master_weights="float32")
        train(optimizer, params, 2)
        with torch.no_grad():
            params[0].fill_(2.0)
        train(optimizer, params, 2, first=2)
        results.append(optimizer)
    assert_same_results(*results)


# Numbers of a byte, and random words ---------------------------------------------------------------------------


def special_numbers(count: int, seed: int) -> torch.Tensor:
    """Float32 numbers of every exponent: groups that a few of them fill, and what is no ordinary number in each tenth
    group."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    shared = bits.view(-1, 32)[:, :1] & 0x7F800000
    near = (bits.view(-1, 32) & ~0x7F800000) | (shared - (bits.view(-1, 32) & 3 << 23)).clamp(0, 0x7F000000)
    ordinary = torch.arange(count // 32).unsqueeze(1) % 10 != 0
    numbers = torch.where(ordinary, near, bits.view(-1, 32)).flatten().view(torch.float32)
    for place, number in enumerate((math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-38, 3.4e38)):
        numbers[320 * 7 + place :: 320 * 11] = number
    numbers[32 * 5 : 32 * 6] = 0.0
    numbers[32 * 15 : 32 * 16] = math.nan
    return numbers


def words_for(numbers: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, numbers.shape, generator=generator).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=spelled)
def test_codes_are_the_witness_s(dtype: torch.dtype) -> None:
    from support import triton_codec

    every = torch.arange(256, dtype=torch.int32).to(dtype)  # each code with each exponent, in groups of its own
    codes, exponents = every.repeat(256), torch.arange(256, dtype=torch.uint8).repeat_interleave(8)
    assert_same_bits(triton_codec.decode(codes, exponents), codec.decode(codes, exponents))
    numbers = special_numbers(1 << 16, 1)
    if dtype == torch.uint8:
        numbers = torch.where(numbers == 0, numbers, numbers.abs())
    for seed in range(2):
        words = words_for(numbers, seed)
        mine = triton_codec.encode(numbers, dtype, words)
        theirs = codec.encode(numbers.view(-1, 32), dtype, words.view(-1, 32))
        for found, expected in zip(mine, theirs):
            assert_same_bits(found, expected.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=spelled)
def test_stochastic_rounding_is_the_witness_s(dtype: torch.dtype) -> None:
    from support import triton_codec

    numbers = special_numbers(1 << 16, 2)
    numbers[::3] = numbers[::3].clamp(-1e5, 1e5)
    numbers[::4] = numbers[::4] * 1e-6  # subnormal in float16
    words = words_for(numbers)
    assert_same_bits(
        triton_codec.round_stochastically(numbers, dtype, words), codec.round_stochastically(numbers, dtype, words)
    )


def test_masters_of_24_bits_are_the_witness_s() -> None:
    from support import triton_codec

    numbers = special_numbers(1 << 16, 3)
    words = words_for(numbers)
    param, remainder = triton_codec.split8(numbers, words)
    for found, expected in zip((param, remainder), masters.remainder8_of(numbers, words)):
        assert_same_bits(found, expected)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for number in (-128, -1, 1, 127):
        remainders = torch.full(every.shape, number, dtype=torch.int8)
        state = {"param_remainder": remainders}
        assert_same_bits(triton_codec.whole8(every, remainders), masters.read(every, state, "param_remainder"))


@pytest.mark.parametrize("first", [0, 5, 2**31 - 7, 2**32 - 500, 2**32, 2**40 + 2**32 - 3])
def test_words_are_the_witness_s(first: int) -> None:
    from support import triton_codec

    for seed, step, place in ((0, 1, 0), (2**32 - 1, 70_000, 12), (7, 3, 2**20)):
        key = codec.random_key(seed, step, place, torch.device("cpu"))
        found = triton_codec.words_of(seed, step, place, first, 1024)
        assert_same_bits(found, codec.random_words(torch.arange(first, first + 1024), key))


@pytest.mark.parametrize("rule", ["AdamW all", "Lion decay"])
def test_the_steps_that_random_words_take_are_counted_on_the_device(rule: str, all_native: None) -> None:
    """A replay of a captured step launches the same kernels over the same table, and no plan is refreshed."""
    results = []
    for backend in ("triton", "cpu"):
        params = [Parameter(eighths((129, 32), torch.bfloat16, 1)), Parameter(eighths((40,), torch.bfloat16, 2))]
        optimizer = RULES[rule](params, backend=backend, state_dtype="8bit", rounding="stochastic")
        step_exactly(optimizer)
        if backend == "triton":
            phases = phases_of(optimizer)
            for _ in range(2):
                phases.apply(optimizer.plan._step)
        else:
            for _ in range(2):
                optimizer.step()
        results.append(optimizer)
    assert_same_results(*results)
    assert {float(state["step"]) for state in results[0].state.values()} == {3.0}


def replace_scale(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["exp_avg_scale"] = state["exp_avg_scale"].clone()


def replace_count(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    state["step"] = state["step"].clone()


def decode_state(optimizer: Any) -> None:
    param = params_of(optimizer)[0]
    state = optimizer.state[param]
    state["exp_avg"] = codec.decode(state["exp_avg"], state.pop("exp_avg_scale"))


def share_scale(optimizer: Any) -> None:
    first, second = (optimizer.state[param] for param in params_of(optimizer)[:2])
    second["exp_avg_scale"] = first["exp_avg_scale"]


@pytest.mark.parametrize(
    "change", [replace_scale, replace_count, decode_state, share_scale], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("rule", ["AdamW all", "Lion decay"])
def test_changes_of_codes_are_seen(rule: str, change: Any, either_plan: Callable[[], None]) -> None:
    results = []
    for backend in ("eager", "triton"):
        if backend == "triton":
            either_plan()
        params = [Parameter(eighths((129, 32), torch.bfloat16, i)) for i in range(2)]
        optimizer = RULES[rule](params, backend=backend, state_dtype="8bit", master_weights="split8")
        for step in range(3):
            if step == 2:
                change(optimizer)
            step_exactly(optimizer, 10 * step)
        results.append(optimizer)
    assert_same_results(*results)


# Which backend serves ---------------------------------------------------------------------------------------------


def test_it_is_said_why_triton_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def reason() -> str | None:
        choice._why_no_triton.cache_clear()
        return choice.why_missing("triton")

    assert reason() is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA or ROCm device is there" in str(reason())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def unusable() -> Any:
        raise RuntimeError("0 active drivers")

    target = SimpleNamespace(active=SimpleNamespace(get_current_target=unusable))
    monkeypatch.setattr(triton.runtime, "driver", target)
    assert "no driver that it can use: 0 active drivers" in str(reason())
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "triton 3.3.1 is too old: install triton>=3.4" in str(reason())
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "cannot be imported" in str(reason())
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: triton cannot be imported"):
        AdamW([Parameter(torch.ones(2))], backend="triton")
    monkeypatch.undo()
    choice._why_no_triton.cache_clear()


def test_single_tensors_that_it_cannot_take_go_through_the_witness(fallbacks: list[str]) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.complex64))]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdamW(params, backend="triton")
    optimizer.step()
    (line,) = fallbacks
    assert "the eager path serves" in line
    assert "complex64" in line


def test_a_backend_that_is_passed_over_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "choose", lambda device, forced=None: ("triton", "no cuda backend: the reason"))
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with caplog.at_level(logging.WARNING, logger="fused_optim"):
        AdamW([param]).step()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "AdamW: the triton backend serves parameters on cpu: no cuda backend: the reason"
