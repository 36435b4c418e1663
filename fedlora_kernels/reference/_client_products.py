"""Inner products of the clients' updates, from dense updates."""

from collections.abc import Sequence

import torch

from fedlora_kernels.reference._spectrum import root


def client_products(
    gram_b: torch.Tensor, gram_a: torch.Tensor, scale: torch.Tensor, ranks: Sequence[int]
) -> torch.Tensor:
    """Return <s_j B_j A_j, s_k B_k A_k> for every pair of clients.

    Factors with these Gram matrices differ from B and A^T by orthonormal columns only, so the dense
    updates s_k F_B[:, k] F_A[:, k]^T have the clients' inner products.

    Args:
        gram_b: [L, R, R] float64, B^T B of the factors side by side.
        gram_a: [L, R, R] float64, A A^T.
        scale: [L, K], s_k.
        ranks: r_k.

    Returns:
        [L, K, K] float64.
    """
    found = gram_b.new_empty(len(gram_b), len(ranks), len(ranks))
    for module in range(len(gram_b)):
        of_b, of_a = root(gram_b[module]), root(gram_a[module])
        updates = [
            (s * (b @ a.mT)).flatten()
            for s, b, a in zip(
                scale[module].double(),
                of_b.split(list(ranks), dim=1),
                of_a.split(list(ranks), dim=1),
                strict=True,
            )
        ]
        points = torch.stack(updates)
        found[module] = points @ points.mT
    return found
