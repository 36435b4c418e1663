"""FLoRA (arXiv 2409.05976, NeurIPS 2024): the stack itself, exact at rank R = sum_k r_k.

B = [B_1 | ... | B_K]        A = [w_1 s_1 A_1 ; ... ; w_K s_K A_K]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams
    from fedlora_kernels.rules.florist import FLoRIST


@dataclass(frozen=True)
class FLoRA(Rule):
    """The stack. Weights and scalings enter on A's side only."""

    title = "FLoRA"
    paper = "2409.05976"
    exact = "exact, rank R"
    heterogeneous = True
    after = "merge"
    combination = "cat"

    @property
    def merging(self) -> FLoRIST:
        """All of the sum, in no more ranks than it has."""
        from fedlora_kernels.rules.florist import FLoRIST

        return FLoRIST(energy=1.0)

    def solve(self, grams: Grams) -> Solution:
        """D as the coefficients of A."""
        from fedlora_kernels.gram_space.coefficients import Solution, Stacked

        return Solution(Stacked(grams.weights * grams.scalings, grams.batch.owner))

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """R = sum_k r_k."""
        return sum(ranks)
