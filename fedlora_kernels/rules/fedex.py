"""FedEx-LoRA (arXiv 2410.09432, ACL 2025): FedIT's averages, and the rest as a residual.

    residual = dW - s B_mean A_mean = B E A    with E = D - s X Y

The clients continue from the averages and merge the residual, kept in factored form (rank <= R, or
truncated by its SVD), into their base. Exact when not truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule, at_least_one, option

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Mixture, Product, Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FedEx(Rule):
    """The averages and the residual."""

    title = "FedEx-LoRA"
    paper = "2410.09432"
    exact = "exact, with its residual"
    after = "merge"
    residual = True
    bounded = True

    residual_rank: int | None = option(
        None, "truncate the residual to this rank; default: keep the whole residual"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: residual_rank is under 1."""
        at_least_one(residual_rank=self.residual_rank)

    def solve(self, grams: Grams) -> Solution:
        """The means of both factors, and what is missing to the ideal update.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels.gram_space.coefficients import Solution, mean

        self.equal_rank(grams)
        averages = mean(grams)
        return Solution(averages, self._residual(grams, averages))

    def _residual(self, grams: Grams, averages: Mixture) -> Product:
        import torch

        from fedlora_kernels import ops
        from fedlora_kernels.gram_space.coefficients import Product, leading
        from fedlora_kernels.ops.product import product

        gap = torch.diag_embed(grams.scale) - product(averages.x, averages.y)
        if self.residual_rank is None:
            identity = torch.eye(gap.shape[1], dtype=gap.dtype, device=gap.device)
            return Product(identity.expand_as(gap), gap, grams.same_rank(gap.shape[1]))
        # The residual is B (E A): the same factorization with E A in the place of A.
        ones = torch.ones_like(grams.scale)
        _, _, left, right, _ = ops.spectrum(grams.b, product(product(gap, grams.a), gap.mT), ones)
        ranks = grams.same_rank(min(self.residual_rank, grams.full_rank))
        return leading(left, product(right, gap), ranks)

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """The averages' rank and the residual's: r + R, or r + residual_rank where that is less."""
        stacked = sum(ranks)
        whole = min(self.residual_rank, stacked, *size) if self.residual_rank else stacked
        return max(ranks) + whole
