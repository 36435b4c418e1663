"""FLoRA-NA in one call: averages whose product is nearest to the mean update."""

import torch

from fedlora_kernels.reference._gram import gram
from fedlora_kernels.reference._surrogate import surrogate


def flora_na(
    b: torch.Tensor,
    a: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    precision: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return B_hat = sum_u q_u s_u B_u and A_hat = sum_v p_v A_v with p, q by ``surrogate``.

    Args:
        b: [L, m, K r], any floating dtype, clients of equal rank r.
        a: [L, K r, n], the same dtype.
        weights: [K].
        scale: [L, K], the clients' scalings s_k.
        precision: taken for the operator's signature; the reference is float64 for either value.

    Returns:
        B_hat [L, m, r] and A_hat [L, r, n] in the dtype of the factors; p [L, K], q [L, K] and
        the objective [L, max_sweeps + 1] in float64.

    Source: FLoRA-NA (arXiv 2509.26399).
    """
    gram_b, gram_a = gram(b, rows=False, precision=precision), gram(a, rows=True)
    p, q, objective = surrogate(gram_b, gram_a, weights, scale)
    scale = scale.double()
    clients = scale.shape[1]
    blocks_b = torch.stack(b.double().chunk(clients, dim=2))
    blocks_a = torch.stack(a.double().chunk(clients, dim=1))
    b_hat = torch.einsum("lk,klmr->lmr", q * scale, blocks_b)
    a_hat = torch.einsum("lk,klrn->lrn", p, blocks_a)
    return b_hat.to(b.dtype).contiguous(), a_hat.to(a.dtype).contiguous(), p, q, objective
