"""Gram matrices of the stacked factors: G_B = B^T B and G_A = A A^T, by definition."""

import torch


def gram(x: torch.Tensor, rows: bool, precision: str = "exact") -> torch.Tensor:
    """Return the Gram matrix of a batch of stacked factors, accumulated in float64.

    G = x x^T over the rows (the A side), G = x^T x over the columns (the B side).

    Args:
        x: [L, R, d] if ``rows`` else [L, d, R]; any floating dtype.
        rows: whether the stacked rank is the row dimension.
        precision: taken for the operator's signature; the reference is float64 for either value.

    Returns:
        [L, R, R] float64, exactly symmetric.
    """
    del precision
    x = x.double()
    product = x @ x.mT if rows else x.mT @ x
    symmetric: torch.Tensor = (product + product.mT) / 2
    return symmetric
