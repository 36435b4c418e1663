"""spectrum: the singular value decomposition of every module's update, from two Gram matrices.

With T = diag((G_B,ii / (D G_A D)_ii)^(1/4)), which gives both factors' columns one scale,

    T D G_A D T = L L^T                    symmetric eigenproblem, clipped at R eps lambda_1
    M = L^T T^+ G_B T^+ L = W S^2 W^T      the spectrum: dW = U S V^T with
    left  = T^+ L W                        B left = U S
    right = W^T L^+ T D                    right A = V^T

Rank deficiency is the ordinary case (all clients start from one A, B starts at zero): directions
under the clip are dropped on the A side, and singular values that count as zero (docs/kernels.md)
are returned as zero with zero coefficients. No division touches ``left``.
"""

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator

Spectrum = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def spectrum(
    gram_b: Tensor,
    gram_a: Tensor,
    scale: Tensor,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> Spectrum:
    """Singular values of ``B diag(scale) A`` and the coefficients of its singular vectors.

    Args:
        gram_b: B^T B, [L,R,R] float64.
        gram_a: A A^T, [L,R,R] float64.
        scale: [L,R], the diagonal of D (weight times scaling, once per rank).
        energy: a backend may stop as soon as the leading values hold this share of the total
            energy and leave the others at zero, as ``cpu`` and ``cuda`` do. ``composed`` and
            ``reference`` always compute all singular values.
        max_rank: likewise a cap on how many are needed.

    Returns:
        sigma [L,R] descending, zero where it counts as zero or was not computed; total_energy [L],
        the sum of all sigma^2; left [L,R,R] with ``B left = U S``; right [L,R,R] with ``right A =
        V^T``, zero where sigma is; info [L] int64, zero where the solver converged.

    Raises:
        ValueError: shapes disagree, energy is outside (0, 1] or max_rank is under 1.
        TypeError: a Gram matrix is not float64.
    """
    return SPECTRUM(gram_b, gram_a, scale, energy, max_rank)


def negligible(rank: int) -> float:
    """R eps: times the larger of lambda_1 and :func:`magnitude`, what still counts as zero."""
    return rank * torch.finfo(torch.float64).eps


def magnitude(gram_b: Tensor, gram_a: Tensor, scale: Tensor) -> Tensor:
    """Sum of the squared norms of the R rank-1 terms, sum_i D_i^2 G_B,ii G_A,ii: [L].

    The scale of rounding: ||dW||^2 is known to about R eps of it, however much the terms cancel.
    """
    diagonal_b, diagonal_a = (gram.diagonal(dim1=-2, dim2=-1) for gram in (gram_b, gram_a))
    return (diagonal_b * scale.square() * diagonal_a).sum(-1)


def right_of_left(sigma: Tensor, left: Tensor, gram_b: Tensor, scale: Tensor) -> Tensor:
    """The right coefficients from the left ones, S^-2 left^T G_B D: [L,p,R] for left [L,R,p].

    For Grams accumulated in float32: they have no small eigenvalues that L^+ could divide by, and
    this form needs the leading singular values only.
    """
    squares = sigma.square()
    inverse = torch.where(squares > 0, 1 / squares, 0)
    return inverse[:, :, None] * (left.mT @ gram_b) * scale[:, None, :]


def _check(
    gram_b: Tensor,
    gram_a: Tensor,
    scale: Tensor,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> None:
    checks.grams(gram_b, gram_a)
    checks.real("scale", scale)
    checks.sizes("scale", scale, gram_b.shape[:2])
    checks.energy(energy)
    checks.max_rank(max_rank)


def _composed(
    gram_b: Tensor,
    gram_a: Tensor,
    scale: Tensor,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> Spectrum:
    modules, rank = scale.shape
    scale = scale.double()
    equal, inverse = _equilibration(gram_b, gram_a, scale)
    row = equal * scale

    values, vectors = torch.linalg.eigh(row[:, :, None] * gram_a * row[:, None, :])
    root = values.clamp_min(0).sqrt()
    root = root.where(values > negligible(rank) * values[:, -1:], 0)
    factor = vectors * root[:, None, :]

    core = factor.mT @ (inverse[:, :, None] * gram_b * inverse[:, None, :]) @ factor
    core = (core + core.mT) / 2
    total_energy = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares, rotation = torch.linalg.eigh(core)
    squares, rotation = squares.flip(-1), rotation.flip(-1)
    # Where clients cancel, lambda_1 itself is rounding of the much larger terms.
    largest = torch.maximum(squares[:, :1], magnitude(gram_b, gram_a, scale)[:, None])
    kept = squares > negligible(rank) * largest
    sigma = squares.clamp_min(0).sqrt().where(kept, 0)
    rotation = rotation.where(kept[:, None, :], 0)

    left = inverse[:, :, None] * (factor @ rotation)
    right = (rotation.mT * _reciprocal(root)[:, None, :]) @ vectors.mT * row[:, None, :]
    info = torch.zeros(modules, dtype=torch.int64, device=gram_b.device)
    return sigma, total_energy, left, right, info


def _equilibration(gram_b: Tensor, gram_a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonals of T and T^+, [L,R] each; zero where a column of B or a row of D A is zero."""
    norm_b = gram_b.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    norm_a = gram_a.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt() * scale.abs()
    present = (norm_b > 0) & (norm_a > 0)
    equal = (norm_b / norm_a).sqrt().where(present, 0)
    return equal, _reciprocal(equal)


def _reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 0 where a value is 0."""
    return torch.where(values > 0, 1 / values, 0)


def _fake(
    gram_b: Tensor,
    gram_a: Tensor,
    scale: Tensor,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> Spectrum:
    modules, rank, _ = gram_b.shape
    return (
        gram_b.new_empty((modules, rank)),
        gram_b.new_empty((modules,)),
        gram_b.new_empty((modules, rank, rank)),
        gram_b.new_empty((modules, rank, rank)),
        gram_b.new_empty((modules,), dtype=torch.int64),
    )


SPECTRUM: Operator[Spectrum] = Operator(
    "spectrum(Tensor gram_b, Tensor gram_a, Tensor scale, float energy=1.0, "
    "SymInt? max_rank=None) -> "
    "(Tensor sigma, Tensor total_energy, Tensor left, Tensor right, Tensor info)",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.spectrum,
)
