"""FLoRIST in one call: the best low-rank pair for the weighted sum of the clients' updates."""

import torch

from fedlora_kernels.reference._rank import counted, select_rank


def stacked_svd(
    b: torch.Tensor,
    a: torch.Tensor,
    scale: torch.Tensor,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the truncated SVD of dW = B D A, from the dense update, with Sigma in B.

    dW = U Sigma V^T in float64;  B_g = U_p Sigma_p,  A_g = V_p^T with p by ``select_rank``.

    Args:
        b: [L, m, R], any floating dtype.
        a: [L, R, n], the same dtype.
        scale: [L, R], the diagonal of D.
        energy: share of ||dW||^2 to keep, in (0, 1].
        max_rank: cap on the rank and the width of the result, or None for min(R, m, n).
        precision: taken for the operator's signature; the reference is float64 for either value.

    Returns:
        B_g [L, m, P] and A_g [L, P, n] in the dtype of the factors, P = max_rank or min(R, m, n),
        zero beyond each module's rank; sigma [L, R] float64, descending, zero where
        ``rank.counted`` says so and padded with zeros;
        ranks [L] int64.

    Source: FLoRIST (arXiv 2506.09199); Eckart and Young (1936) for the optimality.
    """
    del precision
    modules, rows, stacked_rank = b.shape
    columns = a.shape[-1]
    attainable = min(stacked_rank, rows, columns)
    width = attainable if max_rank is None else max_rank
    b_global = b.new_zeros(modules, rows, width)
    a_global = a.new_zeros(modules, width, columns)
    sigma = torch.zeros(modules, stacked_rank, dtype=torch.float64, device=b.device)
    ranks = torch.zeros(modules, dtype=torch.int64, device=b.device)
    for module in range(modules):
        scaled, module_a = b[module].double() * scale[module].double(), a[module].double()
        dense = scaled @ module_a
        left, values, right = torch.linalg.svd(dense, full_matrices=False)
        sigma[module, :attainable] = values[:attainable]
        sigma[module] = counted(sigma[module], scaled.square().sum(0) * module_a.square().sum(1))
        total = dense.square().sum()
        ranks[module] = select_rank(sigma[module, None], total[None], energy, max_rank)[0]
        rank = int(ranks[module])
        b_global[module, :, :rank] = left[:, :rank] * values[:rank]
        a_global[module, :rank] = right[:rank]
    return b_global, a_global, sigma, ranks
