"""How tensors lie in memory: whatever the layout, the numbers are right and no other byte is written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    ROWS,
    Case,
    assert_near,
    assert_same_bits,
    assert_same_snapshots,
    bits,
    device_of,
    each_adamw,
    each_dtype,
    each_implementation,
    each_kind,
    each_twin,
    new_grad,
    snapshot,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import fused_optim
from fused_optim import tensors
from fused_optim.plan import planner
from fused_optim.plan import tensor_shim as shims
from fused_optim.state import masters


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# Views of a fresh buffer, by name. Each takes a dtype and returns the buffer and the view.
Layout = Callable[[torch.dtype], tuple[Tensor, Tensor]]


def _view(shape: tuple[int, ...], cut: Callable[[Tensor], Tensor]) -> Layout:
    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        buffer = values(shape, dtype)
        return buffer, cut(buffer)

    return make


LAYOUTS: dict[str, Layout] = {
    "0-d": _view((5,), lambda b: b[2]),
    "0-d alone": _view((), lambda b: b),
    "empty": _view((4, 6), lambda b: b[:, 3:3]),
    "one element": _view((5,), lambda b: b[2:3]),
    "one element with odd strides": _view((5, 4), lambda b: b[2:3, 1:2]),
    "one element by as_strided": _view((9,), lambda b: b.as_strided((1, 1), (7, 3), 1)),
    "contiguous rows": _view((9, 7), lambda b: b[2:5]),
    "transposed": _view((6, 11), lambda b: b.t()),
    "permuted": _view((3, 4, 5), lambda b: b.permute(2, 0, 1)),
    "channels_last": _view((2, 5, 6, 3), lambda b: b.permute(0, 3, 1, 2)),
    "column": _view((10, 10), lambda b: b[:, 0]),
    "inner column": _view((40, 3), lambda b: b[:, 1]),
    "every other": _view((41,), lambda b: b[::2]),
    "block": _view((12, 12), lambda b: b[3:9, 2:7]),
    "unaligned": _view((1030,), lambda b: b[1:1028]),
    "unaligned by three": _view((2000,), lambda b: b[3:1999]),
    "size-1 dimension inside": _view((6, 8), lambda b: b[:, None, :]),
    "broad": _view((3, 7, 2000), lambda b: b[1, :, 1:]),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def contiguous_twin(param: Tensor) -> Parameter:
    return Parameter(param.detach().clone(memory_format=torch.contiguous_format))


def compare_with_contiguous(
    case: Case,
    backend: str,
    params: list[Parameter],
    make_grad: Callable[[Tensor, int, int], Tensor],
    steps: int = 3,
    variant: str = "all",
) -> Any:
    """Train the parameters, and contiguous copies of them through the witness, to the same bits; where a sum over a
    parameter counts, as near as two orders bring it."""
    twins = [contiguous_twin(param) for param in params]
    optimizer = case.make(params, variant, backend=backend)
    witness = case.make(twins, variant, backend="eager")
    for step in range(steps):
        for position, (param, twin) in enumerate(zip(params, twins, strict=True)):
            param.grad = make_grad(param, step, position)
            twin.grad = param.grad.clone(memory_format=torch.contiguous_format).resolve_neg().resolve_conj()
        optimizer.step()
        witness.step()
    if variant in case.sums:
        assert_near(optimizer, witness)
        return optimizer
    for mine, theirs in zip(snapshot(optimizer), snapshot(witness), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if value.dtype == torch.float64:
                torch.testing.assert_close(value, theirs[name], rtol=1e-13, atol=1e-13)
            else:
                assert_same_bits(value, theirs[name], name)
    return optimizer


@each_implementation
@each_dtype
@each_layout
@each_adamw
def test_parameter_of_any_layout(case: Case, layout: str, dtype: torch.dtype, backend: str) -> None:
    buffer, view = LAYOUTS[layout](dtype)
    mask = torch.ones_like(buffer, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    outside = bits(buffer[mask])
    start = view.clone()
    param = Parameter(view)
    assert param.data_ptr() == view.data_ptr()
    compare_with_contiguous(case, backend, [param], lambda p, s, i: new_grad(p, s, i))
    assert torch.equal(bits(buffer[mask]), outside), "an element outside the parameter was written"
    assert view.numel() == 0 or not torch.equal(view, start), "the parameter's own memory was not written"


@each_implementation
@each_layout
@each_adamw
def test_gradient_as_the_backward_lays_it_out(case: Case, layout: str, backend: str) -> None:
    """A gradient with the parameter's strides, which is how autograd accumulates into a dense parameter."""
    _, view = LAYOUTS[layout](torch.float32)
    param = Parameter(view)
    optimizer = case.make([param], backend=backend)
    twin = contiguous_twin(param)
    witness = case.make([twin], backend="eager")
    for _ in range(2):
        for each, owner in ((param, optimizer), (twin, witness)):
            owner.zero_grad()
            (each.square().sum() * 0.5 + each.sum()).backward()
            owner.step()
    assert_same_bits(param, twin)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda p: values(tuple(reversed(p.shape))).permute(*reversed(range(p.ndim))),
    "expanded scalar": lambda p: torch.tensor(0.7).expand(p.shape),
    "expanded row": lambda p: values((1, *p.shape[1:])).expand(p.shape),
    "expanded column": lambda p: values((*p.shape[:-1], 1)).expand(p.shape),
    "every other": lambda p: values((*p.shape[:-1], 2 * p.shape[-1]))[..., ::2],
    "column of more": lambda p: values((*p.shape, 3))[..., 1],
    "part of a bucket": lambda p: values((p.numel() + 9,))[5 : 5 + p.numel()].view(p.shape),
    "flipped": lambda p: values(tuple(p.shape)).flip(0),
    "real part": lambda p: torch.view_as_complex(values((*p.shape, 2))).real,
    "negated": lambda p: torch.view_as_complex(values((*p.shape, 2))).conj().imag,
}


@each_implementation
@each_adamw
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(6,), (1,), (6, 6), (5, 1, 7), (64, 33)], ids=str)
def test_gradient_of_another_layout(case: Case, shape: tuple[int, ...], gradient: str, backend: str) -> None:
    (param,) = (Parameter(values(shape, seed=8)),)
    compare_with_contiguous(case, backend, [param], lambda p, s, i: GRADIENTS[gradient](p))


@pytest.mark.parametrize(
    "negate",
    [
        lambda g: torch._neg_view(g),
        lambda g: torch.complex(torch.zeros_like(g), g).conj().imag.as_strided(g.shape, g.stride()),
    ],
    ids=["contiguous", "as_strided"],
)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (7, 40), (1030,)], ids=str)
def test_gradient_with_pending_negation(shape: tuple[int, ...], negate: Any, any_backend: str) -> None:
    """Its address is that of the raw numbers, and no stride shows it."""

    def make_grad(param: Tensor, step: int, position: int) -> Tensor:
        grad = negate(new_grad(param, step))
        assert grad.is_neg()
        assert grad.stride() == param.stride()
        return grad

    compare_with_contiguous(ROWS["AdamW"], any_backend, [Parameter(values(shape))], make_grad)


@pytest.mark.parametrize("numel", [1, 2, 700])
def test_gradient_whose_negation_begins_or_ends(numel: int, any_backend: str) -> None:
    """The same object, the same address: only the bit changes between two steps."""
    param, twin = Parameter(values((numel,))), Parameter(values((numel,)))
    one, other = fused_optim.AdamW([param], backend=any_backend), fused_optim.AdamW([twin], backend="eager")
    for negative in (False, False, True, True, False, True, False):
        grad = new_grad(param, 3)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.data = torch._neg_view(grad) if negative else grad
        assert param.grad.is_neg() == negative
        twin.grad = param.grad.resolve_neg().clone()
        one.step()
        other.step()
    assert_same_snapshots(snapshot(one), snapshot(other))


def pending(tensor: Tensor) -> Tensor:
    """The same numbers, as a view that negates those in memory."""
    return torch._neg_view(tensor.detach().neg())


READ = [
    (what, dtype, master)
    for what in ("param", "step", "exp_avg", "exp_avg_sq", "master_param", "param_remainder", "lr")
    for dtype, master in (
        (torch.float32, None),
        (torch.complex64, None),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "split"),
    )
    if what in ("param", masters.KEYS.get(str(master))) or (not what.startswith(("master", "param")) and master is None)
]


@pytest.mark.parametrize(("what", "dtype", "master"), READ, ids=str)
@pytest.mark.parametrize("shape", [(1,), (33, 35)], ids=str)
def test_pending_negation_of_what_a_step_reads(
    shape: tuple[int, ...], what: str, dtype: torch.dtype, master: str | None, any_backend: str
) -> None:
    """Its numbers count, and what is written goes to its memory."""
    results = []
    for negate, backend in ((pending, any_backend), (torch.clone, "eager")):
        start = values(shape, dtype)
        param = Parameter(negate(start) if what == "param" else start)
        optimizer = fused_optim.AdamW([param], torch.tensor(0.25), backend=backend, master_weights=master)
        for step in range(4):
            param.grad = values(shape, dtype, seed=step)
            group, state = optimizer.param_groups[0], optimizer.state[param]
            if step == 1 and what != "param":
                owner: Any = group if what == "lr" else state
                kept = owner[what] = negate(owner[what])
            optimizer.step()
        assert what == "param" or owner[what] is kept
        assert (param if what == "param" else kept).is_neg() == (negate is pending)
        results.append(snapshot(optimizer))
    assert_same_snapshots(*results)


@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_pending_conjugation_of_what_a_step_reads(what: str) -> None:
    def conjugate(tensor: Tensor) -> Tensor:
        return tensor.detach().conj().resolve_conj().conj()

    results = []
    for pends in (True, False):
        start = torch.view_as_complex(values((5, 2)))
        param = Parameter(conjugate(start) if pends and what == "param" else start)
        assert param.is_conj() == (pends and what == "param")
        optimizer = fused_optim.AdamW([param], 0.25)
        for step in range(3):
            grad = torch.view_as_complex(values((5, 2), seed=step))
            param.grad = conjugate(grad) if pends and what == "grad" else grad
            if pends and step == 1 and what.startswith("exp"):
                kept = optimizer.state[param][what] = conjugate(optimizer.state[param][what])
            optimizer.step()
        results.append(snapshot(optimizer))
        if pends and what.startswith("exp"):
            assert optimizer.state[param][what] is kept
    assert_same_snapshots(*results)


def test_where_torch_keeps_a_pending_negation() -> None:
    """Found in this torch, in every kind of tensor; a plan that does not know it asks each tensor."""
    found = tensors.negative_bit()
    assert found is not None
    for dtype in (*DTYPES, torch.int16, torch.complex64):
        for base in (torch.zeros(()), torch.zeros(0, 3), torch.zeros(3, 4, 5), torch.zeros((1,) * 9)):
            tensor = base.to(dtype)
            for one in (tensor, Parameter(tensor, requires_grad=False), tensor.t() if tensor.ndim < 3 else tensor):
                for each in (one, torch._neg_view(one), torch._neg_view(one).detach(), torch._neg_view(one).clone()):
                    word = tensors.word(each._cdata, found.keys)
                    assert bool(word & found.mask) == each.is_neg()
    assert found == tensors.negative_bit.__wrapped__()
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert found == tensors.negative_bit.__wrapped__()


def test_a_plan_that_does_not_know_where_the_negation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "negative_bit", lambda: None)
    param, twin = Parameter(values((40,))), Parameter(values((40,)))
    one, other = fused_optim.AdamW([param], backend="cpu"), fused_optim.AdamW([twin], backend="eager")
    for negative in (False, True, False):
        grad = new_grad(param, 3)
        param.grad, twin.grad = torch._neg_view(grad) if negative else grad, grad.neg() if negative else grad
        one.step()
        other.step()
    assert_same_snapshots(snapshot(one), snapshot(other))


@pytest.mark.requires(torch="2.9")
def test_torchs_shim_says_of_every_tensor_what_python_does() -> None:
    shim = shims.tensor_shim()
    assert shim is not None
    assert shim.storage != 0
    functions = {
        name: ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(getattr(shim, name))
        for name in shims.SHIM_FUNCTIONS
    }
    for dtype in (*DTYPES, torch.int16):
        for base in (torch.zeros(()), torch.zeros(1, 3), torch.zeros(3, 4, 5), torch.zeros((1,) * 9)):
            tensor = base.to(dtype)
            for one in (
                tensor,
                Parameter(tensor, requires_grad=False),
                tensor.reshape(-1)[1:],
                torch._neg_view(tensor),
            ):
                if one.untyped_storage().nbytes():
                    assert shims._answers(functions, one, shim)
    assert shim == shims.tensor_shim.__wrapped__()
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert shim == shims.tensor_shim.__wrapped__()


@pytest.mark.parametrize("lacks", ["library", "function", "truth"])
def test_a_torch_whose_shim_cannot_be_used(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is absent, lacks a function, or says something else: the exchange API answers, with the same bits."""
    if lacks == "library":
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("not there")))
    elif lacks == "function":
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    else:
        monkeypatch.setattr(shims, "_answers", lambda functions, tensor, shim: tensor.ndim != 7)
    assert shims.tensor_shim.__wrapped__() is None
    monkeypatch.setattr(planner, "tensor_shim", shims.tensor_shim.__wrapped__)
    param, twin = Parameter(values((40,))), Parameter(values((40,)))
    one, other = fused_optim.AdamW([param], backend="cpu"), fused_optim.AdamW([twin], backend="eager")
    for step in range(3):
        param.grad, twin.grad = new_grad(param, step), new_grad(param, step)
        one.step()
        other.step()
    assert_same_snapshots(snapshot(one), snapshot(other))


@pytest.mark.requires(torch="2.9")
def test_the_shim_is_asked_nothing_at_which_it_throws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of torch print the exception: not of a sparse gradient."""
    shim = shims.tensor_shim()
    assert shim is not None
    answer = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    found: list[int] = []

    def recorded(address: int) -> Any:
        def ask(tensor: int, out: int) -> int:
            found.append(answer(address)(tensor, out))
            return found[-1]

        return answer(ask)

    asked = {name: recorded(getattr(shim, name)) for name in shims.SHIM_FUNCTIONS}
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in asked.items()}
    monkeypatch.setattr(planner, "tensor_shim", lambda: shim._replace(**addresses))
    params = [Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = fused_optim.AdamW(params, backend="cpu")
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    assert len(found) > 10 * len(shims.SHIM_FUNCTIONS)
    params[0].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert set(found) == {0}


@pytest.mark.parametrize("reader", ["torch's shim", "the exchange API", "Python"])
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg"])
def test_a_view_of_memory_that_was_taken_away_is_refused(
    what: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP frees it: at an offset the address is not 0, and there is nothing."""
    if reader != "torch's shim":
        monkeypatch.setattr(planner, "tensor_shim", lambda: None)
    if reader == "Python":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    whole = {name: torch.ones(12) for name in ("param", "grad", "exp_avg")}
    param = Parameter(whole["param"][4:8])
    optimizer = fused_optim.AdamW([param], backend="cpu")
    param.grad = whole["grad"][4:8]
    optimizer.step()
    optimizer.state[param]["exp_avg"] = whole["exp_avg"][4:8]
    whole[what].untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match=r"params'\]\[0\]"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq_scale", "param_remainder"])
def test_a_state_whose_memory_was_taken_away_is_refused_by_name(name: str, offset: int, backend: str) -> None:
    param = Parameter(values((128, 64)).to(torch.bfloat16))
    options = {"state_dtype": "8bit", "master_weights": "split8", "backend": backend}
    optimizer = fused_optim.AdamW([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param][name]
    whole = torch.zeros(offset + state.numel(), dtype=state.dtype)
    optimizer.state[param][name] = whole[offset:].view(state.shape)
    whole.untyped_storage().resize_(0)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=rf"the storage of state '{name}' of param_groups.* was resized to 0"):
        optimizer.step()
    assert_same_bits(param.detach(), before)


# Shape, and the strides of parameter and gradient, as convolutions under channels_last make them, and others.
SIZE_ONE = {
    "1x1 convolution": ((64, 64, 1, 1), (64, 1, 1, 1), (64, 1, 64, 64)),
    "1x1 convolution, the other way": ((64, 64, 1, 1), (64, 1, 64, 64), (64, 1, 1, 1)),
    "depthwise": ((64, 1, 3, 3), (9, 9, 3, 1), (9, 1, 3, 1)),
    "one channel": ((1, 6, 3, 3), (54, 1, 18, 6), (1, 1, 18, 6)),
    "one element": ((1, 1, 1), (1, 1, 1), (9, 0, 3)),
    "row": ((1, 700), (700, 1), (1, 1)),
    "none": ((0, 3), (3, 1), (1, 0)),
}


@pytest.mark.parametrize("layouts", SIZE_ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_that_say_nothing(layouts: str, dtype: torch.dtype, any_backend: str, fallbacks: list[str]) -> None:
    """Those of dimensions of size 1: the gradient is native, whatever they are, and however they change."""
    shape, strides, other = SIZE_ONE[layouts]
    param = Parameter(torch.empty_strided(shape, strides, dtype=dtype).copy_(values(shape, dtype)))
    assert param.stride() == strides
    turns = iter((other, other, strides, other))

    def make_grad(param: Tensor, step: int, position: int) -> Tensor:
        return torch.empty_strided(shape, next(turns), dtype=dtype).copy_(new_grad(param, step))

    compare_with_contiguous(ROWS["AdamW"], any_backend, [param], make_grad, steps=4)
    assert fallbacks == []


def test_states_and_parameters_whose_strides_say_nothing(any_backend: str, fallbacks: list[str]) -> None:
    param = Parameter(torch.empty_strided((8, 8, 1, 1), (8, 1, 1, 1)).copy_(values((8, 8, 1, 1))))
    twin = contiguous_twin(param)
    one, other = fused_optim.AdamW([param], backend=any_backend), fused_optim.AdamW([twin], backend="eager")
    for step in range(4):
        param.grad, twin.grad = new_grad(param, step), new_grad(param, step)
        if step == 2:
            kept = {}
            for name in ("exp_avg", "exp_avg_sq"):
                state = one.state[param][name]
                kept[name] = one.state[param][name] = state.as_strided(state.shape, (8, 1, 64, 64))
            param.data = param.data.as_strided(param.shape, (8, 1, 3, 5))
            del one.state[param]["step"]  # calls for a repair
            one.state[param]["step"] = torch.tensor(2.0, dtype=torch.float64)
        one.step()
        other.step()
    for name, state in kept.items():
        assert one.state[param][name] is state
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert_same_bits(snapshot(one)[0][name], snapshot(other)[0][name], name)
    assert fallbacks == []


@each_implementation
@each_kind
def test_negation_that_autograd_leaves_pending(case: Case, backend: str) -> None:
    """A real one-element parameter gets such a gradient from backward alone."""
    param, twin = (Parameter(torch.ones(1)) for _ in range(2))
    optimizer = case.make([param], backend=backend)
    witness = case.make([twin], backend="eager")
    for each, owner in ((param, optimizer), (twin, witness)):
        z = torch.complex(torch.zeros(1), each)
        z.conj().imag.sum().backward()
        assert each.grad is not None
        each.grad = each.grad if each is param else each.grad.clone().resolve_neg()
        owner.step()
    assert_same_bits(param, twin)
    assert param > 1  # the gradient is -1


@each_implementation
@each_kind
def test_conjugate_gradient_of_a_complex_parameter(case: Case, backend: str) -> None:
    params = [Parameter(torch.view_as_complex(values((5, 3, 2)))), Parameter(torch.view_as_complex(values((1, 2))))]
    compare_with_contiguous(
        case, backend, params, lambda p, s, i: torch.view_as_complex(values((*p.shape, 2), seed=s)).conj()
    )


@each_implementation
@each_twin
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("variant", ["default", "all"])
def test_complex_parameters_are_torchs(case: Case, variant: str, dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(6, 4, generator=generator, dtype=torch.complex128).to(dtype)
    mine, theirs = Parameter(start.clone()), Parameter(start.clone())
    one = case.make([mine], variant, backend=backend)
    reference = case.make_reference([theirs], variant)
    for _ in range(10):
        grad = torch.randn(6, 4, generator=generator, dtype=torch.complex128).to(dtype)
        for param, owner in ((mine, one), (theirs, reference)):
            param.grad = grad.clone()
            owner.step()
    tolerance = 1e-12 if dtype == torch.complex128 else 2e-6
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    for name, value in reference.state[theirs].items():
        assert one.state[mine][name].dtype == value.dtype
        torch.testing.assert_close(one.state[mine][name], value, rtol=tolerance, atol=tolerance)


def test_parameter_that_is_a_conjugate_view() -> None:
    param = torch.view_as_complex(values((5, 2))).conj().requires_grad_()
    before = param.detach().clone()
    optimizer = fused_optim.SGD([param], lr=1.0)
    param.grad = torch.full((5,), 1 + 2j)
    optimizer.step()
    assert param.is_conj()
    torch.testing.assert_close(param.detach(), before - (1 + 2j))


@pytest.mark.usefixtures("all_native")
@each_adamw
@each_dtype
def test_gradients_as_views_of_one_bucket(case: Case, dtype: torch.dtype) -> None:
    """As DistributedDataParallel's gradient_as_bucket_view lays them: any alignment, and still native."""
    params = [Parameter(values(shape, dtype)) for shape in [(3,), (7, 5), (1025,), (1,), (4, 4), (2, 1024)]]
    bucket = torch.zeros(sum(param.numel() for param in params), dtype=dtype)
    views, start = [], 0
    for param in params:
        views.append(bucket[start : start + param.numel()].view(param.shape))
        start += param.numel()

    def make_grad(param: Tensor, step: int, position: int) -> Tensor:
        views[position].copy_(new_grad(param, step, position))
        return views[position]

    compare_with_contiguous(case, "cpu", params, make_grad)


@each_implementation
@each_adamw
def test_parameters_as_views_of_one_buffer(case: Case, backend: str) -> None:
    """Neighbours in one storage, which do not overlap."""
    buffer = values((1000,))
    params = [Parameter(buffer[0:7]), Parameter(buffer[7:500].view(17, 29)), Parameter(buffer[500:501])]
    rest = buffer[501:].clone()
    compare_with_contiguous(case, backend, params, new_grad)
    assert_same_bits(buffer[501:], rest)


@pytest.mark.usefixtures("all_native")
@each_kind
@each_dtype
@pytest.mark.parametrize(
    "layout",
    ["0-d", "empty", "one element", "contiguous rows", "transposed", "permuted", "channels_last", "unaligned"],
)
def test_dense_layouts_are_native(case: Case, layout: str, dtype: torch.dtype) -> None:
    """The fused backend itself takes every layout that fills its memory."""
    _, view = LAYOUTS[layout](dtype)
    param = Parameter(view)
    optimizer = case.make([param], backend="cpu")
    for step in range(2):
        param.grad = torch.empty_like(param).copy_(new_grad(param, step))
        optimizer.step()


@each_implementation
@each_adamw
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "column", "size-1 dimension inside"])
def test_states_are_taken_in_any_layout(case: Case, layout: str, backend: str) -> None:
    """A checkpoint's state is contiguous where the parameter is not, and the other way round."""
    _, view = LAYOUTS[layout](torch.float32)
    results = []
    for relayout in (
        lambda t: t,
        lambda t: t.clone(memory_format=torch.contiguous_format),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        param = Parameter(view.clone())
        optimizer = case.make([param], backend=backend)
        for step in range(3):
            param.grad = new_grad(param, step)
            optimizer.step()
            state = optimizer.state[param]
            for name in optimizer.state_names(optimizer.param_groups[0]):
                state[name] = relayout(state[name])
        results.append(snapshot(optimizer))
    assert_same_snapshots(results[0], results[1])
    assert_same_snapshots(results[0], results[2])


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Shape, strides, offset and buffer size of a view whose elements do not overlap."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    strides = [0] * len(shape)
    span = 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = span * draw(st.integers(1, 3))
        span = strides[dim] * max(1, shape[dim]) if shape[dim] != 1 else span
    offset = draw(st.integers(0, 5))
    reach = sum(stride * max(0, size - 1) for stride, size in zip(strides, shape, strict=True))
    return shape, tuple(strides), offset, offset + reach + 1 + draw(st.integers(0, 5))


@each_implementation
@each_kind
@given(
    layout=strided(),
    grad_layout=st.sampled_from(["same", "contiguous", "expanded", "reversed"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_strides(
    case: Case,
    backend: str,
    layout: tuple[tuple[int, ...], tuple[int, ...], int, int],
    grad_layout: str,
    dtype: torch.dtype,
) -> None:
    shape, strides, offset, size = layout
    buffer = values((size,), dtype)
    mask = torch.ones(size, dtype=torch.bool)
    mask.as_strided(shape, strides, offset).fill_(False)
    outside = bits(buffer[mask])
    param = Parameter(buffer.as_strided(shape, strides, offset))

    def make_grad(param: Tensor, step: int, position: int) -> Tensor:
        if grad_layout == "same":
            return torch.empty_strided(shape, strides, dtype=dtype).copy_(new_grad(param, step))
        if grad_layout == "expanded":
            return values((), dtype, seed=step).expand(shape)
        if grad_layout == "reversed":
            order = tuple(reversed(range(len(shape))))
            return new_grad(param, step).permute(order).contiguous().permute(order)
        return new_grad(param, step)

    compare_with_contiguous(case, backend, [param], make_grad, steps=2)
    assert torch.equal(bits(buffer[mask]), outside)
    assert param.data_ptr() == buffer.as_strided(shape, strides, offset).data_ptr()


@each_implementation
@each_kind
def test_gradient_is_not_modified(case: Case, backend: str) -> None:
    assert device_of(backend) == "cpu"
    for layout in LAYOUTS.values():
        _, view = layout(torch.float32)
        param = Parameter(view)
        optimizer = case.make([param], "all", backend=backend)
        grad = new_grad(param, 0)
        before, version = grad.clone(), grad._version
        param.grad = grad
        optimizer.step()
        assert param.grad is grad
        assert grad._version == version
        assert_same_bits(grad, before)
