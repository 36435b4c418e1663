"""FedSA-LoRA (arXiv 2410.01463): only A is shared and averaged, every client keeps its own B.

    A = sum_k w_k A_k        client k runs s_k B_k A

FedSA-rsLoRA is the same with s = alpha / sqrt(r). FedSA-VeRA shares lambda_d and keeps lambda_b.
The report compares the clients' mean update, sum_k w_k s_k B_k A, with the ideal one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FedSA(Rule):
    """The shared A; B stays with the clients and is never averaged (but in the report)."""

    title = "FedSA-LoRA"
    paper = "2410.01463"
    travels = "A (VeRA: lambda_d)"
    exact = "personal B, shared A"
    averages = True
    sends = "a"
    receives = "own"
    aggregates = ("LORA", "VERA")
    of_holders = True

    @property
    def merging(self) -> FedSA:
        """Itself: a mean of means."""
        return self

    def solve(self, grams: Grams) -> Solution:
        """The mean of A, beside the mean of the B that stay with the clients.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels.gram_space.coefficients import Solution, mean

        self.equal_rank(grams)
        return Solution(mean(grams))
