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
    modules, _, *shape = stacked.shape
    total = torch.zeros(modules, *shape, dtype=torch.float64, device=stacked.device)
    for client in range(stacked.shape[1]):
        for module in range(modules):
            total[module] += weights[module, client] * stacked[module, client].double()
    return total.to(stacked.dtype)
