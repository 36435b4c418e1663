"""raFLoRA (arXiv 2602.13486): FlexLoRA in which a rank counts among the clients that have it.

    dW = sum_k s_k B_k diag(v_k1, ..., v_kr) A_k        v_ki = w_k / sum_{j: r_j >= i} w_j

The ranks between two successive client ranks are one partition, weighted over the clients that have
all of it. dW is decomposed at the largest client rank, and B and A carry sqrt(S) each. Client k
receives the first r_k components. A client without a module has rank 0. The weights belong to
positions, so the result depends on the basis of every client's factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class RaFLoRA(Rule):
    """The leading components of the update whose rank partitions are weighted by their holders."""

    title = "raFLoRA"
    paper = "2602.13486"
    exact = "best of each rank, by holders"
    heterogeneous = True
    receives = "leading"

    def solve(self, grams: Grams) -> Solution:
        """The leading singular components of B diag(v s) A."""
        from fedlora_kernels.gram_space.coefficients import Solution, holders, leading

        width = min(max(grams.ranks), grams.full_rank)
        scale = holders(grams) * grams.scalings[:, grams.batch.owner]
        found = grams.decomposed(max_rank=width, scale=scale)
        return Solution(leading(*found.split("balanced"), ranks=grams.same_rank(width)))

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """The largest client rank, or the smaller side of the module."""
        return min(max(ranks), *size)
