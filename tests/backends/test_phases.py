"""What the phases of every GPU backend are held to: the results of the cpu backend.

Each test has a column: CUDA's phases compiled for the host (tests/cuda_on_host), Triton's in its interpreter with
either plan, and both on a GPU (`pytest -m gpu`). On the host the results are the same bits, except where sums over a
tensor are no exact numbers. What is one backend's alone stands in test_cuda_on_host.py, test_triton.py and test_gpu.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    OF_EACH_KIND,
    RULES,
    assert_near,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    each_dtype,
    eighths,
    inner,
    new_grad,
    new_params,
    params_of,
    set_grads,
    snapshot,
    spelled,
    step_exactly,
    train,
)
from torch import Tensor
from torch.nn import Parameter

from fused_optim import LAMB, LARC, SGD, Adam, AdamW, ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue, GradScaler
from fused_optim.backends import extension

# csrc/cuda/layout.h, kernels/columns.py, kernels/reduce.py
TILE, BY_WARP = 1024, 4 * 1024
CUDA_CHUNK, TRITON_CHUNK = 32 * 1024, 8 * TILE

Shapes = tuple[tuple[int, ...], ...]


def flat(*sizes: int) -> Shapes:
    return tuple((size,) for size in sizes)


@dataclass(frozen=True)
class Column:
    """A backend, and where it runs."""

    backend: str
    device: str
    exact: bool  # the same bits as the cpu backend
    # Around the vector, the warp's strip, the tile, a block's tiles; around the pieces that norms are summed in.
    ragged: Shapes
    norms: Shapes
    chunk: int  # elements of a row that one program, or block, adds up
    compiled_plan: bool = True

    @contextmanager
    def here(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if not self.compiled_plan:
                patch.setattr(extension, "_C", None)
            yield

    def both(self, make: Callable[[str, str], Any], work: Callable[[Any], Any] = step_exactly) -> tuple[Any, Any]:
        """Two optimizers that `make` makes for a backend and a device and `work` has worked with: here, on the cpu."""
        twin = make("cpu", "cpu")
        work(twin)
        with self.here():
            ours = make(self.backend, self.device)
            work(ours)
        return ours, twin

    def both_of(
        self, rule: str, shapes: Shapes, dtype: torch.dtype, work: Callable[[Any], Any] = step_exactly, **options: Any
    ) -> tuple[Any, Any]:
        """With parameters whose squares add up exactly, in whatever order."""

        def make(backend: str, device: str) -> Any:
            params = [Parameter(eighths(shape, dtype, i).to(device)) for i, shape in enumerate(shapes)]
            return RULES[rule](params, backend=backend, device=device, **options)

        return self.both(make, work)

    def agree(self, ours: Any, twin: Any, *, exact: bool = True) -> None:
        if self.exact and exact:
            assert_same_results(inner(ours), inner(twin))
        else:
            assert_near(ours, twin)


MANY = flat(0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 129, 255, 257, 1023, 1024, 1025, 8191, 8193, BY_WARP + 1)
FEW = flat(0, 1, 3, 5, 9, 1023, 1024, 1025, 2049)  # an interpreter takes its time
MANY_NORMS = flat(
    *(0, 1, 5, BY_WARP - 1, BY_WARP, BY_WARP + 1, CUDA_CHUNK - 1, CUDA_CHUNK, CUDA_CHUNK + 1, 2 * CUDA_CHUNK + 77)
)
FEW_NORMS = flat(0, 1, 5, TILE, TRITON_CHUNK + 1)
COLUMNS = {
    "cuda on the host": Column("cuda", "cpu", True, MANY, MANY_NORMS, CUDA_CHUNK),
    "triton interpreted": Column("triton", "cpu", True, FEW, FEW_NORMS, TRITON_CHUNK),
    "triton interpreted, python plan": Column("triton", "cpu", True, FEW, FEW_NORMS, TRITON_CHUNK, compiled_plan=False),
    "cuda": Column("cuda", "cuda", False, MANY, MANY_NORMS, CUDA_CHUNK),
    "triton": Column("triton", "cuda", False, MANY, MANY_NORMS, TRITON_CHUNK),
}
MARKS: dict[str, tuple[Any, ...]] = {
    "cuda on the host": (pytest.mark.requires("g++"),),
    "triton interpreted": (pytest.mark.interpreted,),
    "triton interpreted, python plan": (pytest.mark.interpreted,),
    "cuda": (pytest.mark.gpu,),
    "triton": (pytest.mark.gpu,),
}


def columns(*names: str) -> list[Any]:
    return [pytest.param(name, marks=MARKS[name]) for name in names]


@pytest.fixture(params=columns(*(name for name, column in COLUMNS.items() if column.compiled_plan)))
def column(request: pytest.FixtureRequest) -> Column:
    if request.param == "cuda on the host":
        request.getfixturevalue("on_host")
    return COLUMNS[request.param]


# The plan in Python, too.
each_column = pytest.mark.parametrize("column", columns(*COLUMNS), indirect=True)


def times(steps: int, first: int = 0, scale: float = 1.0) -> Callable[[Any], None]:
    """So many steps, with gradients whose elements span eight decades."""

    def work(optimizer: Any) -> None:
        for step in range(first, first + steps):
            set_grads(params_of(optimizer), step, scale)
            optimizer.step()

    return work


# Every rule, dtype and storage ------------------------------------------------------------------------------------


def each_rule_of_a_column(*dtypes: torch.dtype, rules: Collection[str]) -> pytest.MarkDecorator:
    """Crosses columns, rules and dtypes.

    An interpreter runs every rule in float32 and one of each kind in every dtype; behind the plan in Python, which
    launches the same kernels, one of each kind in bfloat16. The rest there is slow.
    """
    parameters = []
    for name, rule, dtype in itertools.product(COLUMNS, rules, dtypes):
        if COLUMNS[name].compiled_plan:
            daily = rule in OF_EACH_KIND or dtype == torch.float32
        else:
            daily = rule in OF_EACH_KIND and (dtype == torch.bfloat16 or len(dtypes) == 1)
        marks = (*MARKS[name], *([pytest.mark.slow] if "interpreted" in name and not daily else []))
        parameters.append(pytest.param(name, rule, dtype, id=f"{name}-{rule}-{spelled(dtype)}", marks=marks))
    return pytest.mark.parametrize(("column", "rule", "dtype"), parameters, indirect=["column"])


@pytest.mark.every("rule")
@each_rule_of_a_column(*DTYPES, rules=RULES)
def test_every_rule_and_dtype(column: Column, rule: str, dtype: torch.dtype, all_native: None) -> None:
    """One step whose sums are exact; rules without sums go on with gradients of any size."""

    def work(optimizer: Any) -> None:
        step_exactly(optimizer)
        if not RULES[rule].sums:
            times(2)(optimizer)

    ours, twin = column.both_of(rule, (*column.ragged, (column.chunk + 77,)), dtype, work)
    assert inner(ours).backend == column.backend
    # In float64 Triton's logarithms are another library's.
    same_scalars = dtype != torch.float64 or column.backend == "cuda"
    column.agree(ours, twin, exact=same_scalars and not RULES[rule].directions)
    if column.exact and RULES[rule].directions and same_scalars:  # which move the parameters alone
        for mine, theirs in zip(snapshot(ours), snapshot(twin), strict=True):
            for key in mine.keys() - {"param"}:
                assert_same_bits(mine[key], theirs[key], key)
    if dtype == torch.float64 and not RULES[rule].sums:
        for mine, theirs in zip(snapshot(ours), snapshot(twin), strict=True):
            for key, value in mine.items():
                torch.testing.assert_close(value.cpu(), theirs[key], rtol=1e-14, atol=1e-16, equal_nan=True)
    assert_same_norms(inner(ours).last_norms, inner(twin).last_norms)


def assert_same_norms(mine: Any, theirs: Any) -> None:
    assert (mine is None) == (theirs is None)
    if mine is not None:
        assert mine.names == theirs.names
        for one, other in zip(mine[1:], theirs[1:], strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6, equal_nan=True)


@each_rule_of_a_column(torch.float32, rules=[name for name, rule in RULES.items() if rule.sums])
def test_sums_of_any_gradients_stay_near(column: Column, rule: str, dtype: torch.dtype, all_native: None) -> None:
    assert_near(*column.both_of(rule, column.norms, dtype, times(2)))


@each_column
@pytest.mark.parametrize("master", ["float32", "split", None])
@pytest.mark.parametrize("grads", [torch.bfloat16, torch.float32], ids=spelled)
def test_wide_states_and_master_weights(
    column: Column, master: str | None, grads: torch.dtype, all_native: None
) -> None:
    def make(backend: str, device: str) -> Any:
        params = new_params(torch.bfloat16, column.ragged, device)
        return AdamW(params, backend=backend, state_dtype=torch.float32, master_weights=master)

    def work(optimizer: Any) -> None:
        for step in range(3):
            set_grads(params_of(optimizer), step)
            if grads != torch.bfloat16:
                for param in params_of(optimizer):
                    if hasattr(param, "grad_dtype"):
                        param.grad_dtype = None
                        param.grad = param.grad.to(grads)
            optimizer.step()

    column.agree(*column.both(make, work))


@pytest.mark.parametrize("master", ["float32", None])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=spelled
)
def test_states_of_the_other_narrow_dtype(
    column: Column, dtype: torch.dtype, state_dtype: torch.dtype, master: str | None, all_native: None
) -> None:
    options = {"state_dtype": state_dtype, "master_weights": master}
    column.agree(*column.both_of("AdamW all", column.ragged, dtype, times(2), **options))


@pytest.mark.parametrize(
    "rule", ["SGD no momentum", "Lion decay", "SGD nesterov", "NovoGrad decay", "LARC NovoGrad", "LAMB default"]
)
@pytest.mark.parametrize(
    "options",
    [{"master_weights": "float32"}, {"master_weights": "split"}, {"state_dtype": torch.float16}],
    ids=spelled,
)
def test_masters_and_other_storages_of_every_kind_of_rule(
    column: Column, rule: str, options: dict[str, Any], all_native: None
) -> None:
    ours, twin = column.both_of(rule, (*column.ragged, (column.chunk + 77,)), torch.bfloat16, **options)
    column.agree(ours, twin, exact=not RULES[rule].directions)


@pytest.mark.parametrize("offset", [1, 2, 3])
@each_dtype
def test_unaligned_gradients_params_and_states(
    column: Column, dtype: torch.dtype, offset: int, all_native: None
) -> None:
    def make(backend: str, device: str) -> Any:
        params = []
        for index, param in enumerate(new_params(dtype, column.ragged, device)):
            room = torch.empty(param.numel() + 8, dtype=dtype, device=device)
            shift = offset if index % 2 else 0
            params.append(Parameter(room[shift : shift + param.numel()].copy_(param.detach())))
        return AdamW(params, backend=backend)

    def work(optimizer: Any) -> None:
        for position, param in enumerate(params_of(optimizer)):
            param.grad = behind(offset, new_grad(param, 0, position))
        optimizer.step()

    column.agree(*column.both(make, work), exact=dtype != torch.float64 or column.backend == "cuda")


def behind(offset: int, tensor: Tensor) -> Tensor:
    """The same numbers, so many elements into some memory."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].copy_(tensor)


@pytest.mark.sparingly(offset=3)
@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("rule", ["SGD no momentum", "SGD all", "LARS optax", "LARC NovoGrad", "LAMB without ratio"])
def test_unaligned_gradients_of_every_kind_of_rule(column: Column, rule: str, offset: int, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        for i, param in enumerate(params_of(optimizer)):
            param.grad = behind(offset, eighths(tuple(param.shape), param.dtype, i).to(param.device))
        optimizer.step()

    column.agree(*column.both_of(rule, (*column.ragged, (column.chunk + 77,)), torch.float32, work))


def test_dtypes_mix(column: Column, all_native: None) -> None:
    def make(backend: str, device: str) -> Any:
        dtypes = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if column.backend == "cuda" else []))
        return AdamW([param for dtype in dtypes for param in new_params(dtype, column.ragged, device)], backend=backend)

    column.agree(*column.both(make, times(2)))


def test_several_rules_share_a_step(column: Column, all_native: None) -> None:
    def make(backend: str, device: str) -> Any:
        groups = [
            {
                "params": [Parameter(eighths((n,), dtype, n).to(device)) for n in (3, TILE + 1, column.chunk + 1)],
                "momentum": momentum,
            }
            for momentum in (0.0, 0.9)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        return LARC(SGD(groups, 0.1, weight_decay=0.125, backend=backend))

    column.agree(*column.both(make))


@each_column
def test_factors_masks_and_maximize(column: Column, all_native: None) -> None:
    options: dict[str, Any] = {
        "lr_scale": [0.5**i for i in range(len(column.ragged))],
        "weight_decay_scale": [float(i % 2) for i in range(len(column.ragged))],
        "maximize": True,
    }
    column.agree(*column.both_of("NovoGrad decay", column.ragged, torch.float32, **options))


# Norms ------------------------------------------------------------------------------------------------------------


@each_dtype
def test_global_norm(column: Column, dtype: torch.dtype, all_native: None) -> None:
    options = {"grad_clip": ClipGradByGlobalNorm(0.5)}
    ours, twin = column.both_of("AdamW default", column.norms, dtype, **options)
    exact = torch.cat([param.grad.double().flatten() for param in params_of(ours)]).norm()
    torch.testing.assert_close(ours.last_grad_norm.double(), exact, rtol=1e-6, atol=0)
    assert_near(ours, twin)


@pytest.mark.parametrize("clip", [ClipGradByNorm(0.25), ClipGradByValue(0.25, -0.5)], ids=spelled)
@pytest.mark.parametrize("rule", ["SGD all", "LARC default"])
def test_other_clips(column: Column, clip: Any, rule: str, all_native: None) -> None:
    column.agree(*column.both_of(rule, column.ragged, torch.float32, grad_clip=clip))


def test_clipping_leaves_out_what_it_is_told_to(column: Column, all_native: None) -> None:
    def make(backend: str, device: str) -> Any:
        params = enumerate(new_params(shapes=column.ragged, device=device))
        named = [(f"{'bias' if i % 2 else 'weight'}{i}", param) for i, param in params]
        clip = ClipGradByGlobalNorm(0.1, need_clip=lambda name, param: "bias" not in name)
        return AdamW(named, grad_clip=clip, backend=backend)

    ours, twin = column.both(make)
    column.agree(ours, twin)
    assert ours.last_grad_norm.cpu() == twin.last_grad_norm


def test_parameters_that_the_witness_steps_share_the_global_norm(column: Column) -> None:
    def make(backend: str, device: str) -> Any:
        gapped = Parameter(torch.arange(20.0, device=device)[::2])
        params = [*new_params(shapes=column.norms, device=device), gapped]
        return AdamW(params, backend=backend, grad_clip=ClipGradByGlobalNorm(0.1))

    ours, twin = column.both(make, times(2))
    torch.testing.assert_close(ours.last_grad_norm.cpu(), twin.last_grad_norm, rtol=1e-6, atol=1e-7)
    assert_near(ours, twin)


@pytest.mark.parametrize("value", [1e25, 1e-30, 3e19])
def test_norms_of_extreme_gradients(column: Column, value: float) -> None:
    params = [Parameter(torch.zeros(n, device=column.device)) for n in (5, BY_WARP + 3, column.chunk + 3)]
    for param in params:
        param.grad = torch.full_like(param, value)
    optimizer = AdamW(params, backend=column.backend, grad_clip=ClipGradByGlobalNorm(1.0))
    optimizer.step()
    numel = sum(param.numel() for param in params)
    torch.testing.assert_close(optimizer.last_grad_norm.item(), value * numel**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_gradient_shows_in_the_norm(column: Column, bad: float) -> None:
    params = [Parameter(torch.zeros(n, device=column.device)) for n in (5, column.chunk + 3)]
    set_grads(params, 0)
    params[1].grad[column.chunk] = bad
    optimizer = AdamW(params, backend=column.backend, grad_clip=ClipGradByGlobalNorm(1.0))
    optimizer.step()
    assert not torch.isfinite(optimizer.last_grad_norm)


@pytest.mark.parametrize("bad", [math.inf, math.nan, 0.0])
@pytest.mark.parametrize(
    "rule",
    ["NovoGrad largest", "NovoGrad decay", "LARC default", "LARS decay", "LARS kozistr", "LAMB default"],
)
def test_what_is_not_finite_or_zero_ends_as_on_the_cpu(column: Column, rule: str, bad: float, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        for param in params_of(optimizer):
            grad = eighths(tuple(param.shape), param.dtype, 3).to(param.device)
            param.grad = torch.zeros_like(param) if bad == 0 else grad
            param.grad[-1] = bad
        optimizer.step()

    assert_near(*column.both_of(rule, flat(3, TILE + 5), torch.float32, work))


@each_dtype
@pytest.mark.parametrize("rule", ["AdamW", "Adam"])
def test_states_of_zeros(column: Column, rule: str, dtype: torch.dtype, all_native: None) -> None:
    """The root of zero, and what it divides, are numbers out of the ordinary to kernels that take no branch."""

    def make(backend: str, device: str) -> Any:
        params = [Parameter(eighths(shape, dtype, i).to(device)) for i, shape in enumerate(column.norms)]
        return (AdamW if rule == "AdamW" else Adam)(params, weight_decay=0.1, backend=backend)

    def work(optimizer: Any) -> None:
        for value in (0.0, 0.0, 0.5):
            for param in params_of(optimizer):
                param.grad = torch.full_like(param, value)
            optimizer.step()

    exact = column.backend == "cuda" or dtype != torch.float64  # the logarithms of the bias corrections
    column.agree(*column.both(make, work), exact=exact)


@pytest.mark.sparingly(dtype=torch.float32)
@pytest.mark.parametrize("rule", ["NovoGrad decay", "LARC default", "LARC AdamW", "LARS decay", "LAMB default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=spelled)
def test_last_norms_without_a_gradient_that_is_gone(column: Column, rule: str, dtype: torch.dtype) -> None:
    def work(optimizer: Any) -> None:
        train(optimizer, params_of(optimizer), 1)
        params_of(optimizer)[3].grad = None
        optimizer.step()

    ours, twin = column.both_of(rule, column.norms, dtype, work)
    assert len(inner(ours).last_norms.names) == len(column.norms) - 1
    assert_same_norms(inner(ours).last_norms, inner(twin).last_norms)


def test_optimizers_that_measure_nothing_have_no_norms(column: Column) -> None:
    for optimizer in column.both_of("SGD all", column.norms, torch.float32):
        assert optimizer.last_norms is None


def test_the_direction_of_elements_that_do_not_exist_is_not_measured(column: Column, all_native: None) -> None:
    def make(backend: str, device: str) -> Any:
        params = [Parameter(torch.ones(n, device=device)) for n in (1, 5, 1023)]
        return LAMB(params, eps=0.0, backend=backend)  # the direction of zeros is 0 / 0

    def work(optimizer: Any) -> None:
        for param in params_of(optimizer):
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()

    ours, twin = column.both(make, work)
    assert_near(ours, twin)
    assert torch.isfinite(ours.last_norms.trust_ratio).all()
    torch.testing.assert_close(ours.last_norms.trust_ratio.cpu(), twin.last_norms.trust_ratio)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "NovoGrad" in rule])
def test_a_second_moment_starts_at_the_first_gradient_that_is_not_zeros(
    column: Column, rule: str, all_native: None
) -> None:
    def work(optimizer: Any) -> None:
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step()
        step_exactly(optimizer)

    averaged = {"grad_averaging": True} if rule in ("NovoGrad kozistr", "NovoGrad tfa") else {}
    assert_near(*column.both_of(rule, column.norms, torch.float32, work, **averaged))


# What is read on the device ---------------------------------------------------------------------------------------


@each_column
@pytest.mark.parametrize("rule", ["AdamW default", "NovoGrad decay", "LARC default", "LAMB default"])
def test_loss_scale_and_found_inf(column: Column, rule: str, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        stepping = inner(optimizer)
        step_exactly(optimizer)
        for found in (1.0, 0.0):
            before = snapshot(stepping)
            set_grads(params_of(optimizer), 3, scale=64.0)
            device = params_of(optimizer)[0].device
            stepping.grad_scale = torch.tensor(64.0, device=device)
            stepping.found_inf = torch.tensor(found, device=device)
            optimizer.step()
            if found:
                assert_same_snapshots(snapshot(stepping), before)

    ours, twin = column.both_of(rule, column.ragged, torch.float32, work)
    column.agree(ours, twin, exact=not RULES[rule].sums)


@pytest.mark.sparingly(rule=("SGD all", "SGD nesterov", "NovoGrad decay", "LAMB default"))
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("SGD all", {}),
        ("SGD all", {"grad_clip": ClipGradByGlobalNorm(0.5)}),
        ("SGD nesterov", {"grad_clip": ClipGradByNorm(0.5)}),
        ("Lion decay", {"grad_clip": ClipGradByValue(0.25)}),
        ("NovoGrad decay", {}),
        ("LARC default", {}),
        ("LARS kozistr", {}),
        ("LAMB default", {}),
    ],
    ids=spelled,
)
def test_grad_scaler_looks_for_infinities(column: Column, rule: str, options: Any) -> None:
    """With the results of torch's, whose unscaling it does without; where one is found nothing moves."""
    shapes = flat(5, column.chunk + 3)
    optimizers = [column.both_of(rule, shapes, torch.float32, lambda made: None, **options)[0] for _ in range(2)]
    scalers = [kind(column.device, 64.0) for kind in (GradScaler, torch.amp.GradScaler)]
    for amp in scalers:
        amp.scale(torch.zeros((), device=column.device))
    inner(optimizers[1])._step_supports_amp_scaling = True  # torch's scaler unscales otherwise
    for step, bad in enumerate((None, math.inf, math.nan, None)):
        before = snapshot(inner(optimizers[0]))
        for optimizer, amp in zip(optimizers, scalers, strict=True):
            params = params_of(optimizer)
            set_grads(params, step, scale=amp.get_scale())
            if bad is not None:
                params[-1].grad.view(-1)[-1] = bad
            grads = [(param.grad._version, param.grad.clone()) for param in params]
            amp.step(optimizer)
            for param, (version, copy) in zip(params, grads, strict=True):
                assert param.grad._version == version or type(amp) is not GradScaler
                assert_same_bits(param.grad, copy)
            amp.update()
        if bad is not None:
            assert_same_snapshots(snapshot(inner(optimizers[0])), before)
        assert_same_results(*map(inner, optimizers))
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 16.0


def test_a_finite_element_with_an_infinite_square_is_no_infinity(column: Column) -> None:
    param = Parameter(torch.zeros(column.chunk + 3, device=column.device))
    param.grad = torch.full_like(param, 3e19)
    scaler = GradScaler(column.device, 64.0)
    scaler.scale(torch.zeros((), device=column.device))
    scaler.step(AdamW([param], backend=column.backend, grad_clip=ClipGradByGlobalNorm(1.0)))
    scaler.update()
    assert scaler.get_scale() == 64.0
    assert param.detach().abs().min() > 0


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_infinities_on_two_backends_stop_both(column: Column, bad: int | None) -> None:
    """A row that the witness steps, beside one on the device: their answers meet on the host."""
    params = [
        Parameter(torch.ones(5, device=column.device)),
        Parameter(torch.ones(3, dtype=torch.complex64, device=column.device)),
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    if bad is not None:
        params[bad].grad[1] = math.inf
    scaler = GradScaler(column.device, 64.0)
    scaler.scale(torch.zeros((), device=column.device))
    scaler.step(AdamW(params, backend=column.backend))
    scaler.update()
    assert scaler.get_scale() == (64.0 if bad is None else 32.0)
    for param in params:
        assert bool((param == 1).all()) == (bad is not None)


@each_column
def test_tensor_hyperparameters_change_between_steps(column: Column) -> None:
    def make(backend: str, device: str) -> Any:
        lr = torch.tensor(1e-2, dtype=torch.float64, device=device)
        beta = torch.tensor(0.75, device=device)
        params = new_params(shapes=column.ragged, device=device)
        # On the cpu backend they are numbers.
        options = {"lr": 1e-2, "betas": (0.75, 0.75)} if backend == "cpu" else {"lr": lr, "betas": (beta, beta)}
        return AdamW(params, backend=backend, capturable=backend != "cpu", **options)

    def work(optimizer: Any) -> None:
        for step, rate in enumerate((1e-2, 3e-3)):
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            times(1, step)(optimizer)

    column.agree(*column.both(make, work))


@pytest.mark.parametrize("rule", ["LARS decay", "LARS kozistr", "LARC NovoGrad"])
def test_a_weight_decay_on_the_device_is_in_the_norms(column: Column, rule: str) -> None:
    def work(optimizer: Any) -> None:
        step_exactly(optimizer)
        (group,) = inner(optimizer).param_groups
        here = inner(optimizer).backend != "cpu"
        for decay in (0.25, 0.5):
            group["weight_decay"] = torch.tensor(decay, device=column.device) if here else decay
            group["capturable"] = here
            times(1)(optimizer)

    assert_near(*column.both_of(rule, column.norms, torch.float32, work))


@each_column
def test_rows_come_and_go(column: Column, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        for step in range(4):
            set_grads(params_of(optimizer), step)
            for index, param in enumerate(params_of(optimizer)):
                if (index + step) % 3 == 0:
                    param.grad = None
            optimizer.step()

    column.agree(*column.both_of("AdamW all", column.ragged, torch.float32, work))


# States of a byte, masters of 24 bits, random words ---------------------------------------------------------------

SMALL: dict[str, Any] = {"state_dtype": "8bit", "master_weights": "split8", "seed": 5}
GROUPED: Shapes = ((43, 96), (129, 32), (33,))  # codes, in tiles the last of which are not full; no codes


@each_column
@pytest.mark.parametrize(
    "options",
    [
        {"grad_clip": ClipGradByValue(0.25, -0.5)},
        {"grad_clip": ClipGradByGlobalNorm(0.5)},
        {"lr_scale": [0.5, 1.0, 2.0]},
    ],
    ids=spelled,
)
@pytest.mark.parametrize("rule", ["AdamW all", "Lion decay"])
def test_codes_beside_clips_loss_scales_and_skipped_steps(
    column: Column, rule: str, options: Any, all_native: None
) -> None:
    """A step that is skipped counts nothing and draws nothing."""

    def work(optimizer: Any) -> None:
        step_exactly(optimizer)
        for found in (1.0, 0.0):
            before = snapshot(optimizer)
            for i, param in enumerate(params_of(optimizer)):
                param.grad = 64 * eighths(tuple(param.shape), param.dtype, i).to(param.device)
            device = params_of(optimizer)[0].device
            optimizer.grad_scale = torch.tensor(64.0, device=device)
            optimizer.found_inf = torch.tensor(found, device=device)
            optimizer.step()
            if found:
                assert_same_snapshots(snapshot(optimizer), before)

    column.agree(*column.both_of(rule, GROUPED, torch.bfloat16, work, **SMALL, **options))


@each_column
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_codes_scales_and_gradients(column: Column, offset: int, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        step_exactly(optimizer)
        for index, param in enumerate(params_of(optimizer)):
            state = optimizer.state[param]
            for key in (key for key in state if key != "step" and (index == 0 or "_scale" in key)):
                state[key] = behind(offset, state[key].flatten()).view(state[key].shape)
            grad = behind(offset, eighths((param.numel(),), param.dtype, index).to(param.device))
            param.grad = grad.view(param.shape)
        optimizer.step()

    column.agree(*column.both_of("AdamW all", GROUPED, torch.bfloat16, work, **SMALL))


@each_column
@pytest.mark.parametrize(
    "options", [{"state_dtype": "8bit"}, {"state_dtype": torch.float16, "rounding": "stochastic"}], ids=spelled
)
def test_codes_of_what_is_not_finite_or_tiny(column: Column, options: Any, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        for step in range(2):
            set_grads(params_of(optimizer), step)
            for param in params_of(optimizer):
                grad = param.grad.view(-1)
                for place, number in enumerate((math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-39, 1e19, 3e38)):
                    grad[3 + 29 * place :: 29 * 40] = number
                grad[-64:-32] = 0.0
            optimizer.step()

    column.agree(*column.both_of("AdamW default", GROUPED, torch.float32, work, **options))


@each_column
@pytest.mark.parametrize("rule", ["AdamW all", "Lion decay"])
def test_rows_of_codes_come_and_go(column: Column, rule: str, all_native: None) -> None:
    def work(optimizer: Any) -> None:
        for step in range(3):
            set_grads(params_of(optimizer), step)
            params_of(optimizer)[step].grad = None
            optimizer.step()

    column.agree(*column.both_of(rule, GROUPED, torch.bfloat16, work, **SMALL))
