"""HetLoRA (arXiv 2401.06432): factors zero-padded to the largest rank and averaged.

    A = sum_k v_k [A_k ; 0]    B = sum_k v_k [s_k B_k | 0]    v_k ~ w_k ||s_k B_k A_k||_F

Client k takes the first r_k rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Product, Solution


def solve(grams: Sequence[Grams], *, norm_weighted: bool = True) -> list[Solution]:
    """The padded averages.

    Args:
        grams: one per batch.
        norm_weighted: weight a client by the norm of its update beside its own weight (the
            paper's sparsity-weighted aggregation); False is plain zero-padding.
    """
    return [Solution(_padded_mean(batch, norm_weighted)) for batch in grams]


def _padded_mean(grams: Grams, norm_weighted: bool) -> Product:
    weights = grams.weights.expand_as(grams.scalings)
    if norm_weighted:
        weights = _by_norm(grams, weights)
    widest = max(grams.ranks)
    position = torch.cat([torch.arange(rank, device=grams.b.device) for rank in grams.ranks])
    place = torch.nn.functional.one_hot(position, widest).double()  # [R,p]
    # Clients without a module count as B = 0: only B's weights sum to less than 1.
    total = weights.sum(-1, keepdim=True)
    per_rank_b = (weights * grams.scalings) @ grams.membership.T  # [L,R]
    per_rank_a = (weights / total.where(total > 0, 1)) @ grams.membership.T
    ranks = torch.full((len(grams.modules),), widest, device=grams.b.device)
    return Product(
        x=per_rank_b[:, :, None] * place,
        y=(per_rank_a[:, :, None] * place).mT.contiguous(),
        ranks=ranks,
    )


def _by_norm(grams: Grams, weights: Tensor) -> Tensor:
    """w_k ||dW_k|| scaled to the same sum; w_k where every update is zero (round 0)."""
    norms = grams.client_products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    weighted = weights * norms
    total = weighted.sum(-1, keepdim=True)
    share = weighted / total.where(total > 0, 1) * weights.sum(-1, keepdim=True)
    return share.where(total > 0, weights)


RULE = Rule(
    name="hetlora",
    title="HetLoRA",
    paper="2401.06432",
    solve=solve,
    travels="A and B",
    exact="no",
    is_exact=False,
    heterogeneous=True,
    receives="leading",
)
