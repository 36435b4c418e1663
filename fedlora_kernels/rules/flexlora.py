"""FlexLoRA (arXiv 2402.11505): the truncated SVD of the ideal update, client k at its own rank.

    dW = U S V^T        client k receives B = U_r S_r / s_k and A = V_r^T with r = r_k

One factorisation serves every rank; the global adapter has the largest client rank.
"""

from collections.abc import Sequence

import torch

from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Solution, leading


def solve(grams: Sequence[Grams], *, rank: int | None = None) -> list[Solution]:
    """The leading components.

    Args:
        grams: one per batch.
        rank: rank of the global adapter; the largest client rank of each module when None.

    Raises:
        ValueError: rank is under 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}")
    solutions = []
    for batch in grams:
        _, _, left, right = batch.spectrum
        width = min(max(batch.ranks) if rank is None else rank, batch.full_rank)
        ranks = torch.full((len(batch.modules),), width, device=left.device)
        solutions.append(Solution(leading(left, right, ranks)))
    return solutions


RULE = Rule(
    name="flexlora",
    title="FlexLoRA",
    paper="2402.11505",
    solve=solve,
    travels="A and B",
    exact="best of its rank",
    is_exact=False,
    heterogeneous=True,
    receives="leading",
)
