"""FFA-LoRA (arXiv 2403.12313): A is a fixed common start, only B is trained and averaged: exact.

A = A_1 = ... = A_K        B = sum_k w_k B_k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FFA(Rule):
    """The mean of B beside the common A, bit for bit."""

    title = "FFA-LoRA"
    paper = "2403.12313"
    travels = "B (A is fixed)"
    exact = "exact"
    averages = True
    sends = "b"
    trains = "b"
    separable = True

    @property
    def merging(self) -> FFA:
        """Itself: a mean of means, beside the common A."""
        return self

    def solve(self, grams: Grams) -> Solution:
        """The weighted mean of B, and the first client's A.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels.gram_space.coefficients import Mixture, Solution, common_scaling

        self.equal_rank(grams)
        scaling, folded = common_scaling(grams)
        first = folded.new_zeros(folded.shape)
        first[:, 0] = 1
        return Solution(Mixture(grams.weights * folded, first, scaling, grams.ranks[0]))

    def validate(self, adapters: Sequence[Adapter]) -> None:
        """Refuse clients whose A differs from the first client's (they trained or drew their own).

        Raises:
            AdapterError: names the client, the module and the client it differs from.
        """
        self.common_a(adapters)
