"""Weighted sum over the clients."""

import torch


def weighted_sum(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return sum_k w_k x_k, computed in float64 and rounded once.

    Args:
        stacked: [L, K, ...], any floating dtype.
        weights: [K] or [L, K].

    Returns:
        [L, ...] in the dtype of ``stacked``.
    """
    weights = weights.double().expand(stacked.shape[:2])
    total = torch.zeros_like(stacked[:, 0], dtype=torch.float64)
    for client in range(stacked.shape[1]):
        for module in range(stacked.shape[0]):
            total[module] += weights[module, client] * stacked[module, client].double()
    return total.to(stacked.dtype)
