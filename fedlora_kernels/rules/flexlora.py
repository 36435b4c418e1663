"""FlexLoRA (arXiv 2402.11505): the truncated SVD of the ideal update, client k at its own rank.

    dW = U S V^T        client k receives B = U_r S_r / s_k and A = V_r^T with r = r_k

One factorization is enough for every rank; the global adapter has the largest client rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule, at_least_one, option

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams
    from fedlora_kernels.rules.florist import FLoRIST


@dataclass(frozen=True)
class FlexLoRA(Rule):
    """The leading components, as many as the largest client has ranks."""

    title = "FlexLoRA"
    paper = "2402.11505"
    exact = "best of each client's rank"
    heterogeneous = True
    receives = "leading"
    combination = "svd"

    rank: int | None = option(
        None, "rank of the global adapter; default: the largest client rank of each module"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: rank is under 1."""
        at_least_one(rank=self.rank)

    @property
    def merging(self) -> FLoRIST | None:
        """All of the sum; without ``rank`` the result depends on the clients' ranks as well."""
        from fedlora_kernels.rules.florist import FLoRIST

        return None if self.rank is None else FLoRIST(energy=1.0)

    def solve(self, grams: Grams) -> Solution:
        """The leading singular components."""
        from fedlora_kernels.gram_space.coefficients import Solution, leading

        width = min(self.rank or max(grams.ranks), grams.full_rank)
        found = grams.leading(max_rank=width)
        ranks = grams.same_rank(width)
        return Solution(leading(found.left, found.right, ranks), spectrum=found)
