"""Comparisons with the float64 reference, each with a tolerance of the form c * n * eps.

Errors are Frobenius norms per module, relative to the module's magnitude (the sum over the clients
of ||w_k s_k B_k A_k||_F, which equals ||dW|| up to cancellation).  Every comparison is written as
``error <= bound`` so that a NaN fails it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fedlora_kernels import ops, reference

BadCall = tuple[type[Exception], str, tuple[object, ...]]
"""What the face raises, the operator's name and its arguments."""

EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}

PRODUCT_ROUNDINGS = 2.0
"""B_g and A_g are rounded once each: eps ||dW|| together at worst; a factor two of room."""

EXACT_PRODUCT = 1e-10
"""What exact precision owes before rounding to the adapters' dtype; float64 adapters: all of it."""

FAST_PRODUCT = 64 * EPS[torch.float32]
"""What float32 accumulation with float64 promotion owes."""

SPECTRUM_TERMS = 32.0
"""c of the bound c * R * eps on squared singular values that went through Gram matrices."""

CANCELLATION = 1e3
"""magnitude^2 / ||dW||^2 from which a module counts as one whose clients cancel."""

RANK_BAND = {"exact": 1e-9, "fast": FAST_PRODUCT}
"""A rank is accepted if moving the energy threshold by this much makes it the reference's."""


def product_tolerance(dtype: torch.dtype, precision: str = "exact") -> float:
    """Relative error allowed to B_g A_g for adapters of a dtype."""
    computed = EXACT_PRODUCT if precision == "exact" else FAST_PRODUCT
    stored = 0.0 if dtype == torch.float64 else PRODUCT_ROUNDINGS * EPS[dtype]
    return computed + stored


def assert_within(error: torch.Tensor, bound: torch.Tensor | float, what: str) -> None:
    """Every error at or under its bound; shows the worst quotient and where it is."""
    error, bound = torch.broadcast_tensors(error, torch.as_tensor(bound, dtype=torch.float64))
    passed = error <= bound
    if not bool(passed.all()):
        quotient = torch.where(passed, 0.0, error / bound).nan_to_num(nan=torch.inf)
        worst = int(quotient.argmax())
        raise AssertionError(
            f"{what}: error {error.flatten()[worst]:.3e} above {bound.flatten()[worst]:.3e} "
            f"at flat index {worst} of shape {list(error.shape)}"
        )


def assert_gram(gram: torch.Tensor, x: torch.Tensor, rows: bool, precision: str = "exact") -> None:
    """Each entry within c d eps |x| |x|^T of the float64 product, and exact symmetry."""
    gram, x = gram.cpu(), x.cpu().double()
    depth = x.shape[2 if rows else 1]
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.mT), "the two triangles differ"
    relative = 2 * depth * EPS[torch.float64] if precision == "exact" else FAST_PRODUCT
    error = (gram - reference.gram(x, rows)).abs()
    assert_within(error, relative * reference.gram(x.abs(), rows), "Gram matrix")


def assert_same_update(
    b: torch.Tensor,
    a: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    magnitude: torch.Tensor | None = None,
    precision: str = "exact",
) -> None:
    """||B A - expected|| <= tolerance(dtype) * magnitude, the product formed in float64."""
    error = torch.linalg.matrix_norm(b.cpu().double() @ a.cpu().double() - expected)
    if magnitude is None:
        magnitude = torch.linalg.matrix_norm(expected)
    assert_within(error, product_tolerance(dtype, precision) * magnitude, "update")


def assert_near_optimal(
    b: torch.Tensor,
    a: torch.Tensor,
    dense: torch.Tensor,
    ranks: torch.Tensor,
    magnitude: torch.Tensor,
    precision: str = "exact",
) -> None:
    """||B A - dW|| <= svd floor at the module's rank + tolerance(dtype) * magnitude.

    Where the clients cancel (CANCELLATION), a float32 Gram matrix no longer orders the directions
    that are left: error^2 may then exceed floor^2 by eps * magnitude^2.
    """
    error = torch.linalg.matrix_norm(b.cpu().double() @ a.cpu().double() - dense)
    floor = torch.stack(
        [
            reference.rules.svd_floor(module, int(rank))
            for module, rank in zip(dense, ranks.tolist(), strict=True)
        ]
    )
    slack = product_tolerance(b.dtype, precision)
    if precision == "fast":
        cancels = magnitude.square() > CANCELLATION * dense.square().sum((1, 2))
        noise = EPS[torch.float32] * magnitude.square()
        floor = torch.where(cancels, (floor.square() + noise).sqrt(), floor)
    assert_within(error, floor * (1 + slack) + slack * magnitude, "distance to the update")


def assert_orthonormal_rows(
    a: torch.Tensor, sigma: torch.Tensor, ranks: torch.Tensor, precision: str = "exact"
) -> None:
    """A_g A_g^T = I on the leading ranks.

    A row is divided by its singular value somewhere, so the bound grows with lambda_1 / lambda_p.
    """
    resolution = EPS[torch.float64] if precision == "exact" else EPS[torch.float32]
    a, sigma = a.cpu(), sigma.cpu()
    stacked_rank = sigma.shape[1]
    for module, rank in enumerate(ranks.tolist()):
        if rank == 0:
            continue
        rows = a[module, :rank].double()
        error = (rows @ rows.mT - torch.eye(rank, dtype=torch.float64)).abs().max()
        spread = float((sigma[module, 0] / sigma[module, rank - 1]) ** 2)
        bound = 4 * EPS[a.dtype] + SPECTRUM_TERMS * stacked_rank * resolution * spread
        assert_within(error, bound, f"orthonormal rows of module {module} at rank {rank}")


def assert_zero_beyond(b: torch.Tensor, a: torch.Tensor, ranks: torch.Tensor) -> None:
    """Exactly zero columns of B and rows of A beyond each module's rank."""
    for module, rank in enumerate(ranks.tolist()):
        assert not b[module, :, rank:].any(), f"module {module}: B is not zero beyond rank {rank}"
        assert not a[module, rank:].any(), f"module {module}: A is not zero beyond rank {rank}"


def assert_singular_values(
    sigma: torch.Tensor,
    expected: torch.Tensor,
    ranks: torch.Tensor,
    magnitude: torch.Tensor,
    precision: str = "exact",
) -> None:
    """Squares within c R eps magnitude^2, descending; beyond each rank they may also be zero."""
    sigma = sigma.cpu()
    assert sigma.dtype == torch.float64
    assert bool((sigma[:, 1:] <= sigma[:, :-1]).all()), "singular values are not descending"
    assert bool((sigma >= 0).all()), "negative singular values"
    resolution = EPS[torch.float64] if precision == "exact" else EPS[torch.float32]
    error = (sigma.square() - expected.square()).abs()
    optional = torch.arange(sigma.shape[1]) >= ranks.cpu()[:, None]
    error = torch.where(optional & (sigma == 0), 0.0, error)
    bound = SPECTRUM_TERMS * sigma.shape[1] * resolution * magnitude.square()
    assert_within(error, bound[:, None], "squared singular values")


def assert_ranks(
    ranks: torch.Tensor,
    sigma: torch.Tensor,
    magnitude: torch.Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> None:
    """Ranks equal to the reference's, or to a neighbour's within a band around the threshold.

    The band is RANK_BAND where the clients do not cancel, and c R eps times the cancellation
    (magnitude^2 / ||dW||^2) where they do. At energy 1 the threshold is the rounding of the sum
    itself, and the band is c R eps.
    """
    ranks = ranks.cpu()
    assert ranks.dtype == torch.int64
    resolution = EPS[torch.float64] if precision == "exact" else EPS[torch.float32]
    for module, rank in enumerate(ranks.tolist()):
        total = sigma[module].square().sum()
        band = 4 * sigma.shape[1] * EPS[torch.float64]
        if total > 0 and not (energy == 1.0 and precision == "exact"):
            cancellation = float(magnitude[module] ** 2 / total)
            noise = SPECTRUM_TERMS * sigma.shape[1] * resolution * cancellation
            band = max(RANK_BAND[precision], noise if cancellation > CANCELLATION else 0.0)
        lowest, highest = (
            int(reference.select_rank(sigma[module, None], total[None], share, max_rank)[0])
            for share in (max(energy - band, 1e-12), min(energy + band, 1.0))
        )
        assert lowest <= rank <= highest, (
            f"module {module}: rank {rank} at energy {energy}, "
            f"the reference allows {lowest} to {highest}"
        )


def assert_same_bits(first: Any, second: Any) -> None:
    """Two results, or tuples of results, equal bit for bit."""
    first = first if isinstance(first, tuple) else (first,)
    second = second if isinstance(second, tuple) else (second,)
    for index, (left, right) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(left, right), f"result {index} differs"


def assert_compiles(
    face: Callable[..., Any], calls: Sequence[tuple[Any, ...]], backend: str = "aot_eager"
) -> None:
    """One full graph with dynamic shapes serves calls of several sizes with the eager results."""
    torch.compiler.reset()
    compiled = torch.compile(face, backend=backend, fullgraph=True, dynamic=True)
    for arguments in calls:
        assert_same_bits(compiled(*arguments), face(*arguments))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialized tensors hold NaN (or the largest integer) inside this context."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def strided_in_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values as a non-contiguous view whose neighbours in memory are all NaN.

    The last two dimensions are exchanged in memory and every second element is used.
    """
    *leading, rows, columns = x.shape
    storage = x.new_full((*leading, columns + 2, 2 * rows + 2), torch.nan)
    view = storage[..., 1 : columns + 1, 1 : 2 * rows + 1 : 2].mT
    view.copy_(x)
    return view


def assert_refuses(error: type[Exception], name: str, arguments: tuple[object, ...]) -> None:
    """The face raises the error, the raw operator a RuntimeError that names it, with one text."""
    with pytest.raises(error) as said:
        getattr(ops, name)(*arguments)
    assert type(said.value) is error
    with pytest.raises(RuntimeError) as refused:
        getattr(torch.ops.fedlora, name)(*arguments)
    assert str(refused.value).splitlines()[0] == f"fedlora::{name}: {said.value}"
