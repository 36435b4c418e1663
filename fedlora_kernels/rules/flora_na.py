"""FLoRA-NA (arXiv 2509.26399): surrogate averages that come closest to the ideal update.

    A_hat = sum_u p_u A_u    B_hat = sum_u q_u B_u    min over p, q of ||dW - s B_hat A_hat||_F

The paper leaves the solver open; ours is exact alternating least squares in Gram space
(ops.surrogate), started at FedIT's averages, so the error is never above FedIT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FLoRANA(Rule):
    """The surrogate averages."""

    title = "FLoRA-NA"
    paper = "2509.26399"
    exact = "closest pair of averages"

    max_sweeps: int = option(50, "at most so many pairs of least-squares steps")
    tol: float = option(
        1e-12, "stop when a sweep lowers the squared error by no more than tol * ||dW||^2"
    )

    def solve(self, grams: Grams) -> Solution:
        """The mixing weights p and q.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
            ValueError: max_sweeps or tol is out of range.
        """
        from fedlora_kernels import ops
        from fedlora_kernels.gram_space.coefficients import Mixture, Solution, common_scaling

        self.equal_rank(grams)
        p, q, _ = ops.surrogate(
            grams.b,
            grams.a,
            grams.weights,
            grams.scalings,
            max_sweeps=self.max_sweeps,
            tol=self.tol,
        )
        scaling, folded = common_scaling(grams)
        return Solution(Mixture(q * folded, p, scaling, grams.ranks[0]))
