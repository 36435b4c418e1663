"""The second pass over the data: coefficients times stacked factors."""

import torch


def combine(
    b: torch.Tensor, a: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B_g = B X and A_g = Y A, computed in float64 and rounded once.

    Args:
        b: [L, m, R], any floating dtype.
        a: [L, R, n], the same dtype.
        x: [L, R, p] float64.
        y: [L, p, R] float64.

    Returns:
        B_g [L, m, p] and A_g [L, p, n] in the dtype of the factors.
    """
    return (b.double() @ x.double()).to(b.dtype), (y.double() @ a.double()).to(a.dtype)
