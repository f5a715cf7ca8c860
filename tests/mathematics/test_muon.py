"""Muon: its matrices, the polynomials, its groups and AdamW's, torch's class beside it, what is refused."""

from __future__ import annotations

import copy
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    assert_near,
    assert_same_bits,
    assert_same_results,
    assert_same_snapshots,
    new_params,
    set_grads,
    snapshot,
    train,
)
from torch import Tensor, nn
from torch.nn import Parameter

from fused_optim import AdamW, ClipGradByGlobalNorm, Muon, muon_groups
from fused_optim.rule.orthogonal import POLYNOMIALS, Iteration, orthogonalize_, polynomials_of

each_implementation = pytest.mark.parametrize("backend", ["cpu", "eager"])
# Products in float64: another order of the terms does not show.
EXACT: dict[str, Any] = {"lr": 0.02, "ns_dtype": torch.float64}
MATRICES = [(8, 5), (5, 8), (6, 6), (8, 5)]


def polar_factor(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def iterated(matrices: Tensor, coefficients: Any = "polar_express", steps: int = 5, scale: float = 1.0) -> Tensor:
    iteration = Iteration(polynomials_of(coefficients, steps), 1e-7, scale, matrices.dtype)
    return orthogonalize_(matrices.clone(), iteration)


# The iteration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12, 40), (3, 40, 12), (2, 16, 16), (1, 1, 7), (4, 7, 1)])
def test_polar_express_comes_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    matrices = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(iterated(matrices, steps=14), polar_factor(matrices), rtol=0, atol=1e-9)


# The largest distance of a singular value from 1 after five steps, measured; Jordan's do not come nearer.
@pytest.mark.parametrize(("name", "distance"), [("jordan", 0.33), ("quintic", 0.07), ("polar_express", 0.13)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_end_near_one(name: str, distance: float, dtype: torch.dtype) -> None:
    """And the singular vectors stay what they are."""
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(1, 24, 24, dtype=torch.float64))[0] for _ in range(2))
    values = torch.logspace(-2, 0, 24, dtype=torch.float64)
    found = left.mT @ iterated((left * values @ right).to(dtype), name).double() @ right.mT
    rounding = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (found.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < distance + rounding
    assert (found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))).abs().max() < rounding


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_a_step_beyond_the_last_polynomial_takes_the_last(name: str) -> None:
    assert polynomials_of(name, 12)[-1] == POLYNOMIALS[name][-1]
    assert polynomials_of(POLYNOMIALS[name], 12) == polynomials_of(name, 12)


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("shape", [(4, 6, 9), (4, 9, 6), (4, 6, 20), (4, 20, 6)])
def test_a_matrix_among_others_is_what_it_is_alone(shape: tuple[int, ...], steps: int) -> None:
    matrices = torch.randn(shape, dtype=torch.float64)
    together = iterated(matrices, "jordan", steps, 0.25)
    for matrix, result in zip(matrices, together, strict=True):
        expected = matrix / matrix.norm()
        for _ in range(steps):
            gram = expected @ expected.T
            expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
        torch.testing.assert_close(result, 0.25 * expected, rtol=0, atol=1e-14)


def operations_of(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Multiplications and additions of five steps."""
    counted = []

    def counts(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*factors: Tensor, **options: Any) -> Tensor:
            left, right = factors[-2:]
            counted.append(2 * left.shape[-2] * left.shape[-1] * right.shape[-1])
            return product(*factors, **options)

        return counting

    for name in ("bmm", "baddbmm"):
        monkeypatch.setattr(torch, name, counts(getattr(torch, name)))
    iterated(torch.randn(1, *shape, dtype=dtype))
    monkeypatch.undo()
    return sum(counted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [1, 1.5, 2, 4])
def test_long_matrices_take_fewer_operations(ratio: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Gram matrix of three polynomials and of two, where numbers have enough digits for it."""
    small, large = 12, round(12 * ratio)
    one_by_one = 5 * (4 * small**2 * large + 2 * small**3)
    in_rounds = 2 * 4 * small**2 * large + (18 + 10) * small**3
    expected = in_rounds if ratio > 1.5 and dtype.itemsize > 2 else one_by_one
    assert expected <= one_by_one
    for shape in ((small, large), (large, small)):
        assert operations_of(monkeypatch, shape, dtype) == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("torch.backends.cuda.matmul.allow_tf32", True),
        pytest.param("torch.backends.mkldnn.matmul.fp32_precision", "bf16", marks=pytest.mark.requires(torch="2.9")),
        pytest.param("torch.backends.fp32_precision", "tf32", marks=pytest.mark.requires(torch="2.9")),
    ],
)
def test_where_float32_has_fewer_digits_there_are_no_rounds(setting: str, value: Any) -> None:
    """In a process of its own: torch cannot take all of these back."""
    program = (
        f"import torch, fused_optim.rule.orthogonal as o\n{setting} = {value!r}\n"
        "iteration = o.Iteration(o.polynomials_of('jordan', 5), 1e-7, 1.0, torch.float32)\n"
        "print([len(one) for one in o.rounds_of(iteration, 4, 16)])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, text=True, stdout=subprocess.PIPE)
    assert done.stdout.strip() == "[1, 1, 1, 1, 1]"


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("smallest", [-2, -4, -6])
def test_rounds_keep_the_small_singular_values(smallest: int, name: str) -> None:
    """In float32; one polynomial after the other comes to within 2e-5."""
    torch.manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(1, n, 24, dtype=torch.float64))[0] for n in (24, 96))
    matrices = left * torch.logspace(smallest, 0, 24, dtype=torch.float64) @ right.mT
    exact = iterated(matrices, name)
    assert (iterated(matrices.float(), name) - exact).norm() < 5e-5 * exact.norm()


def test_zeros_stay_zeros() -> None:
    assert torch.equal(iterated(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert torch.equal(iterated(torch.zeros(2, 3, 9)), torch.zeros(2, 3, 9))


# Beside torch ---------------------------------------------------------------------------------------------------


@pytest.mark.requires(torch="2.9")
def test_signature_is_torchs_and_then_ours() -> None:
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (Muon, torch.optim.Muon))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


@each_implementation
@pytest.mark.requires(torch="2.9")
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5}])
def test_torchs_class_and_its_checkpoints(options: dict[str, Any], backend: str) -> None:
    """As near as products in bfloat16 are; and each goes on with what the other has saved."""
    mine, theirs = (new_params(shapes=[(64, 32), (32, 64), (48, 48)]) for _ in range(2))
    ours, torchs = Muon(mine, lr=0.02, backend=backend, **options), torch.optim.Muon(theirs, lr=0.02, **options)
    train(ours, mine, 3)
    train(torchs, theirs, 3)
    assert ours.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]
    for param in mine:
        assert ours.state[param].keys() == torchs.state[theirs[0]].keys()
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in (ours, torchs)]
    ours.load_state_dict(saved[1])
    torchs.load_state_dict(saved[0])
    train(ours, mine, 2, first=3)
    train(torchs, theirs, 2, first=3)
    for param, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=4e-3)
        torch.testing.assert_close(
            ours.state[param]["momentum_buffer"], torchs.state[reference]["momentum_buffer"], rtol=1e-5, atol=1e-6
        )


def test_the_backends_agree_in_bfloat16() -> None:
    mine, theirs = (new_params(shapes=[(64, 32), (32, 64)]) for _ in range(2))
    train(Muon(mine, lr=0.02, backend="cpu"), mine, 3)
    train(Muon(theirs, lr=0.02, backend="eager"), theirs, 3)
    for param, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(param, reference, rtol=0, atol=2e-3)


# Groups ---------------------------------------------------------------------------------------------------------


@each_implementation
def test_the_groups_of_adamw_are_adamws(backend: str) -> None:
    """Bit for bit, in the plan of Muon's."""
    shapes = [(6, 4), (6,), (10, 4)]
    mine, theirs = new_params(shapes=shapes), new_params(shapes=shapes)
    ours = Muon(
        [{"params": mine[:1]}, {"params": mine[1:], "use_muon": False, "lr": 3e-3, "betas": (0.8, 0.99)}],
        **{**EXACT, "adamw_eps": 1e-6, "adamw_weight_decay": 0.3, "backend": backend},
    )
    adamw = AdamW(theirs[1:], lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3, backend=backend)
    for step in range(3):
        set_grads(mine, step)
        for param, other in zip(theirs, mine, strict=True):
            param.grad = other.grad.clone()
        ours.step()
        adamw.step()
    for param, reference in zip(mine[1:], theirs[1:], strict=True):
        assert_same_bits(param, reference)
        assert ours.state[param].keys() == adamw.state[reference].keys()
    assert list(ours.state[mine[0]]) == ["momentum_buffer"]


def test_auto_makes_two_groups_of_what_is_mixed() -> None:
    names = ["up", "bias", "down", "scale", "row"]
    params = new_params(shapes=[(4, 3), (4,), (3, 4), (), (1, 5)])
    optimizer = Muon(list(zip(names, params, strict=True)), use_muon="auto", adamw_lr=1e-4, lr=0.02)
    assert [group["param_names"] for group in optimizer.param_groups] == [["up", "down"], ["bias", "scale", "row"]]
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-4]
    assert len(Muon(params[:1], use_muon="auto").param_groups) == 1
    optimizer.add_param_group({"params": [("late", Parameter(torch.ones(2))), ("last", Parameter(torch.eye(2)))]})
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False, True, False]


def test_auto_takes_the_names_of_another_optimizers_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = torch.optim.AdamW(model.named_parameters()).param_groups
    taken = [{key: group[key] for key in ("params", "param_names")} for group in groups]
    optimizer = Muon(taken, use_muon="auto", heads={"0.weight": 2})
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


@pytest.mark.parametrize("no", [False, np.False_, 0, torch.tensor(False)], ids=repr)
def test_booleans_of_configurations(no: Any) -> None:
    params = new_params(shapes=[(4, 3), (3,)])
    for optimizer in (
        Muon([{"params": params[:1]}, {"params": params[1:], "use_muon": no}]),
        Muon([{"params": params[:1], "use_muon": np.True_}, {"params": params[1:]}], use_muon=no),
    ):
        assert [optimizer.param_groups[at].get("use_muon", True) for at in (0, 1)] == [True, False]
        assert type(optimizer.param_groups[1]["use_muon"]) is bool
        train(optimizer, params, 1)
        assert [len(optimizer.state[param]) for param in params] == [1, 3]


@each_implementation
@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_coefficients_of_any_kind_of_sequence(make: Callable[[Any], Any], backend: str) -> None:
    """And what is written into one of them counts at the next step."""
    mine, theirs = (new_params(shapes=[(4, 3)]) for _ in range(2))
    coefficients = make([3.4445, -4.775, 2.0315])
    optimizer = Muon(mine, **EXACT, ns_coefficients=coefficients, ns_steps=np.int64(3), backend=backend)
    other = Muon(theirs, **EXACT, ns_steps=3, backend=backend)
    train(optimizer, mine, 2)
    train(other, theirs, 2)
    assert_near(optimizer, other)
    coefficients[0] = 3.0
    other.param_groups[0]["ns_coefficients"] = (3.0, -4.775, 2.0315)
    train(optimizer, mine, 2, first=2)
    train(other, theirs, 2, first=2)
    assert_near(optimizer, other)


@each_implementation
@pytest.mark.parametrize("magnitude", [1e6, 1.0, 1e-9])
def test_products_in_float16_take_gradients_beyond_its_range(magnitude: float, backend: str) -> None:
    """Until it is divided by its norm a direction lies in float32."""
    mine, theirs = (new_params(shapes=[(8, 5)]) for _ in range(2))
    narrow = Muon(mine, lr=0.02, ns_dtype=torch.float16, eps=1e-30, backend=backend)
    wide = Muon(theirs, lr=0.02, ns_dtype=torch.float32, eps=1e-30, backend=backend)
    for optimizer, params in ((narrow, mine), (wide, theirs)):
        set_grads(params, 0)
        params[0].grad.mul_(magnitude)
        optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)


def test_meta_tensors() -> None:
    (param,) = new_params(shapes=[(4, 3)], device=torch.device("meta"))
    param.grad = torch.empty_like(param)
    optimizer = Muon([param])
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].device.type == "meta"


def test_without_a_word_of_it_a_group_has_torchs_keys() -> None:
    keys = {
        "params",
        "lr",
        "weight_decay",
        "momentum",
        "nesterov",
        "ns_coefficients",
        "eps",
        "ns_steps",
        "adjust_lr_fn",
    }
    assert Muon(new_params(shapes=[(2, 2)])).param_groups[0].keys() == keys


@each_implementation
@pytest.mark.parametrize("change", [{"ns_steps": 2}, {"ns_coefficients": "quintic"}, {"adjust_lr_fn": "spectral_mup"}])
@pytest.mark.parametrize("again", [False, True])
def test_what_a_group_says_of_the_iteration_counts_at_the_next_step(
    change: dict[str, Any], again: bool, backend: str
) -> None:
    mine, theirs = (new_params(torch.float64, MATRICES) for _ in range(2))
    ours = Muon(mine, **EXACT, backend=backend)
    train(ours, mine, 2)
    ours.param_groups[0].update(change)
    other = Muon(theirs, **{**EXACT, **change}, backend="eager")
    for param, reference in zip(theirs, mine, strict=True):
        param.data.copy_(reference)
        other.state[param]["momentum_buffer"] = ours.state[reference]["momentum_buffer"].clone()
    train(ours, mine, 1 + again, first=2)
    train(other, theirs, 1 + again, first=2)
    assert_near(ours, other)


@each_implementation
def test_a_group_can_become_adamws(backend: str) -> None:
    params = new_params(shapes=[(4, 3)])
    optimizer = Muon(params, **EXACT, backend=backend)
    optimizer.param_groups[0].update({"use_muon": False, "betas": (0.9, 0.99), "amsgrad": False})
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    train(optimizer, params, 2)
    assert list(optimizer.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq"]


@each_implementation
def test_a_parameter_without_gradient_is_left_alone(backend: str) -> None:
    params = new_params(shapes=MATRICES)
    optimizer = Muon(params, **EXACT, backend=backend)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    set_grads(params, 1)
    params[0].grad = None
    optimizer.step()
    assert_same_bits(before[0]["param"], params[0])
    assert_same_bits(before[0]["momentum_buffer"], optimizer.state[params[0]]["momentum_buffer"])
    assert not torch.equal(before[3]["param"], params[3])  # of the same shape


@each_implementation
def test_a_parameter_of_another_shape_is_other_matrices(backend: str) -> None:
    mine, theirs = (new_params(shapes=[(4, 6)]) for _ in range(2))
    optimizer = Muon(mine, **EXACT, backend=backend)
    train(optimizer, mine, 1)
    for (param,) in (mine, theirs):
        param.grad, param.data = None, torch.linspace(-1, 1, 48).view(8, 6)
    optimizer.state.clear()
    train(optimizer, mine, 2)
    other = Muon(theirs, **EXACT, backend=backend)
    train(other, theirs, 2)
    assert_same_results(optimizer, other)


# Shapes ---------------------------------------------------------------------------------------------------------


def stepped(params: list[Parameter], steps: int = 2, **options: Any) -> list[Parameter]:
    optimizer = Muon(params, **{**EXACT, **options})
    train(optimizer, params, steps)
    return params


def in_parts(params: list[Parameter], parts: Callable[[Tensor], list[Tensor]], **options: Any) -> list[list[Tensor]]:
    """The parts of each parameter, each stepped as a matrix by itself with its part of the same gradients."""
    alone = [[Parameter(part.detach().clone()) for part in parts(param)] for param in params]
    optimizer = Muon([part for of_one in alone for part in of_one], **{**EXACT, **options})
    for step in range(2):
        set_grads(params, step)
        for param, of_one in zip(params, alone, strict=True):
            assert param.grad is not None
            for part, grad in zip(of_one, parts(param.grad), strict=True):
                part.grad = grad.clone()
        optimizer.step()
    return [[part.detach() for part in of_one] for of_one in alone]


@each_implementation
@pytest.mark.parametrize(
    ("shape", "options", "parts"),
    [
        ((3, 4, 6), {}, lambda x: list(x)),
        ((3, 4, 6), {"flatten": True}, lambda x: [x.flatten(1)]),
        ((4, 3, 2, 2), {}, lambda x: [x.flatten(1)]),
        ((2, 3, 4, 5), {"flatten": False}, lambda x: list(x.flatten(0, 1))),
        ((12, 4), {"heads": [6]}, lambda x: list(x.chunk(6))),
        ((2, 6, 4), {"heads": [3]}, lambda x: list(x.reshape(6, 2, 4))),
        ((6, 2, 2, 2), {"heads": [3]}, lambda x: list(x.flatten(1).chunk(3))),
    ],
    ids=["experts", "Conv1d", "convolution", "batches", "heads", "heads of experts", "heads of a convolution"],
)
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_a_parameter_of_several_matrices(
    shape: tuple[int, ...], options: dict[str, Any], parts: Any, adjust_lr_fn: str | None, backend: str
) -> None:
    params = new_params(torch.float64, [shape])
    alone = in_parts(copy.deepcopy(params), parts, adjust_lr_fn=adjust_lr_fn, backend=backend)
    stepped(params, **options, adjust_lr_fn=adjust_lr_fn, backend=backend)
    for found, expected in zip(parts(params[0].detach()), alone[0], strict=True):
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: x.mT.contiguous().mT if x.ndim == 2 else x.to(memory_format=torch.channels_last),
        lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    ],
    ids=["transposed, channels last", "reversed"],
)
def test_other_layouts_give_the_same(lay: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture) -> None:
    shapes = [(5, 7), (7, 5), (4, 3, 2, 5)]
    plain = new_params(torch.float64, shapes)
    laid = [Parameter(lay(param.detach())) for param in plain]
    ours, theirs = Muon(laid, **EXACT, backend="cpu"), Muon(plain, **EXACT, backend="cpu")
    for step in range(2):
        set_grads(plain, step)
        for param, other in zip(laid, plain, strict=True):
            assert other.grad is not None
            param.grad = lay(other.grad)
        with caplog.at_level(logging.WARNING, "fused_optim"):
            ours.step()
        theirs.step()
    for param, other in zip(laid, plain, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-12)
    parted = [record.getMessage() for record in caplog.records]
    # What a convolution has in the reversed order is no matrix in memory, and the eager path takes it.
    assert all("part the numbers of a matrix that is made orthogonal" in text for text in parted)
    assert len(parted) == (laid[2].stride(0) == 1)


@each_implementation
def test_autocast_and_default_dtypes_change_nothing(backend: str) -> None:
    mine, theirs = (new_params(torch.float32, MATRICES) for _ in range(2))
    options = {**EXACT, "ns_dtype": torch.float32}  # which autocast would narrow
    ours, other = (Muon(params, **options, backend=backend) for params in (mine, theirs))
    for step in range(2):
        set_grads(mine, step)
        set_grads(theirs, step)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode(step == 0):
            ours.step()
        other.step()
    assert_same_results(ours, other)


def test_a_clip_takes_all_groups_together() -> None:
    mine, theirs = (new_params(torch.float64, [(6, 4), (6,), (4, 6)]) for _ in range(2))
    options: dict[str, Any] = {**EXACT, "use_muon": "auto", "grad_clip": ClipGradByGlobalNorm(0.5)}
    ours, witness = Muon(mine, **options, backend="cpu"), Muon(theirs, **options, backend="eager")
    train(ours, mine, 3)
    train(witness, theirs, 3)
    assert_near(ours, witness)
    assert ours.last_grad_norm is not None
    assert ours.last_grad_norm > 0.5


def test_a_training_that_goes_down() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = Muon(muon_groups(model), lr=0.05, weight_decay=0.0, adamw_lr=5e-3)
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), inputs.prod(1, keepdim=True))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# The usual split ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = Parameter(torch.zeros(1, 7, 8))
        self.embed = nn.Embedding(11, 8)
        self.stem = nn.Conv1d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = Parameter(torch.zeros(3, 8, 8))
        self.lm_head = nn.Linear(8, 11, bias=False)


def test_the_usual_split_of_a_model() -> None:
    model = Model()
    matrices, flat, others = muon_groups(model, adamw=["router.*"])
    assert [name for name, _ in matrices["params"]] == ["experts", "block.fc.weight"]
    assert [name for name, _ in flat["params"]] == ["stem.weight"]
    assert (matrices["use_muon"], flat["use_muon"], flat["flatten"], others["use_muon"]) == (True, True, True, False)
    everything = [name for group in (matrices, flat, others) for name, _ in group["params"]]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())
    optimizer = Muon([matrices, flat, others])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_the_head_is_what_the_model_says_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    assert [name for name, _ in muon_groups(model)[0]["params"]] == ["0.weight", "1.weight"]
    model.get_classifier = lambda: model[1]
    assert [name for name, _ in muon_groups(model)[0]["params"]] == ["0.weight", "2.weight"]
    tied = nn.Module()
    tied.embed, tied.hidden, tied.lm_head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    tied.lm_head.weight = tied.embed.weight
    assert [name for name, _ in muon_groups(tied)[0]["params"]] == ["hidden.weight"]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw: the pattern 'gate\.\*' matches no parameter"):
        muon_groups(nn.Linear(2, 2), adamw=["gate.*"])


# What is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], str]] = {
    "a vector": ([(2, 2), (3,)], {}, r"'1' .*has shape \(3,\); give it to a group with use_muon=False"),
    "steps": ([(2, 2)], {"ns_steps": 100}, "Number of steps must be less than 100 for computational efficiency"),
    "a fraction of a step": ([(2, 2)], {"ns_steps": 2.5}, "ns_steps must be an integer of 0 or more, got 2.5"),
    "two coefficients": ([(2, 2)], {"ns_coefficients": (1.0, 2.0)}, "Coefficients must be a tuple of exactly 3 values"),
    "words": ([(2, 2)], {"ns_coefficients": ("a", "b", "c")}, "ns_coefficients must be numbers"),
    "a polynomial's name": ([(2, 2)], {"ns_coefficients": "newton"}, "one of 'jordan', 'quintic', 'polar_express'"),
    "a factor's name": ([(2, 2)], {"adjust_lr_fn": "rms"}, "Adjust learning rate function rms is not supported"),
    "heads": ([(2, 2), (5, 4)], {"heads": {"1": 3}}, r"heads of '1' .* is 3, into which the 5 rows"),
    "no heads": ([(4, 4)], {"heads": [0]}, r"heads of '0' .* is 0, into which"),
    "use_muon": ([(2, 2)], {"use_muon": "always"}, "use_muon must be True, False or 'auto', got 'always'"),
    "ns_dtype": ([(2, 2)], {"ns_dtype": torch.int8}, r"ns_dtype must be one of .*got torch\.int8"),
    "no number": (
        [(2, 2)],
        {"ns_coefficients": (1.0, float("nan"), 2.0)},
        r"ns_coefficients must be finite, got \(1.0, nan, 2.0\)",
    ),
    "flatten": ([(2, 2)], {"flatten": "first"}, "flatten must be True, False or None, got 'first'"),
    "momentum": ([(2, 2)], {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    "AdamW's betas": ([(2, 2)], {"adamw_betas": (1.0, 0.5)}, "Invalid beta parameter at index 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_constructor_refuses(name: str) -> None:
    shapes, options, text = BAD[name]
    named = [(str(place), param) for place, param in enumerate(new_params(shapes=shapes))]
    with pytest.raises(ValueError, match=text):
        Muon(named, **options)


def test_a_complex_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"complex matrices are not supported, and param_groups\[0\]\['params'\]\[0\]"):
        Muon([Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


@each_implementation
def test_a_sparse_gradient_is_refused(backend: str) -> None:
    (param,) = new_params(shapes=[(3, 2)])
    optimizer = Muon([param], backend=backend)
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        optimizer.step()


@each_implementation
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"ns_steps": 100}, r"param_groups\[1\]: Number of steps must be less than 100"),
        ({"ns_coefficients": "newton"}, r"param_groups\[1\]: ns_coefficients must be three numbers or one of"),
        ({"adjust_lr_fn": "rms"}, r"param_groups\[1\]\['adjust_lr_fn'\] must be one of"),
        ({"use_muon": "auto"}, r"param_groups\[1\]\['use_muon'\] must be True or False: 'auto' is for a group"),
        ({"use_muon": "yes"}, r"param_groups\[1\]\['use_muon'\] must be True, False or 'auto', got 'yes'"),
        ({"flatten": "first"}, r"param_groups\[1\]\['flatten'\] must be True, False or None, got 'first'"),
        ({"eps": -1.0}, r"param_groups\[1\]\['eps'\]: Invalid epsilon value"),
        ({"use_muon": False, "betas": (0.9, 1.5)}, r"param_groups\[1\]\['betas'\]: Invalid beta parameter at index 1"),
    ],
)
def test_a_group_is_refused_before_anything_has_changed(bad: dict[str, Any], text: str, backend: str) -> None:
    params = new_params(shapes=[(3, 2), (2, 3)])
    optimizer = Muon([{"params": [param]} for param in params], **EXACT, backend=backend)
    train(optimizer, params, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(bad)
    set_grads(params, 1)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert_same_snapshots(before, snapshot(optimizer))


def test_a_group_that_lacks_what_adamws_have_is_refused_with_the_remedy() -> None:
    params = new_params(shapes=[(3, 2)])
    optimizer = Muon(params, **EXACT)
    optimizer.param_groups[0]["use_muon"] = False
    set_grads(params, 0)
    with pytest.raises(KeyError, match="what AdamW's groups have: 'betas', 'amsgrad', 'decoupled_weight_decay'; give"):
        optimizer.step()


def test_a_checkpoint_that_makes_a_vector_a_matrix_is_refused() -> None:
    matrices, mixed = new_params(shapes=[(3, 2), (2, 2)]), new_params(shapes=[(3, 2), (4,)])
    saved = Muon([{"params": [param]} for param in matrices]).state_dict()
    optimizer = Muon([{"params": mixed[:1]}, {"params": mixed[1:], "use_muon": False}])
    train(optimizer, mixed, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"param_groups\[1\] of the state dict: only parameters of 2 or more dimensions"
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    train(optimizer, mixed, 1, first=1)


@pytest.mark.parametrize("use_muon", [True, "auto"])
def test_a_parameter_whose_shape_is_not_known_yet_is_refused(use_muon: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    text = r"the shape of '1\.weight'( \(param_groups\[0\]\['params'\]\[1\]\))? is not known yet.* run one forward pass"
    with pytest.raises(ValueError, match=text):
        Muon([(name, param) for name, param in model.named_parameters() if name != "0.bias"], use_muon=use_muon)
    with pytest.raises(ValueError, match=text):
        muon_groups(model)
    Muon(model.parameters(), use_muon=False)


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = Muon(new_params(shapes=[(2, 2)]))
    late = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="has shape"):
        optimizer.add_param_group({"params": late})
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['use_muon'\] must be True, False or 'auto', got 'no'"):
        optimizer.add_param_group({"params": late[:1], "use_muon": "no"})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": late, "use_muon": "auto"})
    assert len(optimizer.param_groups) == 3
