"""What is the CUDA phases' alone, on the processor: the very sources, compiled against a small runtime.

The backend "cuda" takes CPU tensors here, through a reader that calls them device memory (tests/cuda_on_host).
Everything else is the product: plan, tables, refresh, launches, kernels. Results are test_phases.py's. Both files run
once more under the address and undefined-behaviour sanitizers (test_cuda_sanitized.py).
"""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import pytest
import torch
from cases import (
    ROWS,
    RULES,
    assert_near,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    bits,
    each_adam,
    each_dtype,
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
from cuda_on_host import backend as backend_module
from cuda_on_host.build import OnHost
from torch.nn import Parameter

from fused_optim import (
    LARC,
    SGD,
    Adam,
    AdamW,
    AdamWDL,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    GradScaler,
    Muon,
)

SANITIZED = bool(os.environ.get("CUDA_ON_HOST_SANITIZED"))
TILE, CHUNK, BY_WARP = 1024, 32 * 1024, 4 * 1024  # csrc/cuda/layout.h

pytestmark = pytest.mark.requires("g++")

# Around the vector, the warp's strip, the tile, a block's tiles.
RAGGED = tuple((n,) for n in (0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 129, 255, 257, 1023, 1024, 1025, 8191, 8193))
ORDERS = (("ascending", 0), ("descending", 0), ("random", 1), ("random", 2))


def pair(case: Any, variant: str, shapes: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """An optimizer on the CUDA phases and its twin on the cpu backend."""
    ours, twin = new_params(dtype, shapes), new_params(dtype, shapes)
    return (
        case.make(ours, variant, backend="cuda", **options),
        case.make(twin, variant, backend="cpu", **options),
    )


def pair_of(rule: str, shapes: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    return tuple(
        RULES[rule]([Parameter(eighths(shape, dtype, i)) for i, shape in enumerate(shapes)], backend=backend, **options)
        for backend in ("cuda", "cpu")
    )


def train_both(ours: Any, twin: Any, steps: int = 3) -> None:
    for optimizer in (ours, twin):
        train(optimizer, params_of(optimizer), steps)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@each_adam
def test_the_order_of_threads_does_not_show(
    case: Any, order: str, seed: int, on_host: OnHost, all_native: None
) -> None:
    on_host.schedule(order, seed)
    ours, twin = pair(case, "all", RAGGED, torch.float32)
    train_both(ours, twin)
    assert_same_results(ours, twin)


def test_mixed_dtypes_take_one_launch_a_compute_type(on_host: OnHost, all_native: None) -> None:
    optimizers = []
    for backend in ("cuda", "cpu"):
        params = [
            p for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for p in new_params(dtype)
        ]
        optimizers.append(AdamW(params, backend=backend))
    train_both(*optimizers)
    assert_same_results(*optimizers)
    on_host.launches()
    set_grads(params_of(optimizers[0]), 9)
    optimizers[0].step()
    assert len(on_host.launches()) <= 4  # patch, prepare, apply in float and in double


# A whole number of tiles and not, batches, vectors for AdamW.
MATRICES = ((64, 64), (48, 64), (33, 17), (7, 5), (3, 32, 64), (33, 17), (130,), (5,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "maximize": True, "weight_decay": 0.0, "grad_clip": ClipGradByValue(0.25)},
        {"ns_dtype": torch.float32, "ns_coefficients": "polar_express", "state_dtype": torch.float32},
        {"master_weights": "float32"},
    ],
    ids=spelled,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_directions_are_made_orthogonal_between_the_passes(
    options: dict[str, Any], dtype: torch.dtype, on_host: OnHost, all_native: None
) -> None:
    """By the same products in the same batches as on the cpu backend: the same bits."""
    if dtype != torch.bfloat16:  # for which alone these have an effect
        options = {key: value for key, value in options.items() if key not in ("master_weights", "state_dtype")}
    optimizers = []
    for backend in ("cuda", "cpu"):
        params = new_params(dtype, MATRICES)
        optimizers.append(Muon(params, 0.02, use_muon="auto", adamw_lr=1e-3, backend=backend, **options))
    train_both(*optimizers)
    assert_same_results(*optimizers)
    on_host.launches()
    for optimizer in optimizers:
        set_grads(params_of(optimizer), 9)
        params_of(optimizer)[0].grad = None
        optimizer.step()
    assert_same_results(*optimizers)
    assert len(on_host.launches()) <= 5  # patch, prepare, Muon's two passes, AdamW's one


HARD = (
    *(0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.2e-38, -1.2e-38, 1e-31, 7e-31, -9e-31, 1e-20, 1e-10, 1.0, -1.0, 2.0, 1e7),
    *(1.7e7, -1e10, 5e18, 2e19, 1e30, 3e38, float("inf"), -float("inf"), float("nan")),
)


def hard_numbers(like: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Ordinary numbers, and for a share of them what an operation on them ends at the edge of its range with."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    hard = torch.tensor(HARD, dtype=torch.float64)[torch.randint(len(HARD), like.shape, generator=generator)]
    return torch.where(torch.rand(like.shape, generator=generator) < share, hard, ordinary).to(like.dtype)


@pytest.mark.parametrize("share", [0.001, 0.2])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.float32}, {"master_weights": "split"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rule", ["AdamW", "amsgrad", "Adam", "SGD no momentum", "SGD all", "SGD nesterov", "Lion decay"]
)
def test_numbers_that_are_out_of_the_ordinary(
    rule: str, dtype: torch.dtype, options: Any, share: float, on_host: OnHost, all_native: None
) -> None:
    """Whole tiles, in which NaNs, infinities, zeros and subnormal numbers stand among others."""
    if options and dtype != torch.bfloat16:
        options = {"master_weights": "float32"} if dtype == torch.float16 else {}
    rules = {
        **RULES,
        "AdamW": AdamW,
        "amsgrad": lambda params, **o: AdamW(params, amsgrad=True, **o),
        "Adam": lambda params, **o: Adam(params, weight_decay=0.1, **o),
    }
    optimizers = []
    for backend in ("cuda", "cpu"):
        param = Parameter(hard_numbers(torch.empty(3 * TILE + 77, dtype=dtype), 1, share))
        optimizer: Any = rules[rule]([param], backend=backend, **options)
        for step in range(3):
            param.grad = hard_numbers(param, 10 + step, share)
            optimizer.step()
            for position, (key, state) in enumerate(sorted(optimizer.state[param].items())):
                if step == 0 and key.startswith(("exp_avg", "max_exp", "momentum")):
                    state.copy_(hard_numbers(state, 20 + position, share).abs() if "sq" in key else state)
        optimizers.append(optimizer)
    assert_same_results(*optimizers)


@pytest.mark.parametrize("numbers", ["ordinary", "zero", "one NaN"])
def test_only_what_is_out_of_the_ordinary_is_computed_again(numbers: str, on_host: OnHost) -> None:
    """A tile's strips of 128 elements are read once more where one has a result that is NaN, and nowhere else."""
    param = Parameter(torch.ones(8 * TILE))
    optimizer = AdamW([param], backend="cuda")
    param.grad = torch.zeros_like(param) if numbers == "zero" else torch.full_like(param, 0.5)
    optimizer.step()
    if numbers == "one NaN":
        param.grad[5 * TILE + 200] = float("nan")
    on_host.launches()
    optimizer.step()
    _, loaded, stored = map(sum, list(zip(*on_host.launches(), strict=True))[1:])
    again = 128 if numbers == "one NaN" else 0
    assert (loaded, stored) == (16 * (param.numel() + again), 12 * param.numel())


def test_thousands_of_tensors_and_groups(on_host: OnHost, all_native: None) -> None:
    shapes = [(1 + 7 * i % 23,) for i in range(400 if SANITIZED else 3000)]
    optimizers = []
    for backend in ("cuda", "cpu"):
        params = new_params(torch.float32, shapes)
        groups = [{"params": [param], "lr": 1e-3 * (1 + i % 5)} for i, param in enumerate(params)]
        optimizers.append(AdamW(groups, backend=backend))
    train_both(*optimizers, steps=2)
    assert_same_results(*optimizers)
    on_host.launches()
    set_grads(params_of(optimizers[0]), 7)
    optimizers[0].step()
    assert len(on_host.launches()) <= 3


@pytest.mark.parametrize("way", ["timm's groups", "groups with rates", "factors"])
def test_layers_take_no_launches_of_their_own(way: str, on_host: OnHost, all_native: None) -> None:
    """Layer decay of 12 layers with a decay mask: the launches of one group."""
    optimizers = []
    for backend in ("cuda", "cpu"):
        params = new_params(torch.float32, [(5, 3), (7,)] * 12)
        scales = [0.75 ** (11 - position // 2) for position in range(24)]
        if way == "factors":
            optimizer = AdamWDL(
                [(f"encoder.layers.{position // 2}.{position % 2}", param) for position, param in enumerate(params)],
                layerwise_decay=0.75,
                apply_decay_param_fun=lambda name: name.endswith("0"),
                decay_scaling="double",
                backend=backend,
            )
        else:
            key, unit = ("lr_scale", 1.0) if way == "timm's groups" else ("lr", 1e-3)
            groups = [
                {"params": [param], key: unit * scale, "weight_decay": 0.1 * (position % 2)}
                for position, (param, scale) in enumerate(zip(params, scales, strict=True))
            ]
            optimizer = AdamW(groups, backend=backend)
        optimizers.append(optimizer)
    for step in range(3):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1) * group.get("lr_scale", 1.0)  # what timm's schedulers do
            on_host.launches()
            train(optimizer, params_of(optimizer), 1, first=step)
            if optimizer is optimizers[0]:
                assert len(on_host.launches()) <= 3
    assert_same_results(*optimizers)


# Launches and bytes ----------------------------------------------------------------------------------------------


def step_facts(on_host: OnHost, optimizer: Any) -> tuple[int, int]:
    """Launches, and bytes loaded and stored, of one step with all gradients new."""
    train(optimizer, params_of(optimizer), 2)
    on_host.launches()
    set_grads(params_of(optimizer), 5)
    optimizer.step()
    launches = on_host.launches()
    return len(launches), sum(loaded + stored for _, _, loaded, stored in launches)


@pytest.mark.parametrize(
    ("dtype", "options", "bytes_per_param", "most_launches"),
    [
        (torch.float32, {}, 28, 3),
        (torch.float32, {"grad_clip": ClipGradByGlobalNorm(1.0)}, 32, 5),
        (torch.float32, {"grad_clip": ClipGradByNorm(1.0)}, 32, 5),
        (torch.float32, {"grad_clip": ClipGradByValue(1.0)}, 28, 3),
        (torch.float64, {}, 56, 3),
        (torch.bfloat16, {}, 14, 3),
        (torch.bfloat16, {"state_dtype": torch.float32}, 22, 3),
        (torch.bfloat16, {"master_weights": "float32"}, 30, 3),  # the parameter is read too, to compare
        (torch.bfloat16, {"master_weights": "split"}, 26, 3),
        (torch.float16, {"state_dtype": torch.float32, "grad_clip": ClipGradByGlobalNorm(1.0)}, 24, 5),
    ],
    ids=spelled,
)
@pytest.mark.parametrize("misaligned", [False, True])
def test_bytes_and_launches(
    dtype: torch.dtype, options: Any, bytes_per_param: int, most_launches: int, misaligned: bool, on_host: OnHost
) -> None:
    shapes = [(3,), (768,), (BY_WARP,), (BY_WARP + 1,), (CHUNK,), (CHUNK + 1,), (3 * TILE + 5, 11)]
    params = new_params(dtype, shapes)
    if misaligned:
        params = [Parameter(torch.cat([p.detach().flatten().new_zeros(1), p.detach().flatten()])[1:]) for p in params]
    optimizer = AdamW(params, backend="cuda", **options)
    launches, moved = step_facts(on_host, optimizer)
    assert moved == bytes_per_param * sum(param.numel() for param in params)
    assert launches <= most_launches


# Norms -----------------------------------------------------------------------------------------------------------

NORM_SHAPES = tuple(
    (n,) for n in (0, 1, 5, BY_WARP - 1, BY_WARP, BY_WARP + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77)
)


@each_dtype
def test_norms_are_the_same_bits_in_every_order(dtype: torch.dtype, on_host: OnHost) -> None:
    seen = set()
    for order, seed in ORDERS:
        on_host.schedule(order, seed)
        params = new_params(dtype, NORM_SHAPES)
        optimizer = AdamW(params, backend="cuda", grad_clip=ClipGradByGlobalNorm(0.5))
        train(optimizer, params, 2)
        seen.add(tuple(tuple(bits(param).flatten().tolist()) for param in params))
    assert len(seen) == 1


def test_the_split_into_groups_does_not_change_the_norm(on_host: OnHost) -> None:
    results = []
    for order in (1, -1):
        params = new_params(torch.float32, NORM_SHAPES)
        set_grads(params, 0)
        optimizer = AdamW(
            [{"params": [param]} for param in params][::order], backend="cuda", grad_clip=ClipGradByGlobalNorm(0.1)
        )
        optimizer.step()
        results.append([param.detach().clone() for param in params])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("captured", [False, True])
def test_the_norm_of_no_gradient_is_zero(captured: bool, on_host: OnHost) -> None:
    param = Parameter(torch.ones(4))
    optimizer = AdamW([param], backend="cuda", grad_clip=ClipGradByGlobalNorm(1.0), capturable=captured)
    param.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert optimizer.last_grad_norm == 4
    grad, param.grad = param.grad, None
    if captured:
        on_host.begin_capture()
    optimizer.step()
    if captured:
        on_host.end_capture()
    assert optimizer.last_grad_norm == 0
    param.grad = grad
    optimizer.step()
    assert optimizer.last_grad_norm == 4


# Rules with norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["NovoGrad decay", "LARC default", "LARC NovoGrad", "LARS decay", "LAMB default"])
def test_rules_with_norms_are_the_same_bits_in_every_order(rule: str, on_host: OnHost) -> None:
    seen = set()
    for order, seed in ORDERS:
        on_host.schedule(order, seed)
        optimizer, _ = pair_of(rule, NORM_SHAPES, torch.float32)
        train(optimizer, params_of(optimizer), 2)
        seen.add(tuple(tuple(bits(param).flatten().tolist()) for param in params_of(optimizer)))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("rule", "dtype", "options", "bytes_per_param", "most_launches"),
    [
        ("SGD no momentum", torch.float32, {}, 12, 3),
        ("SGD all", torch.float32, {}, 20, 3),
        ("Lion decay", torch.float32, {}, 20, 3),
        ("NovoGrad decay", torch.float32, {}, 24, 5),
        ("NovoGrad all", torch.float32, {"grad_clip": ClipGradByGlobalNorm(1.0)}, 24, 5),
        ("LARC default", torch.float32, {}, 28, 5),
        ("LARS decay", torch.float32, {"grad_clip": ClipGradByNorm(1.0)}, 28, 5),
        ("LARS kozistr", torch.float32, {}, 28, 5),
        ("LARC NovoGrad", torch.float32, {}, 28, 5),
        ("LAMB default", torch.float32, {}, 44, 7),
        ("LAMB without clip", torch.float32, {}, 40, 5),
        ("LAMB default", torch.bfloat16, {}, 22, 7),
        ("LAMB default", torch.bfloat16, {"master_weights": "split"}, 40, 7),
    ],
    ids=spelled,
)
def test_bytes_and_launches_of_rules_with_norms(
    rule: str, dtype: torch.dtype, options: Any, bytes_per_param: int, most_launches: int, on_host: OnHost
) -> None:
    shapes = [(3,), (768,), (BY_WARP,), (BY_WARP + 1,), (CHUNK,), (CHUNK + 1,), (3 * TILE + 5, 11)]
    optimizer, _ = pair_of(rule, shapes, dtype, **options)
    launches, moved = step_facts(on_host, optimizer)
    assert moved == bytes_per_param * sum(param.numel() for param in params_of(optimizer))
    assert launches <= most_launches


def test_several_rules_take_a_bucket_each(on_host: OnHost, all_native: None) -> None:
    results = []
    for backend in ("cuda", "cpu"):
        groups = [
            {"params": [Parameter(eighths((n,), dtype, n)) for n in (3, BY_WARP + 1, CHUNK + 1)], "momentum": momentum}
            for momentum in (0.0, 0.9)
            for dtype in (torch.float32, torch.float64)
        ]
        optimizer = LARC(SGD(groups, 0.1, weight_decay=0.125, backend=backend))
        step_exactly(optimizer)
        results.append(inner(optimizer))
    assert_same_results(*results)
    on_host.launches()
    step_exactly(results[0])
    assert len(on_host.launches()) <= 3 + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [6e-8, 1.0, 6e4])
def test_norms_are_exact_over_many_pieces(size: float, dtype: torch.dtype, on_host: OnHost) -> None:
    values = ((0.5 + 0.5 * torch.rand(10 * CHUNK + 77)) * size).to(dtype)
    exact = values.double().norm().item()
    for rule in ("NovoGrad decay", "LARC default", "LAMB without clip"):
        param = Parameter(values.clone())
        param.grad = values.clone()
        optimizer = RULES[rule]([param], backend="cuda")
        optimizer.step()
        norms = optimizer.last_norms
        norm = norms.param_norm if rule == "LAMB without clip" else norms.grad_norm
        assert norm.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("rule", ["NovoGrad decay", "LARC default", "LAMB default"])
def test_replays_measure_again(rule: str, on_host: OnHost) -> None:
    ours, twin = pair_of(rule, NORM_SHAPES, torch.float32)
    inner(ours).param_groups[0]["capturable"] = True
    train_both(ours, twin, 1)
    on_host.begin_capture()
    ours.step()
    graph = on_host.end_capture()
    for step in (1, 2):
        for mine, theirs in zip(params_of(ours), params_of(twin), strict=True):
            mine.grad.fill_(step / 8)
            theirs.grad.fill_(step / 8)
        on_host.replay(graph)
        twin.step()
    assert_near(ours, twin)


# What is read on the device --------------------------------------------------------------------------------------


def test_grad_scaler_takes_the_pass_of_the_clip(on_host: OnHost) -> None:
    """The launches of a clipped step, and what they load and store, are all that there is."""
    traffic = []
    for amp in (GradScaler("cpu", 64.0), None):
        params = new_params(torch.float32, NORM_SHAPES)
        optimizer = AdamW(params, backend="cuda", grad_clip=ClipGradByGlobalNorm(0.5))
        train(optimizer, params, 1)
        if amp is not None:
            amp.scale(torch.zeros(()))
        on_host.launches()
        optimizer.step() if amp is None else amp.step(optimizer)
        traffic.append(on_host.launches())
    assert traffic[0] == traffic[1]


def test_tensor_hyperparameters_are_read_where_they_are(on_host: OnHost) -> None:
    ours, twin = new_params(), new_params()
    lr, beta1 = torch.tensor(1e-2), torch.tensor(0.8, dtype=torch.float64)
    mine = AdamW(ours, lr=lr, betas=(beta1, torch.tensor(0.99)), backend="cuda", capturable=True)
    other = AdamW(twin, lr=1e-2, betas=(0.8, float(torch.tensor(0.99))), backend="cpu")
    other.param_groups[0]["lr"] = float(lr)
    train_both(mine, other, 2)
    on_host.launches()
    lr.fill_(3e-3)
    other.param_groups[0]["lr"] = float(lr)
    mine.step()
    assert len(on_host.launches()) == 2  # prepare and apply: no word of the table has changed
    other.step()
    assert_same_results(mine, other)


def test_nothing_is_sent_when_nothing_changed(on_host: OnHost) -> None:
    params = new_params()
    optimizer = AdamW(params, backend="cuda")
    set_grads(params, 0)
    optimizer.step()
    on_host.launches()
    optimizer.step()
    assert len(on_host.launches()) == 2  # prepare and apply


@pytest.mark.parametrize(("driver", "patches"), [(12000, range(3, 9)), (12010, [1]), (13000, [1])])
def test_an_older_driver_takes_small_patches(driver: int, patches: Any, on_host: OnHost) -> None:
    on_host.set_device(driver=driver)
    ours, twin = pair(ROWS["AdamW"], "default", [(5,)] * 1200, torch.float32)
    train_both(ours, twin, 1)
    kept = [param.grad for param in params_of(ours)]  # so that the next ones lie elsewhere
    for optimizer in (ours, twin):
        set_grads(params_of(optimizer), 1)
    on_host.launches()
    on_host.copies()
    ours.step()
    twin.step()
    assert len(kept) == 1200
    assert len(on_host.launches()) - 2 in patches  # beside prepare and apply
    assert on_host.copies() == 0
    assert_same_results(ours, twin)


@pytest.mark.parametrize(("changed", "most"), [(3, 4096), (600, 32764)])
def test_few_changed_words_are_a_small_launch(changed: int, most: int, on_host: OnHost) -> None:
    params = new_params(shapes=[(5,)] * changed)
    optimizer = AdamW(params, backend="cuda")
    train(optimizer, params, 1)
    kept = [param.grad for param in params]
    set_grads(params, 1)
    on_host.largest_parameters()
    optimizer.step()
    assert len(kept) == changed
    assert most // 8 < on_host.largest_parameters() <= most


def test_a_step_makes_no_context_on_another_device(on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_second_device(tensor: torch.Tensor) -> Any:
        facts = first_device(tensor)
        return facts and (*facts[:2], 1, *facts[3:])

    first_device = backend_module.as_device_memory
    monkeypatch.setattr(backend_module, "as_device_memory", on_second_device)
    on_host.forget_contexts()
    params = new_params()
    optimizer = AdamW(params, backend="cuda")
    train(optimizer, params, 2)
    del optimizer
    gc.collect()
    assert on_host.contexts() == 0b10


def test_a_refused_launch_leaves_nothing_known_of_the_table(on_host: OnHost) -> None:
    ours, twin = pair(ROWS["AdamW"], "default", [(5,)] * 1200, torch.float32)
    on_host.set_device(driver=12000)  # several patches a step
    train_both(ours, twin, 1)
    first = [param.grad for param in params_of(ours)]
    set_grads(params_of(ours), 1)
    second = [param.grad for param in params_of(ours)]
    on_host.fail_launch(1)
    with pytest.raises(RuntimeError, match="refresh"):
        ours.step()
    for grad in second:
        grad.fill_(float("nan"))
    for param, grad in zip(params_of(ours), first, strict=True):
        param.grad = grad
    ours.step()  # the first patch of the step before was done
    twin.step()
    assert_same_results(ours, twin)


@pytest.mark.parametrize("driver", [12000, 13000])
def test_no_step_waits_for_the_stream(driver: int, on_host: OnHost) -> None:
    """Neither the first one, which uploads the table, nor one with all gradients new and so thousands of words."""
    on_host.set_device(driver=driver)
    params = new_params(shapes=[(1,)] * 5000)
    optimizer = AdamW(params, backend="cuda", grad_clip=ClipGradByGlobalNorm(1.0))
    on_host.waits()
    kept = []
    for step in range(2):
        set_grads(params, step)
        kept.append([param.grad for param in params])
        optimizer.step()
        assert on_host.waits() == 0, step


@pytest.mark.parametrize("captured", [False, True])
def test_memory_that_torch_holds_is_asked_for(captured: bool, on_host: OnHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step, or a capture, with all memory in torch's cache: a second try, and then an error."""
    asked = []
    monkeypatch.setattr("fused_optim.plan.planner.make_room", lambda: asked.append(1))
    params = new_params()
    optimizer = AdamW(params, backend="cuda", capturable=True)
    if captured:
        train(optimizer, params, 1)
        on_host.begin_capture()
    set_grads(params, 1)
    before = snapshot(optimizer)
    on_host.refuse_allocations(2)
    with pytest.raises(RuntimeError, match=r"no memory on CUDA device 0 for .* bytes.*nothing has changed"):
        optimizer.step()
    assert len(asked) == 1
    assert_same_snapshots(snapshot(optimizer), before)
    on_host.refuse_allocations(1)
    optimizer.step()
    assert len(asked) == 2
    if captured:
        on_host.end_capture()


def test_a_process_that_ends_calls_no_driver_that_is_gone(on_host: OnHost) -> None:
    params = new_params()
    optimizer = AdamW(params, backend="cuda", capturable=True)
    train(optimizer, params, 1)
    on_host.begin_capture()
    optimizer.step()
    graph = on_host.end_capture()
    on_host.driver_is_gone(True)
    del optimizer
    gc.collect()
    assert on_host.driver_is_gone(False) == 0
    on_host.destroy(graph)


# Graphs ----------------------------------------------------------------------------------------------------------


def test_a_graphs_table_lives_as_long_as_the_graph(on_host: OnHost) -> None:
    ours, twin = new_params(), new_params()
    mine, other = AdamW(ours, backend="cuda", capturable=True), AdamW(twin, backend="cpu")
    train_both(mine, other, 1)
    before = on_host.allocated()
    graphs = []
    for _ in range(3):
        on_host.begin_capture()
        mine.step()
        graphs.append(on_host.end_capture())
    assert on_host.allocated() == before + 3
    on_host.destroy(graphs.pop(0))
    on_host.begin_capture()
    mine.step()
    graphs.append(on_host.end_capture())
    assert on_host.allocated() == before + 3  # one less, and one more
    norms = mine._kept.captures  # what else the replays write
    assert len(norms) == 1 + len(ours)  # the plan and the parameters, however many captures there were
    state = mine.state
    del mine
    gc.collect()
    for graph in graphs:
        on_host.replay(graph)
        other.step()
        on_host.destroy(graph)
    assert norms
    assert state
    for one, two in zip(ours, twin, strict=True):
        assert_same_bits(one, two)
    norms.clear()
    AdamW(twin, backend="cuda").step()
    gc.collect()
    assert on_host.allocated() == before - 1  # the live table is gone, too


def test_replays_follow_a_tensor_lr_and_leave_rows_without_gradient(on_host: OnHost) -> None:
    lr = torch.tensor(1e-2)
    ours, twin = new_params(), new_params()
    mine = AdamW(ours, lr=lr, backend="cuda", capturable=True)
    other = AdamW(twin, lr=1e-2, backend="cpu")
    train_both(mine, other, 1)
    for params in (ours, twin):
        set_grads(params, 4)
        params[3].grad = None
    grads = [param.grad for param in ours]
    on_host.begin_capture()
    mine.step()
    graph = on_host.end_capture()
    for step in range(3):
        if step:
            lr.mul_(0.5)
        other.param_groups[0]["lr"] = float(lr)
        on_host.replay(graph)
        other.step()
    # A step between replays has a table of its own; the replay then still does what was captured.
    for params in (ours, twin):
        set_grads(params, 6)
    mine.step()
    other.step()
    for grad, param in zip(grads, twin, strict=True):
        param.grad = None if grad is None else grad.clone()
    on_host.replay(graph)
    other.step()
    assert_same_results(mine, other)


def test_two_captures_in_a_row(on_host: OnHost) -> None:
    ours, twin = new_params(), new_params()
    mine, other = AdamW(ours, backend="cuda", capturable=True), AdamW(twin, backend="cpu")
    train_both(mine, other, 1)
    graphs = []
    kept = []
    for step in (2, 3):
        set_grads(ours, step)
        kept.append([param.grad for param in ours])
        on_host.begin_capture()
        mine.step()
        graphs.append(on_host.end_capture())
    for step, graph in zip((2, 3), graphs, strict=True):
        on_host.replay(graph)
        set_grads(twin, step)
        other.step()
    assert_same_results(mine, other)


def test_a_capture_that_fails_leaves_the_live_table_right(on_host: OnHost) -> None:
    ours, twin = new_params(), new_params()
    mine, other = AdamW(ours, backend="cuda", capturable=True), AdamW(twin, backend="cpu")
    train_both(mine, other, 1)
    set_grads(ours, 2)
    kept = [param.grad for param in ours]
    for launch in (0, 1):
        on_host.begin_capture()
        on_host.fail_launch(launch)
        with pytest.raises(RuntimeError, match="LaunchFailure"):
            mine.step()
        on_host.end_capture()  # and it is never replayed
    set_grads(twin, 2)
    assert kept
    mine.step()
    other.step()
    assert_same_results(mine, other)


def test_a_replay_has_only_the_launches_of_the_phases(on_host: OnHost) -> None:
    params = new_params(shapes=[(5,)] * 1200)
    optimizer = AdamW(params, backend="cuda", capturable=True)
    train(optimizer, params, 1)
    for _ in range(2):
        on_host.begin_capture()
        optimizer.step()
        graph = on_host.end_capture()
        on_host.launches()
        on_host.replay(graph)
        assert len(on_host.launches()) == 2


def test_replays_outlive_the_plan_and_what_a_step_allocates(on_host: OnHost) -> None:
    ours, twin = new_params(), new_params()
    options = {"grad_clip": ClipGradByGlobalNorm(0.5)}
    mine = AdamW(ours, backend="cuda", capturable=True, **options)
    other = AdamW(twin, backend="cpu", **options)
    train_both(mine, other, 1)
    set_grads(ours, 2)
    set_grads(twin, 2)
    kept = [param.grad for param in ours]
    on_host.begin_capture()
    mine.step()
    graph = on_host.end_capture()
    norm = weakref.ref(mine.plan.buffers[0].grad_norm)
    extra = Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    mine.add_param_group({"params": [extra]})  # a new plan at the next step
    mine.step()
    mine.__setstate__(mine.__getstate__())
    gc.collect()
    assert norm() is not None
    other.step()
    set_grads(twin, 2)
    assert kept
    on_host.replay(graph)
    other.step()
    for one, two in zip(ours, twin, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_captures_that_could_not_be_replayed_are_refused(on_host: OnHost) -> None:
    params = new_params()
    set_grads(params, 0)
    fresh = AdamW(params, backend="cuda", capturable=True)
    on_host.begin_capture()
    try:
        with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] is not ready.*take one step"):
            fresh.step()
        assert not fresh.state
        plain = AdamW(params, backend="cuda")
        with pytest.raises(RuntimeError, match="capturable"):
            plain.step()
    finally:
        on_host.end_capture()
    assert on_host.launches() == []


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "phase"), [(0, "refresh"), (1, "reduce"), (2, "reduce"), (3, "prepare"), (4, "apply")]
)
def test_an_error_names_its_phase_and_comes_once(after: int, phase: str, on_host: OnHost) -> None:
    params = new_params(shapes=NORM_SHAPES)
    optimizer = AdamW(params, backend="cuda", grad_clip=ClipGradByGlobalNorm(1.0))
    train(optimizer, params, 1)
    set_grads(params, 1)
    on_host.fail_launch(after)
    with pytest.raises(RuntimeError, match=f"{phase}.*cudaErrorLaunchFailure.*undefined"):
        optimizer.step()
    train(optimizer, params, 1, first=2)


def test_a_gpu_without_code_says_so(shim: OnHost) -> None:
    try:
        shim.set_device(has_kernels=False)
        assert "sm_90" in shim.module.why_no_cuda(0)
        shim.set_device(devices=0)
        assert "driver" in shim.module.why_no_cuda(0)
        shim.set_device(devices=1)
        assert "no CUDA device 1" in shim.module.why_no_cuda(1)
        shim.set_device(has_kernels=False, error=2)
        assert "CUDA device 0 cannot be used: out of memory" in shim.module.why_no_cuda(0)
    finally:
        shim.set_device()
    assert shim.module.why_no_cuda(0) == ""


# Random words, states of a byte -----------------------------------------------------------------------------------

WHOLE = ((64, 96), (43, 96), (129, 32))  # tiles of vectors, and a last one that is not full
LAYOUTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16": (torch.bfloat16, {"state_dtype": "8bit"}),
    "bfloat16, stochastic": (torch.bfloat16, {"state_dtype": "8bit", "rounding": "stochastic"}),
    "bfloat16, split8": (torch.bfloat16, {"state_dtype": "8bit", "master_weights": "split8"}),
    "bfloat16, split8, float32 states": (torch.bfloat16, {"master_weights": "split8"}),
    "bfloat16, all stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def drawing_pair(rule: str, layout: str, shapes: Any = WHOLE, **options: Any) -> tuple[Any, Any]:
    dtype, own = LAYOUTS[layout]
    return pair_of(rule, shapes, dtype, **own, **options)


@each_layout
@pytest.mark.parametrize("rule", ["AdamW default", "SGD nesterov", "Lion decay", "SGD no momentum"])
def test_whole_tiles_of_rows_that_draw_are_vectors(rule: str, layout: str, on_host: OnHost, all_native: None) -> None:
    """With the bits of the cpu backend. A vector of a code's column asks for its scale once, an element does each."""
    ours, twin = drawing_pair(rule, layout)
    train_both(ours, twin)
    assert_same_results(ours, twin)
    states = {"AdamW default": 2, "SGD no momentum": 0}.get(rule, 1)
    dtype, options = LAYOUTS[layout]
    if "state_dtype" not in options or states == 0:
        return  # without scales the same bytes are asked for either way
    numbers = states + 2 * dtype.itemsize + ("master_weights" in options)
    vector = 16 // dtype.itemsize
    counts = [rows * columns for rows, columns in WHOLE]
    whole = sum(count // TILE * TILE for count in counts)
    rest = sum(counts) - whole
    on_host.launches()
    set_grads(params_of(ours), 9)
    ours.step()
    loaded = on_host.launches()[-1][2]
    assert loaded == numbers * (whole + rest) + states * (whole // vector + rest)


@each_layout
def test_a_vector_of_codes_that_is_out_of_the_ordinary(layout: str, on_host: OnHost, all_native: None) -> None:
    """Codes of what is not finite, exponents that no encoding makes, remainders that count for nothing, zeros, numbers
    beyond the codes' range: in the middle of whole tiles."""
    ours, twin = drawing_pair("AdamW default", layout, ((128, 96), (128, 96), (128, 96), (128, 96)))
    for optimizer in (ours, twin):
        step_exactly(optimizer)
        kinds = zip(params_of(optimizer), ("codes", "exponents", "parameters", "gradients"), strict=True)
        for param, kind in kinds:
            state, place = optimizer.state[param], 2 * TILE + 133
            if kind in ("codes", "exponents") and "exp_avg_scale" not in state:
                pass
            elif kind == "codes":
                state["exp_avg"].view(-1)[place] = -128
                state["exp_avg_sq"].view(-1)[place + 2 * TILE] = 255
                state["exp_avg"].view(-1)[place + 4 * TILE :] = 0
                state["exp_avg_sq"].view(-1)[place + 4 * TILE :] = 0
            elif kind == "exponents":
                state["exp_avg_scale"].view(-1)[place // 32] = 3
                state["exp_avg_sq_scale"].view(-1)[place // 32 + 40] = 70
                state["exp_avg_scale"].view(-1)[place // 32 + 80] = 255
            elif kind == "parameters":
                for step, number in enumerate((0.0, -0.0, float("inf"), -float("inf"), float("nan"))):
                    param.data.view(-1)[place + step * TILE :: 7 * TILE] = number
                if "param_remainder" in state:
                    state["param_remainder"].fill_(-77)
            param.grad = eighths(tuple(param.shape), param.dtype, 3)
            if kind == "gradients":
                for step, number in enumerate((0.0, 1e-30, 3e38, float("inf"), float("nan"))):
                    param.grad.view(-1)[place + step * TILE :: 9 * TILE] = number
                param.grad.view(-1)[: TILE // 2] = 0.0
        optimizer.step()
    assert_same_results(ours, twin)
    train_both(ours, twin, 1)
    assert_same_results(ours, twin)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_the_order_of_threads_does_not_show_in_codes(order: str, seed: int, on_host: OnHost, all_native: None) -> None:
    on_host.schedule(order, seed)
    ours, twin = drawing_pair("AdamW default", "bfloat16, split8")
    train_both(ours, twin)
    assert_same_results(ours, twin)


@pytest.mark.parametrize("first", [2**32 - TILE - 512, 2**33 - 64, 5 * 2**32 + 96])
@each_layout
def test_places_beyond_4_gibi_elements(
    layout: str, first: int, on_host: OnHost, all_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of a huge tensor, some tile of which passes a multiple of 2^32."""
    monkeypatch.setattr("fused_optim.state.formats.first_place", lambda param: first)
    ours, twin = drawing_pair("AdamW default", layout)
    train_both(ours, twin, 2)
    assert_same_results(ours, twin)


@pytest.mark.parametrize("rule", ["AdamW default", "Lion decay"])
def test_replays_count_the_steps_of_their_words(rule: str, on_host: OnHost, all_native: None) -> None:
    ours, twin = drawing_pair(rule, "bfloat16, split8")
    ours.param_groups[0]["capturable"] = True
    train_both(ours, twin, 1)
    for optimizer in (ours, twin):
        set_grads(params_of(optimizer), 1)
    kept = [param.grad for param in params_of(ours)]
    on_host.begin_capture()
    ours.step()
    graph = on_host.end_capture()
    for _ in range(3):
        on_host.replay(graph)
        twin.step()
    assert kept
    assert_same_results(ours, twin)


def test_rows_that_draw_share_the_launch_of_the_others(on_host: OnHost, all_native: None) -> None:
    """Of small rows the states are numbers, and draw nothing."""
    ours, twin = drawing_pair("AdamW default", "float32", (*WHOLE, (31, 32), (5000,)))
    train_both(ours, twin)
    assert_same_results(ours, twin)
    on_host.launches()
    ours.step()
    assert len(on_host.launches()) == 2  # prepare and apply


def test_a_sum_does_not_depend_on_whether_other_rows_draw(on_host: OnHost) -> None:
    """LAMB: the rows that draw are measured apart."""
    found = []
    for shapes in (((5000,),), ((5000,), (64, 96))):
        params = [Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for shape in shapes]
        optimizer = RULES["LAMB default"](params, backend="cuda", state_dtype="8bit", max_grad_norm=None)
        set_grads(params, 3)
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        found.append(params[0].detach())
    assert_same_bits(*found)
