"""FedEx-LoRA (arXiv 2410.09432, ACL 2025): FedIT's averages, and the rest as a residual.

    residual = dW - s B_mean A_mean = B E A    with E = D - s X Y

The clients go on from the averages and merge the residual, kept in factored form (rank <= R, or
truncated by its SVD), into their base. Exact when not truncated.
"""

from collections.abc import Sequence

import torch

from fedlora_kernels import ops
from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.fedit import mean
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Mixture, Product, Solution, leading


def solve(grams: Sequence[Grams], *, residual_rank: int | None = None) -> list[Solution]:
    """The averages and the residual.

    Args:
        grams: one per batch.
        residual_rank: truncate the residual to this rank; the whole residual when None.

    Raises:
        AdapterError: clients' ranks differ; names the client and the module.
        ValueError: residual_rank is under 1.
    """
    if residual_rank is not None and residual_rank < 1:
        raise ValueError(f"residual_rank must be at least 1, found {residual_rank}")
    solutions = []
    for batch in grams:
        averages = mean(batch, "fedex")
        solutions.append(Solution(averages, _residual(batch, averages, residual_rank)))
    return solutions


def _residual(grams: Grams, averages: Mixture, rank: int | None) -> Product:
    gap = torch.diag_embed(grams.scale) - averages.x @ averages.y
    identity = torch.eye(gap.shape[1], dtype=gap.dtype, device=gap.device).expand_as(gap)
    if rank is None:
        full = torch.full((gap.shape[0],), gap.shape[1], device=gap.device)
        return Product(identity, gap, full)
    # The residual is B (E A): the same factorisation with E A in the place of A.
    ones = torch.ones_like(grams.scale)
    _, _, left, right, _ = ops.spectrum(grams.b, gap @ grams.a @ gap.mT, ones)
    ranks = torch.full((gap.shape[0],), min(rank, grams.full_rank), device=gap.device)
    return leading(left, right @ gap, ranks)


RULE = Rule(
    name="fedex",
    title="FedEx-LoRA",
    paper="2410.09432",
    solve=solve,
    travels="A and B",
    exact="yes, with its residual",
    is_exact=True,
    heterogeneous=False,
    after="merge",
)
