"""FedIT (arXiv 2305.05644): factors averaged one by one.

    A = sum_k w_k A_k        B = sum_k w_k B_k

Not exact: the product of means is not the mean of products. Its error is the reason the other
rules exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FedIT(Rule):
    """The averages. A client without a module counts as B = 0, so only B's weights shrink."""

    title = "FedIT"
    paper = "2305.05644"
    exact = "product of means, not exact"
    averages = True
    separable = True
    of_holders = True

    @property
    def merging(self) -> FedIT:
        """Itself: a mean of means."""
        return self

    def solve(self, grams: Grams) -> Solution:
        """The weighted means of both factors.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels.gram_space.coefficients import Solution, mean

        self.equal_rank(grams)
        return Solution(mean(grams))
