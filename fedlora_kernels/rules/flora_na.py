"""FLoRA-NA (arXiv 2509.26399): surrogate averages that come closest to the ideal update.

    A_hat = sum_u p_u A_u    B_hat = sum_u q_u B_u    min over p, q of ||dW - s B_hat A_hat||_F

The paper leaves the solver open; ours is exact alternating least squares in Gram space
(ops.surrogate), started at FedIT's averages, so the error is never above FedIT's.
"""

from collections.abc import Sequence

from fedlora_kernels import ops
from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.rule import Rule, equal_rank
from fedlora_kernels.rules.solution import Mixture, Solution, common_scaling


def solve(grams: Sequence[Grams], *, max_sweeps: int = 50, tol: float = 1e-12) -> list[Solution]:
    """The surrogate averages.

    Args:
        grams: one per batch.
        max_sweeps: at most so many pairs of least-squares steps.
        tol: stop when a sweep lowers the squared error by no more than tol * ||dW||^2.

    Raises:
        AdapterError: clients' ranks differ; names the client and the module.
        ValueError: max_sweeps or tol is out of range.
    """
    solutions = []
    for batch in grams:
        rank = equal_rank(batch, "flora_na")
        p, q, _ = ops.surrogate(
            batch.b, batch.a, batch.weights, batch.scalings, max_sweeps=max_sweeps, tol=tol
        )
        scaling, folded = common_scaling(batch)
        solutions.append(Solution(Mixture(q * folded, p, scaling, rank)))
    return solutions


RULE = Rule(
    name="flora_na",
    title="FLoRA-NA",
    paper="2509.26399",
    solve=solve,
    travels="A and B",
    exact="closest average",
    is_exact=False,
    heterogeneous=False,
)
