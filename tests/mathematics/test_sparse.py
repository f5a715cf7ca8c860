"""lazy_mode: sparse gradients, of which only the listed rows are stepped."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits, device_of, each_implementation, snapshot
from torch import Tensor
from torch.nn import Parameter

from fused_optim import (
    LARC,
    Adam,
    AdamW,
    AdamWDL,
    ClipGradByGlobalNorm,
    ClipGradByNorm,
    ClipGradByValue,
    FusedOptimizer,
)

# Torch warns of a tensor that is made from indices without either.
pytestmark = pytest.mark.usefixtures("checked_invariants")

ROWS, WIDTH = 7, 5
LISTED = ((4, 1), (1,), (6, 0, 2), (4, 6))  # by step
each_class = pytest.mark.parametrize("kind", [Adam, AdamW, AdamWDL])


@pytest.fixture
def checked_invariants() -> Iterator[None]:
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def values_at(step: int, count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def sparse_grad(param: Tensor, step: int) -> Tensor:
    rows = LISTED[step % len(LISTED)]
    values = values_at(step, len(rows)).to(param)
    return torch.sparse_coo_tensor(torch.tensor([rows], device=param.device), values, param.shape)


def new_table(dtype: torch.dtype = torch.float64, backend: str = "eager") -> Parameter:
    value = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return Parameter(value.to(device=device_of(backend), dtype=dtype))


@each_implementation
def test_is_sparse_adam(backend: str) -> None:
    """Where there is no decay, and step counts are the table's own, torch's SparseAdam does the same."""
    ours, theirs = new_table(backend=backend), new_table()
    eps = 1e-30  # which SparseAdam adds before the bias correction
    optimizers = (
        Adam([ours], 0.1, eps=eps, lazy_mode=True, backend=backend),
        torch.optim.SparseAdam([theirs], 0.1, eps=eps),
    )
    for step in range(6):
        for param, optimizer in zip((ours, theirs), optimizers):
            param.grad = sparse_grad(param, step)
            optimizer.step()
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-15)
    for key in ("exp_avg", "exp_avg_sq"):
        mine = optimizers[0].state[ours][key].cpu()
        torch.testing.assert_close(mine, optimizers[1].state[theirs][key], rtol=1e-12, atol=1e-15)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "scales": {"lr_scale": [0.5], "weight_decay_scale": [3.0], "weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.05), "weight_decay": 0.1},
}


@each_implementation
@each_class
@pytest.mark.parametrize("options", OPTIONS)
def test_listed_rows_are_stepped_as_if_they_were_alone(kind: Any, options: str, backend: str) -> None:
    """Each step is that of a dense table of the listed rows, with their states and the table's step count."""
    param = new_table(backend=backend)
    optimizer = kind([param], lazy_mode=True, backend=backend, **OPTIONS[options])
    for step in range(5):
        rows = list(LISTED[step % len(LISTED)])
        alone = Parameter(param.detach()[rows])
        dense = kind([alone], backend="eager", **OPTIONS[options])
        if step:
            state = optimizer.state[param]
            dense.state[alone] = {k: v.clone() if k == "step" else v[rows] for k, v in state.items()}
        before = snapshot(optimizer)[0]
        param.grad = sparse_grad(param, step)
        alone.grad = values_at(step, len(rows)).to(param)
        dense.step()
        optimizer.step()
        others = [row for row in range(ROWS) if row not in rows]
        for key, value in snapshot(optimizer)[0].items():
            if key == "step":
                assert value == step + 1
                continue
            expected = snapshot(dense)[0][key]
            assert_same_bits(value[rows], expected, key)
            assert_same_bits(value[others], before[key][others] if key in before else torch.zeros_like(value[others]))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_rows_that_are_listed_twice_are_summed(dtype: torch.dtype, backend: str) -> None:
    results = []
    for twice in (False, True):
        param = new_table(dtype, backend)
        optimizer = AdamW([param], 0.1, lazy_mode=True, backend=backend)
        rows, values = ([3, 5, 3], [1.0, 2.0, 0.5]) if twice else ([3, 5], [1.5, 2.0])
        table = torch.tensor(values, dtype=dtype, device=param.device)[:, None].expand(-1, WIDTH)
        param.grad = torch.sparse_coo_tensor(torch.tensor([rows], device=param.device), table, param.shape)
        optimizer.step()
        assert param.grad._nnz() == len(rows)  # no gradient is written
        results.append(snapshot(optimizer)[0])
    for key, value in results[0].items():
        assert_same_bits(value, results[1][key], key)


@each_implementation
@pytest.mark.parametrize("clip", [ClipGradByGlobalNorm(0.5), ClipGradByNorm(0.5), ClipGradByValue(0.25)])
@pytest.mark.parametrize("scaled", [False, True])
def test_clips_and_the_loss_scale_see_the_listed_rows(clip: Any, scaled: bool, backend: str) -> None:
    """Beside a dense layer; as if the table's gradient were dense, whose zeros change no norm."""
    results = []
    for layout in ("sparse", "dense"):
        table, layer = new_table(torch.float32, backend), new_table(torch.float32, backend)
        optimizer = AdamW([table, layer], 0.1, lazy_mode=True, grad_clip=clip, backend=backend)
        grad = sparse_grad(table, 2) * (8 if scaled else 1)
        table.grad = grad if layout == "sparse" else grad.to_dense()
        layer.grad = torch.full_like(layer, 8.0 if scaled else 1.0)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        results.append((snapshot(optimizer), optimizer.last_grad_norm))
    rows = list(LISTED[2])
    (sparse, norm), (dense, dense_norm) = results
    torch.testing.assert_close(sparse[0]["param"][rows], dense[0]["param"][rows], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sparse[1]["param"], dense[1]["param"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm, dense_norm)


@each_implementation
def test_nothing_moves_when_an_inf_was_found(backend: str) -> None:
    param = new_table(backend=backend)
    before = param.detach().clone()
    optimizer = AdamW([param], lazy_mode=True, backend=backend)
    param.grad = sparse_grad(param, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert_same_bits(param, before)
    assert not optimizer.state


def test_grad_scaler() -> None:
    param = new_table(torch.float32)
    optimizer = AdamW([param], 0.1, lazy_mode=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for bad in (False, True):
        param.grad = sparse_grad(param, 0) * 4
        if bad:
            param.grad._values()[0] = torch.inf
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, before) == bad
    assert optimizer.state[param]["step"] == 1


@each_implementation
@pytest.mark.parametrize("master", ["float32", "split"])
def test_masters_follow_and_survive(master: str, backend: str) -> None:
    """Steps too small for bfloat16 add up, through sparse and dense gradients in turn."""
    param = Parameter(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16, device=device_of(backend)))
    twin = Parameter(torch.ones(ROWS, WIDTH, device=device_of(backend)))
    optimizers = (
        AdamW([param], 1e-4, lazy_mode=True, master_weights=master, backend=backend),
        AdamW([twin], 1e-4, lazy_mode=True, backend=backend),
    )
    for step in range(40):
        for one in (param, twin):
            values = torch.full((ROWS, WIDTH), 0.5, dtype=one.dtype, device=one.device)
            index = torch.arange(ROWS, device=one.device)[None]
            one.grad = values if step % 3 == 0 else torch.sparse_coo_tensor(index, values, one.shape)
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state[param]
    assert_same_bits(param, twin.bfloat16())
    if master == "float32":
        assert_same_bits(state["master_param"], twin.detach())
    assert (twin < 0.997).all()


@each_implementation
def test_an_empty_gradient_counts_as_a_step_and_moves_nothing(backend: str) -> None:
    param = new_table(backend=backend)
    before = param.detach().clone()
    optimizer = AdamW([param], lazy_mode=True, backend=backend)
    index = torch.zeros(1, 0, dtype=torch.long, device=param.device)
    param.grad = torch.sparse_coo_tensor(index, param.new_zeros(0, WIDTH), param.shape)
    optimizer.step()
    assert_same_bits(param, before)
    assert optimizer.state[param]["step"] == 1


@each_implementation
def test_dense_gradients_are_stepped_as_ever(backend: str, fallbacks: list[str]) -> None:
    results = []
    for lazy in (False, True):
        param = new_table(torch.float32, backend)
        optimizer = AdamW([param], lazy_mode=lazy, backend=backend)
        for step in range(3):
            param.grad = sparse_grad(param, step).to_dense()
            optimizer.step()
        results.append(snapshot(optimizer)[0])
    for key, value in results[0].items():
        assert_same_bits(value, results[1][key], key)
    assert fallbacks == []


def test_a_sparse_step_is_logged_once(fallbacks: list[str]) -> None:
    param = new_table(torch.float32)
    optimizer = AdamW([("table", param)], lazy_mode=True, backend="cpu")
    for step in range(3):
        param.grad = sparse_grad(param, step)
        optimizer.step()
    (line,) = fallbacks
    assert "the eager path serves 'table' (param_groups[0]['params'][0]): its gradient is sparse" in line


@each_implementation
def test_a_model_with_an_embedding_and_a_checkpoint_midway(backend: str) -> None:
    def new() -> tuple[torch.nn.Module, FusedOptimizer]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Embedding(ROWS, WIDTH, sparse=True), torch.nn.Linear(WIDTH, 1))
        model = model.to(device_of(backend))
        return model, AdamW(model.named_parameters(), 0.05, lazy_mode=True, backend=backend)

    def run(model: torch.nn.Module, optimizer: FusedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            tokens = torch.tensor([step % ROWS, 2, 2], device=device_of(backend))
            model(tokens).square().sum().backward()
            optimizer.step()

    model, optimizer = new()
    run(model, optimizer, range(6))
    other, resumed = new()
    run(other, resumed, range(3))
    saved = copy.deepcopy((other.state_dict(), resumed.state_dict()))
    other, resumed = new()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(other, resumed, range(3, 6))
    for one, two in zip(model.parameters(), other.parameters()):
        assert_same_bits(one, two)
    assert copy.deepcopy(optimizer).options.lazy_mode


def refused(match: str, param: Parameter, optimizer: Any) -> None:
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert_same_bits(param, before)
    assert not optimizer.state


@each_implementation
def test_without_lazy_mode_a_sparse_gradient_is_refused_with_the_remedies(backend: str) -> None:
    param = new_table(backend=backend)
    optimizer = AdamW([("table", param)], backend=backend)
    param.grad = sparse_grad(param, 0)
    refused(r"AdamW does not support sparse gradients.*SparseAdam.*'table'.*lazy_mode=True", param, optimizer)


@each_implementation
def test_what_is_not_a_list_of_rows_is_refused(backend: str) -> None:
    param = new_table(backend=backend)
    optimizer = AdamW([("table", param)], lazy_mode=True, backend=backend)
    param.grad = torch.ones_like(param).to_sparse()
    refused("sparse gradient of 'table'.*2 sparse dimensions", param, optimizer)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_another_sparse_layout_is_refused() -> None:
    class WithCsr(Parameter):
        """torch's own setter would not accept the gradient."""

        grad = property(lambda self: torch.ones(ROWS, WIDTH).to_sparse_csr(), lambda self, value: None)  # type: ignore[assignment]

    param = WithCsr(torch.ones(ROWS, WIDTH))
    refused("lazy_mode takes the layout torch.sparse_coo, not torch.sparse_csr", param, AdamW([param], lazy_mode=True))


def test_a_trust_ratio_is_refused() -> None:
    param = new_table()
    optimizer = LARC(AdamW([("table", param)], lazy_mode=True))
    param.grad = sparse_grad(param, 0)
    refused(re.escape("'table' (param_groups[0]['params'][0]): a trust ratio needs"), param, optimizer)
    excluded = LARC(AdamW([("table", param)], lazy_mode=True), exclude=["table"])
    excluded.step()
    assert excluded.state[param]["step"] == 1


def test_differentiable_is_refused() -> None:
    param = new_table()
    optimizer = AdamW([param], lazy_mode=True, differentiable=True)
    param.grad = sparse_grad(param, 0)
    refused("its group is differentiable", param, optimizer)
