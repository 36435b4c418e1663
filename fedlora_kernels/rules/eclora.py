"""ECLoRA (doi 10.1109/TNNLS.2025.3586545): FlexLoRA that remembers what its SVD cut off.

    dW_t + E_(t-1) = U S V^T        U_p S_p V_p^T travels, p the largest client rank
    E_t = dW_t + E_(t-1) - U_p S_p V_p^T        stays on the server

E is one more client in the stack, of weight 1, and is kept as two factors. The authors use a
randomized SVD; here the decomposition is that of the Gram matrices. Client k receives its leading
r_k components. The report compares with dW_t + E_(t-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule, at_least_one, option

if TYPE_CHECKING:
    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class ECLoRA(Rule):
    """The leading components of the update and the error so far."""

    title = "ECLoRA"
    paper = "10.1109/TNNLS.2025.3586545"
    published = "2507"
    exact = "best of each rank, rest later"
    heterogeneous = True
    receives = "leading"

    error_rank: int | None = option(
        None,
        "rank of the error that is kept; default: its whole rank, which grows to min(m, n)",
    )

    def __post_init__(self) -> None:
        """Raises ValueError: error_rank is under 1."""
        at_least_one(error_rank=self.error_rank)

    def solve(self, grams: Grams) -> Solution:
        """The leading singular components, and those that are kept."""
        from fedlora_kernels.gram_space.coefficients import Solution, between, leading

        width = min(max(grams.batch.client_ranks, default=0), grams.full_rank)
        found = grams.spectrum
        ends = (found.sigma[:, : grams.full_rank] > 0).sum(-1)
        if self.error_rank is not None:
            ends = ends.clamp_max(width + self.error_rank)
        return Solution(
            leading(found.left, found.right, grams.same_rank(width)),
            kept=between(found.left, found.right, width, ends),
            spectrum=found,
        )

    def joins(self, carried: Adapter | None) -> Sequence[tuple[Adapter, float]]:
        """The error of the rounds before."""
        return () if carried is None else ((carried, 1.0),)

    def carry(self, result: Aggregation) -> Adapter | None:
        """What was cut off."""
        return result.kept

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """The largest client rank, or the smaller side of the module."""
        return min(max(ranks), *size)
