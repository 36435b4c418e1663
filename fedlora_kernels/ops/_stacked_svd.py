"""stacked_svd: FLoRIST in one call (arXiv 2506.09199): stacked factors in, truncated SVD out.

    dW = B diag(scale) A = U S V^T        B_g = U_p S_p      A_g = V_p^T

with p per module by energy (select_rank). Three routes, by shape and dtype:

    R < min(m, n)    gram, spectrum, select_rank, combine: one pass over the data each way
    R >= min(m, n)   the Gram matrix of the dense update on its smaller side, which is smaller than
                     the stack: dW dW^T = U S^2 U^T, A_g = S^-1 U^T dW
    float64 data     QR of both factors and an SVD of the core R_B D R_A^T: a Gram matrix would
                     lose half of the digits

"fast" forms float32 Gram matrices with float64 promotion and takes the right vectors from the left
ones, right = S^-2 left^T G_B D, because a float32 Gram has no small eigenvalues to divide by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.backends.lists import stack
from fedlora_kernels.backends.solver import composed_route
from fedlora_kernels.ops import checks
from fedlora_kernels.ops._spectrum import magnitude, negligible, right_of_left
from fedlora_kernels.ops.operator import Operator

# Share of the magnitude under which sigma^2 is float32 rounding, where clients cancel (measured
# noise: 2e-8 at R = 36 with chunks of 512; eps is 1.2e-7).
_FAST_NOISE = torch.finfo(torch.float32).eps / 16

StackedSVD = tuple[Tensor, Tensor, Tensor, Tensor]


def stacked_svd(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> StackedSVD:
    """Best low-rank factors of L modules' updates.

    Args:
        b: [L,m,R], the clients' B side by side; bf16, fp16, fp32 or fp64.
        a: [L,R,n], the clients' A on top of each other; b's dtype.
        scale: [L,R], weight times scaling, once per rank; float32 or float64.
        energy: share of the energy to keep, in (0, 1]; at most 1 - 1e-6 with "fast".
        max_rank: columns of the result; min(R, m, n) when None.
        precision: "exact" (float64 accumulation) or "fast" (float32 with promotion).

    Returns:
        B_g [L,m,max_rank], singular values included, and A_g [L,max_rank,n], both zero beyond each
        module's rank, in the adapters' dtype; sigma [L,R] float64, zero where it counts as zero
        (docs/kernels.md) or was not computed; ranks [L] int64, 0 where the update is zero.

    Raises:
        ValueError: shapes disagree, or an option is out of range.
        TypeError: dtypes are not those named above.
    """
    return STACKED_SVD(b, a, scale, energy, max_rank, precision)


def stacked_svd_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> StackedSVD:
    """:func:`stacked_svd` of clients' factors where they lie: ``b[l*K + k]`` [m,r_k] beside
    ``a[l*K + k]`` [r_k,n], L = ``scale.shape[0]``. Results and errors are :func:`stacked_svd`'s.
    """
    return STACKED_SVD_LIST(b, a, scale, energy, max_rank, precision)


def _check_options(energy: float, max_rank: int | None, precision: str) -> None:
    checks.energy(energy)
    checks.max_rank(max_rank)
    checks.precision(precision)
    checks.resolvable(energy, precision)


def _check(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> None:
    checks.pair(b, a)
    checks.real("scale", scale)
    checks.sizes("scale", scale, a.shape[:2])
    _check_options(energy, max_rank, precision)


def _check_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> None:
    checks.dimensions("scale", scale, 2)
    checks.real("scale", scale)
    rank = checks.list_pair(b, a, int(scale.shape[0]))
    checks.sizes("scale", scale, (scale.shape[0], rank))
    _check_options(energy, max_rank, precision)


def _composed(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> StackedSVD:
    rank = b.shape[2]
    smaller = min(b.shape[1], a.shape[2])
    columns = min(rank, smaller) if max_rank is None else max_rank
    scale = scale.double()
    route = composed_route(rank, smaller, b.dtype == torch.float64, precision)
    if route == "qr":
        return _by_qr(b, a, scale, energy, columns)
    if route == "smaller side":
        return _by_smaller_side(b, a, scale, energy, columns)
    return _by_grams(b, a, scale, energy, columns, precision)


def _by_grams(
    b: Tensor, a: Tensor, scale: Tensor, energy: float, columns: int, precision: str
) -> StackedSVD:
    ops = torch.ops.fedlora
    gram_b, gram_a = ops.gram(b, False, precision), ops.gram(a, True, precision)
    sigma, total_energy, left, right, _ = ops.spectrum(gram_b, gram_a, scale, energy, columns)
    if precision == "fast":
        noise = _FAST_NOISE * magnitude(gram_b, gram_a, scale)[:, None]
        sigma = sigma.where(sigma.square() > noise, 0)
    ranks = ops.select_rank(sigma, total_energy, energy, columns)
    x, y = _leading(left, ranks, columns), right[:, :columns]
    if precision == "fast":
        y = right_of_left(sigma[:, :columns], left[:, :, :columns], gram_b, scale)
        x, y = x.float(), y.float()
    b_g, a_g = ops.combine(b, a, x, _leading(y.mT, ranks, columns).mT)
    return b_g, a_g, sigma, ranks


def _by_smaller_side(
    b: Tensor, a: Tensor, scale: Tensor, energy: float, columns: int
) -> StackedSVD:
    rank = b.shape[2]
    dense = (b.double() * scale[:, None, :]) @ a.double()
    tall = dense.shape[1] > dense.shape[2]
    if tall:
        dense = dense.mT
    side = dense @ dense.mT
    squares, vectors = torch.linalg.eigh((side + side.mT) / 2)
    squares, vectors = squares.flip(-1), vectors.flip(-1)
    squares = squares.where(squares > _zero(squares, b, a, scale), 0)
    sigma = torch.nn.functional.pad(squares.sqrt(), (0, rank - squares.shape[1]))
    ranks = torch.ops.fedlora.select_rank(sigma, squares.sum(-1), energy, columns)
    vectors = _leading(vectors, ranks, columns)
    values = _leading(squares.sqrt()[:, None, :], ranks, columns)
    projected = vectors.mT @ dense
    inverse = torch.where(values > 0, 1 / values, 0).mT
    if tall:  # dW = V S U^T with U on the smaller side
        b_g, a_g = projected.mT, vectors.mT
    else:
        b_g, a_g = vectors * values, projected * inverse
    return b_g.to(b.dtype).contiguous(), a_g.to(a.dtype).contiguous(), sigma, ranks


def _by_qr(b: Tensor, a: Tensor, scale: Tensor, energy: float, columns: int) -> StackedSVD:
    rank = b.shape[2]
    basis_b, upper_b = torch.linalg.qr(b)
    basis_a, upper_a = torch.linalg.qr(a.mT)
    core = (upper_b * scale[:, None, :]) @ upper_a.mT
    rotation_b, values, rotation_a = torch.linalg.svd(core, full_matrices=False)
    squares = values.square()
    kept = values.where(squares > _zero(squares, b, a, scale), 0)
    sigma = torch.nn.functional.pad(kept, (0, rank - values.shape[1]))
    ranks = torch.ops.fedlora.select_rank(sigma, squares.sum(-1), energy, columns)
    b_g = basis_b @ _leading(rotation_b * values[:, None, :], ranks, columns)
    a_g = _leading(rotation_a.mT, ranks, columns).mT @ basis_a.mT
    return b_g, a_g, sigma, ranks


def _zero(squares: Tensor, b: Tensor, a: Tensor, scale: Tensor) -> Tensor:
    """At or under which an eigenvalue counts as zero, from the factors themselves: [L,1]."""
    terms = (b.double().square().sum(1) * scale.square() * a.double().square().sum(2)).sum(-1)
    return negligible(b.shape[2]) * torch.maximum(squares[:, :1], terms[:, None])


def _leading(columns: Tensor, ranks: Tensor, count: int) -> Tensor:
    """The first ``count`` columns of each module, zero beyond its rank: [L,d,count]."""
    have = min(count, columns.shape[2])
    keep = torch.arange(have, device=ranks.device)[None, :] < ranks[:, None]
    kept = columns[:, :, :have].where(keep[:, None, :], 0)
    return torch.nn.functional.pad(kept, (0, count - have))


def _composed_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> StackedSVD:
    modules = scale.shape[0]
    result: StackedSVD = torch.ops.fedlora.stacked_svd(
        stack(b, modules, rows=False),
        stack(a, modules, rows=True),
        scale,
        energy,
        max_rank,
        precision,
    )
    return result


def _fake(
    b: Tensor,
    a: Tensor,
    scale: Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> StackedSVD:
    modules, rows, rank = b.shape
    columns = min(rank, rows, a.shape[2]) if max_rank is None else max_rank
    return (
        b.new_empty((modules, rows, columns)),
        b.new_empty((modules, columns, a.shape[2])),
        b.new_empty((modules, rank), dtype=torch.float64),
        b.new_empty((modules,), dtype=torch.int64),
    )


_OPTIONS = "Tensor scale, float energy, SymInt? max_rank=None, str precision='exact'"
_RESULTS = "(Tensor b_g, Tensor a_g, Tensor sigma, Tensor ranks)"
STACKED_SVD: Operator[StackedSVD] = Operator(
    f"stacked_svd(Tensor b, Tensor a, {_OPTIONS}) -> {_RESULTS}",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.stacked_svd,
)
STACKED_SVD_LIST: Operator[StackedSVD] = Operator(
    f"stacked_svd_list(Tensor[] b, Tensor[] a, {_OPTIONS}) -> {_RESULTS}",
    check=_check_list,
    composed=_composed_list,
)
