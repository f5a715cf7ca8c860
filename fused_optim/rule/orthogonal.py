"""Many matrices at once replaced by what is nearest to them among the orthogonal: between the two passes of Muon.

With the singular value decomposition :math:`X = U S V^T`, an odd polynomial :math:`a X + b X X^T X + c (X X^T)^2 X` is
:math:`U (a S + b S^3 + c S^5) V^T`. A few of them in a row bring every singular value near 1, and so X near
:math:`U V^T`, by nothing but products of matrices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hyperparameters import comparable, is_sequence, shown

Polynomial = tuple[float, float, float]


def _with_safety(*polynomials: Polynomial) -> Iterator[Polynomial]:
    """Polynomials that stay near 1 for singular values a little above it, as rounding leaves them; of them the first
    takes a matrix that is divided by 1.01 times its norm."""
    for step, (a, b, c) in enumerate(polynomials):
        safety = 1.01 if step else 1.01**2
        yield a / safety, b / safety**3, c / safety**5


# By name; each entry is the polynomial of one step, the last one that of all further steps.
POLYNOMIALS: dict[str, tuple[Polynomial, ...]] = {
    # Keller Jordan, https://kellerjordan.github.io/posts/muon/: torch.optim.Muon's. Singular values end between 0.7 and
    # 1.2.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # You Jiacheng, in modded-nanogpt and dion.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel, Persson, Musco and Gower, https://arxiv.org/abs/2505.16932, algorithm 1.
    "polar_express": (
        *_with_safety(
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        ),
        (1.875, -1.25, 0.375),
    ),
}
ADJUSTMENTS = ("original", "match_rms_adamw", "spectral_mup")


class Matrices(NamedTuple):
    """How the elements of one parameter, in their order, are matrices."""

    batch: int
    rows: int
    columns: int


def matrices_in_memory(param: Tensor, matrices: Matrices) -> Matrices | None:
    """The matrices of a parameter in the order of its memory: as they are, with other columns first, or transposed,
    none of which is another problem; None: its strides part the numbers of a matrix."""
    if param.is_contiguous():
        return matrices
    if param.ndim == 2 and param.mT.is_contiguous():
        return Matrices(1, matrices.columns, matrices.rows) if matrices.batch == 1 else None
    # Channels last: dimension 0 is the slowest, and the others, in whatever order, are the columns.
    whole = matrices.rows * matrices.batch == param.shape[0]
    return matrices if whole and param.stride(0) == param.numel() // max(param.shape[0], 1) else None


class Iteration(NamedTuple):
    """What is done to a matrix between the passes."""

    polynomials: tuple[Polynomial, ...]  # of each step
    eps: float  # the least norm that a matrix is divided by
    scale: float  # of the result
    dtype: torch.dtype  # of the products


def polynomials_of(ns_coefficients: Any, ns_steps: Any) -> tuple[Polynomial, ...]:
    """The polynomial of each step.

    Args:
        ns_coefficients: the name of some, one polynomial's three numbers, or a sequence of polynomials of which the
            last serves all further steps.
        ns_steps: how many steps.

    Raises:
        ValueError: torch's texts for coefficients that are not three numbers and for 100 steps or more; an unknown
            name; ``ns_steps`` other than an integer of 0 or more.
    """
    try:
        steps = -1 if isinstance(ns_steps, bool) else operator.index(ns_steps)
    except TypeError:
        steps = -1
    if steps < 0:
        raise ValueError(f"ns_steps must be an integer of 0 or more, got {shown(ns_steps)}")
    if steps >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, got ns_steps={steps}")
    ns_coefficients = comparable(ns_coefficients)
    if isinstance(ns_coefficients, str):
        if ns_coefficients not in POLYNOMIALS:
            names = ", ".join(map(repr, POLYNOMIALS))
            raise ValueError(f"ns_coefficients must be three numbers or one of {names}, got {ns_coefficients!r}")
        known: Sequence[Any] = POLYNOMIALS[ns_coefficients]
    elif not is_sequence(ns_coefficients) or len(ns_coefficients) == 0:
        raise ValueError(f"ns_coefficients must be three numbers, got {shown(ns_coefficients)}")
    else:
        known = ns_coefficients if is_sequence(ns_coefficients[0]) else (ns_coefficients,)
    found = []
    for step in range(steps):
        polynomial = known[min(step, len(known) - 1)]
        if not is_sequence(polynomial) or len(polynomial) != 3:
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {shown(polynomial)}")
        try:
            a, b, c = map(float, polynomial)
        except (TypeError, ValueError):
            raise ValueError(f"ns_coefficients must be numbers, got {shown(polynomial)}") from None
        if not all(map(math.isfinite, (a, b, c))):
            raise ValueError(f"ns_coefficients must be finite, got {shown(polynomial)}")
        found.append((a, b, c))
    return tuple(found)


def adjustment(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """The factor of the learning rate of a matrix: torch's, and dion's ``spectral_norm`` under the name of its aim.

    ``"original"`` (None too): :math:`\\sqrt{\\max(1, m / n)}`; ``"match_rms_adamw"``: :math:`0.2 \\sqrt{\\max(m, n)}`;
    ``"spectral_mup"``: :math:`\\sqrt{m / n}`.
    """
    if rows == 0 or columns == 0:
        return 1.0
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if adjust_lr_fn == "spectral_mup" else max(1.0, ratio))


def kept_dtype(products: torch.dtype, param: torch.dtype) -> torch.dtype:
    """The dtype in which a direction waits for its products: theirs, but no wider than what the passes of a parameter
    of this dtype compute in, and not float16, in whose range a matrix lies only once it is divided by its norm."""
    widest = torch.float64 if param == torch.float64 else torch.float32
    return torch.float32 if products == torch.float16 or products.itemsize > widest.itemsize else products


def orthogonalize_(matrices: Tensor, iteration: Iteration) -> Tensor:
    """Replace each matrix by the polynomials of it, one after the other, times the scale.

    Args:
        matrices: [count, rows, columns], contiguous, in the dtype of the products or in `kept_dtype`.
        iteration: see there.

    Returns:
        ``matrices``.
    """
    if matrices.numel() == 0:
        return matrices
    wide = torch.float64 if torch.float64 in (matrices.dtype, iteration.dtype) else torch.float32
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=wide).clamp_(min=iteration.eps)
    products = matrices if matrices.dtype == iteration.dtype else torch.empty_like(matrices, dtype=iteration.dtype)
    rounds = rounds_of(iteration, *matrices.shape[-2:])
    # Results are written to two places in turn, the last one to `products`.
    one, other = torch.empty_like(products), products
    if len(rounds) % 2 == 0:
        one, other = other, one
    torch.div(matrices, norm, out=one)
    if not rounds:
        one.mul_(iteration.scale)
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    factors = [1.0] * (len(rounds) - 1) + [iteration.scale]
    with without_autocast(matrices.device.type):  # which would choose another dtype
        for polynomials, factor in zip(rounds, factors):
            gram = torch.bmm(one.mT, one) if is_tall else torch.bmm(one, one.mT)
            inner, of_one = _in_gram_form(gram, polynomials)
            left, right = (one, inner) if is_tall else (inner, one)
            torch.baddbmm(one, left, right, beta=of_one * factor, alpha=factor, out=other)
            one, other = other, one
    return matrices if products is matrices else matrices.copy_(products)


def rounds_of(iteration: Iteration, rows: int, columns: int) -> list[tuple[Polynomial, ...]]:
    """The polynomials in rounds, each of which multiplies the matrix itself twice, by itself and by their product.

    With m and n the lesser and the larger size, k polynomials take k (4 m^2 n + 2 m^3) operations one by one, and in a
    round 4 m^2 n + (8 k - 6) m^3: less if n > 1.5 m. The eigenvalues of the Gram matrix are the squares of singular
    values, of which the small ones are lost where numbers have few digits: docs/optimizers/muon.md has the figures.
    """
    narrow, wide = sorted((rows, columns))
    longest = 3 if _has_digits(iteration.dtype) and 2 * wide > 3 * narrow else 1
    polynomials = iteration.polynomials
    return [polynomials[at : at + longest] for at in range(0, len(polynomials), longest)]


def _has_digits(dtype: torch.dtype) -> bool:
    """Whether products of numbers of this dtype have float32's digits: nobody has asked for TF32 or bfloat16 there."""
    if dtype != torch.float32:
        return dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was asked for, but of one backend
        return False


def _in_gram_form(gram: Tensor, polynomials: Sequence[Polynomial]) -> tuple[Tensor, float]:
    """A matrix R and a number r so that R X + r X is the result of polynomials for the X of a Gram matrix."""
    result: Tensor | None = None
    for at, (a, b, c) in enumerate(polynomials):
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if len(polynomials) == 1:
            return inner, a
        inner.diagonal(dim1=-2, dim2=-1).add_(a)
        result = inner if result is None else torch.bmm(inner, result)
        if at + 1 < len(polynomials):
            gram = torch.bmm(torch.bmm(inner, gram), inner)
    assert result is not None
    return result, 0.0


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Where operations take the dtypes that they are given; meta tensors, for one, know no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
