"""Rank selection by energy, one module and one singular value at a time."""

import torch

_EPS = torch.finfo(torch.float64).eps


def counted(sigma: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Return the singular values with zeros where they count as zero.

    sigma_i counts as zero where

        sigma_i^2 <= R eps max(sigma_1^2, sum_k terms_k),

    because float64 sums over the R rank-1 terms D_kk B_k A_k of the update round by that much, and
    the terms may be far larger than what is left of them where clients cancel.

    Args:
        sigma: [R] float64, descending.
        terms: [R] float64, the squared Frobenius norms of the rank-1 terms.

    Returns:
        [R] float64.
    """
    squares = sigma.square()
    zero = len(terms) * _EPS * max(float(squares[0]), float(terms.sum())) if len(terms) else 0.0
    return torch.where(squares > zero, sigma, 0.0)


def select_rank(
    sigma: torch.Tensor,
    total_energy: torch.Tensor,
    energy: float,
    max_rank: int | None = None,
) -> torch.Tensor:
    """Return the smallest rank of each module that captures a share of its energy.

    With lambda_i = sigma_i^2: the smallest p with

        lambda_1 + ... + lambda_p >= (energy - 4 R eps) * total_energy,

    where lambda_i <= R eps lambda_1 counts as zero, so that p never exceeds the numerical rank
    (singular values that ``counted`` has set to zero stay zero).
    p is at least 1 unless the update is zero (then 0), and at most ``max_rank``.
    The 4 R eps is the rounding of the sum itself: an energy exactly on the threshold is inside.

    Args:
        sigma: [L, R] float64, descending.
        total_energy: [L] float64, the squared Frobenius norm of each update.
        energy: the share tau in (0, 1].
        max_rank: cap, or None.

    Returns:
        [L] int64.

    Source: FLoRIST (arXiv 2506.09199), energy thresholding of the core's singular values.
    """
    stacked_rank = sigma.shape[-1]
    ranks = []
    for values, total in zip(sigma.tolist(), total_energy.tolist(), strict=True):
        squares = [value * value for value in values]
        negligible = stacked_rank * _EPS * squares[0]
        threshold = (energy - 4 * stacked_rank * _EPS) * total
        captured, rank = 0.0, 0
        for square in squares:
            if square <= negligible or (rank > 0 and captured >= threshold):
                break
            captured += square
            rank += 1
        ranks.append(rank if max_rank is None else min(rank, max_rank))
    return torch.tensor(ranks, dtype=torch.int64, device=sigma.device)
