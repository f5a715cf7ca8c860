"""How tensors lie in memory: whatever the layout, the numbers are right and no other byte is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Case,
    assert_same_bits,
    assert_same_snapshots,
    bits,
    device_of,
    each_case,
    each_dtype,
    each_implementation,
    new_grad,
    snapshot,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import fused_optim


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
    """Train the parameters, and contiguous copies of them through the witness, to the same bits."""
    twins = [contiguous_twin(param) for param in params]
    optimizer = case.make(params, variant, backend=backend)
    witness = case.make(twins, variant, backend="eager")
    for step in range(steps):
        for position, (param, twin) in enumerate(zip(params, twins, strict=True)):
            param.grad = make_grad(param, step, position)
            twin.grad = param.grad.clone(memory_format=torch.contiguous_format).resolve_neg().resolve_conj()
        optimizer.step()
        witness.step()
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
@each_case
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
@each_case
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
@each_case
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("shape", [(6,), (1,), (6, 6), (5, 1, 7), (64, 33)], ids=str)
def test_gradient_of_another_layout(case: Case, shape: tuple[int, ...], gradient: str, backend: str) -> None:
    (param,) = (Parameter(values(shape, seed=8)),)
    compare_with_contiguous(case, backend, [param], lambda p, s, i: GRADIENTS[gradient](p))


@each_implementation
@each_case
@pytest.mark.parametrize(
    "negate",
    [
        lambda g: torch._neg_view(g),
        lambda g: torch.complex(torch.zeros_like(g), g).conj().imag.as_strided(g.shape, g.stride()),
    ],
    ids=["contiguous", "as_strided"],
)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_gradient_with_pending_negation(case: Case, shape: tuple[int, ...], negate: Any, backend: str) -> None:
    """Its address is that of the raw numbers, and for one element no stride shows it.

    Larger ones that have the parameter's own strides cannot come from autograd, which copies a gradient of another
    layout; the fused backends do not ask for them.
    """

    def make_grad(param: Tensor, step: int, position: int) -> Tensor:
        grad = negate(new_grad(param, step))
        assert grad.is_neg()
        assert grad.stride() == param.stride()
        return grad

    compare_with_contiguous(case, backend, [Parameter(values(shape))], make_grad)


@each_implementation
@each_case
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
@each_case
def test_conjugate_gradient_of_a_complex_parameter(case: Case, backend: str) -> None:
    params = [Parameter(torch.view_as_complex(values((5, 3, 2)))), Parameter(torch.view_as_complex(values((1, 2))))]
    compare_with_contiguous(
        case, backend, params, lambda p, s, i: torch.view_as_complex(values((*p.shape, 2), seed=s)).conj()
    )


@each_implementation
@each_case
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
@each_case
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
@each_case
def test_parameters_as_views_of_one_buffer(case: Case, backend: str) -> None:
    """Neighbours in one storage, which do not overlap."""
    buffer = values((1000,))
    params = [Parameter(buffer[0:7]), Parameter(buffer[7:500].view(17, 29)), Parameter(buffer[500:501])]
    rest = buffer[501:].clone()
    compare_with_contiguous(case, backend, params, new_grad)
    assert_same_bits(buffer[501:], rest)


@pytest.mark.usefixtures("all_native")
@each_case
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
@each_case
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
@each_case
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
@each_case
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
