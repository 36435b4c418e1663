"""FLoRG (arXiv 2602.17095): A from the mean of the clients' Gram matrices A_k^T A_k.

    Q = sum_k w_k A_k^T A_k = V L V^T    A = P L_r^(1/2) V_r^T    B = dW A^+

V_r holds the r leading eigenvectors of Q, and P is the orthogonal matrix that brings A nearest to
the last global A (Procrustes: the polar factor of A_last (L_r^(1/2) V_r^T)^T; the first round has
P = I). The paper's clients train A alone, in updates L A^T A R with fixed L and R. Written as a
factor pair, B_k = L A_k^T beside A_k R, the result has B = L A^T as well. For other pairs B is the
one that brings B A nearest to dW: the global update is dW V_r V_r^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FLoRG(Rule):
    """The leading directions of all A, turned to the last global A, and the B that fits them."""

    title = "FLoRG"
    paper = "2602.17095"
    exact = "dW on the leading directions of A"

    def solve(self, grams: Grams) -> Solution:
        """The eigenvectors, as coefficients of the stacked factors.

        With c_k = sqrt(w_k / sum_j w_j), once per stacked rank, and C G_A C = W L W^T they are
        Y = P W_r^T C and X = diag(s_k w_k / c_k) W_r P^T.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module. Or the carried
                adapter has another rank.
        """
        import torch

        from fedlora_kernels.gram_space.coefficients import Product, Solution, common_scaling
        from fedlora_kernels.ops.product import decomposed, product

        self.equal_rank(grams)
        rank = grams.ranks[0]
        total = grams.weights.sum()
        share = (grams.weights / total.where(total > 0, 1)).sqrt()[grams.batch.owner]
        _, vectors = decomposed(torch.linalg.eigh, share[:, None] * grams.a * share)
        leading = vectors[:, :, -rank:].flip(-1)
        y = leading.mT * share
        if 0 < len(grams.batch.client_ranks) < len(grams.ranks):
            self.carried_rank(grams)
            turn = _polar(product(grams.a[:, -rank:], y.mT))
            leading, y = product(leading, turn.mT), product(turn, y)
        scaling, folded = common_scaling(grams)
        x = (folded[:, grams.batch.owner] * share * total)[:, :, None] * leading
        return Solution(Product(scaling[:, None, None] * x, y, grams.same_rank(rank), scaling))

    def joins(self, carried: Adapter | None) -> Sequence[tuple[Adapter, float]]:
        """The last global adapter, with weight 0."""
        return () if carried is None else ((carried, 0.0),)

    def carry(self, result: Aggregation) -> Adapter:
        """The global adapter."""
        return result.adapter


def _polar(products: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each, [L,r,r]."""
    import torch

    from fedlora_kernels.ops.product import decomposed, product

    left, _, right = decomposed(torch.linalg.svd, products)
    return product(left, right)
