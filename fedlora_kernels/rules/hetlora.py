"""HetLoRA (arXiv 2401.06432): factors zero-padded to the largest rank and averaged.

    A = sum_k v_k [A_k ; 0]    B = sum_k v_k [s_k B_k | 0]    v_k ~ w_k ||s_k B_k A_k||_F

Client k takes the first r_k rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class HetLoRA(Rule):
    """The padded averages."""

    title = "HetLoRA"
    paper = "2401.06432"
    exact = "padded averages, not exact"
    heterogeneous = True
    receives = "leading"

    norm_weighted: bool = option(
        True,
        "weight a client by the norm of its update beside its own weight (the paper's "
        "sparsity-weighted aggregation); False is plain zero-padding",
    )

    @property
    def averages(self) -> bool:
        """A client's norm is known when it is read, but a result holds no sum of the norms."""
        return not self.norm_weighted

    def solve(self, grams: Grams) -> Solution:
        """The coefficients that pad and average."""
        import torch

        from fedlora_kernels.gram_space.coefficients import Product, Solution

        weights = grams.weights.expand_as(grams.scalings)
        if self.norm_weighted:
            weights = _by_norm(grams, weights)
        widest = max(grams.ranks)
        position = torch.cat([torch.arange(r, device=weights.device) for r in grams.ranks])
        place = torch.nn.functional.one_hot(position, widest).double()  # [R,p]
        # Clients without a module count as B = 0: only B's weights sum to less than 1.
        total = weights.sum(-1, keepdim=True)
        per_rank_b = (weights * grams.scalings) @ grams.membership.T  # [L,R]
        per_rank_a = (weights / total.where(total > 0, 1)) @ grams.membership.T
        padded = Product(
            x=per_rank_b[:, :, None] * place,
            y=(per_rank_a[:, :, None] * place).mT.contiguous(),
            ranks=grams.same_rank(widest),
        )
        return Solution(padded)


def _by_norm(grams: Grams, weights: Tensor) -> Tensor:
    """w_k ||dW_k|| scaled to the same sum; w_k where every update is zero (round 0)."""
    norms = grams.client_products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    weighted = weights * norms
    total = weighted.sum(-1, keepdim=True)
    share = weighted / total.where(total > 0, 1) * weights.sum(-1, keepdim=True)
    return share.where(total > 0, weights)
