"""FLoRIST (arXiv 2506.09199, MLSys 2026): the truncated SVD at a share of each module's energy.

    dW = U S V^T        p = smallest rank with sum_{i<=p} sigma_i^2 >= energy * ||dW||_F^2
    B = U_p S_p         A = V_p^T        (split="b"; "balanced" puts sqrt(S) on both, "a" S on A)

The paper decomposes the stacked B, the stacked A and a core; two Gram matrices and one
eigenproblem give the same factors. Singular values are not shrunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.grams import Grams
from fedlora_kernels.ops import checks
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Solution, leading

SPLITS = ("b", "balanced", "a")


def solve(
    grams: Sequence[Grams],
    *,
    energy: float = 0.9,
    rank: int | None = None,
    max_rank: int | None = None,
    rank_budget: int | None = None,
    energies: Sequence[float] = (),
    split: str = "b",
) -> list[Solution]:
    """The leading components.

    Args:
        grams: one per batch.
        energy: share of the energy that each module keeps, in (0, 1].
        rank: a fixed rank instead, capped at min(R, m, n).
        max_rank: cap on every module's rank.
        rank_budget: the sum of all modules' ranks instead; spent, largest sigma^2 / (m + n)
            first, where a parameter buys the most energy (every non-zero module gets one). The
            Gram matrices of all modules are in memory at once then.
        energies: more shares to report ranks and errors for, from the same factorisation.
        split: which factor carries the singular values: "b", "balanced" or "a".

    Raises:
        ValueError: an option is out of range, or rank and rank_budget are both given.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    for name, value in (("rank", rank), ("max_rank", max_rank), ("rank_budget", rank_budget)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if rank is not None and rank_budget is not None:
        raise ValueError("rank and rank_budget cannot both be given")
    if rank_budget is not None:
        ranks = _spend(grams, rank_budget, max_rank)
    else:
        ranks = [_ranks(batch, energy, rank, max_rank) for batch in grams]
    return [
        Solution(
            leading(*_split(batch, split), ranks=chosen),
            sweep={share: _ranks(batch, share, None, max_rank) for share in energies},
        )
        for batch, chosen in zip(grams, ranks, strict=True)
    ]


def _ranks(grams: Grams, energy: float, rank: int | None, max_rank: int | None) -> Tensor:
    sigma, total_energy, _, _ = grams.spectrum
    cap = min(grams.full_rank, max_rank or grams.full_rank)
    if rank is not None:
        return torch.full_like(sigma[:, 0], min(rank, cap), dtype=torch.int64)
    checks.resolvable(energy, grams.precision)
    return ops.select_rank(sigma, total_energy, energy, cap)


def _spend(grams: Sequence[Grams], budget: int, max_rank: int | None) -> list[Tensor]:
    """Greedy is optimal: within a module the values fall, so each is bought after the last."""
    worth, module = [], []
    offset = 0
    for batch in grams:
        sigma = batch.spectrum[0].cpu()[:, : min(batch.full_rank, max_rank or batch.full_rank)]
        value = sigma.square() / sum(batch.size)
        value[:, 0] = value[:, 0].where(value[:, 0] == 0, torch.inf)  # at least rank 1
        worth.append(value.flatten())
        count = len(batch.modules)
        module.append((offset + torch.arange(count)).repeat_interleave(value.shape[1]))
        offset += count
    values, modules = torch.cat(worth), torch.cat(module)
    live = int((values == torch.inf).sum())
    if budget < live:
        raise ValueError(f"rank_budget {budget} is less than rank 1 for each of {live} modules")
    order = values.argsort(descending=True, stable=True)[:budget]
    bought = modules[order[values[order] > 0]].bincount(minlength=offset)
    parts = bought.split([len(batch.modules) for batch in grams])
    return [part.to(batch.b.device) for part, batch in zip(parts, grams, strict=True)]


def _split(grams: Grams, split: str) -> tuple[Tensor, Tensor]:
    sigma, _, left, right = grams.spectrum
    if split == "b":
        return left, right
    moved = sigma if split == "a" else sigma.sqrt()
    inverse = torch.where(moved > 0, 1 / moved, 0)
    return left * inverse[:, None, :], right * moved[:, :, None]


RULE = Rule(
    name="florist",
    title="FLoRIST",
    paper="2506.09199",
    solve=solve,
    travels="A and B",
    exact="best of its rank",
    is_exact=False,
    heterogeneous=True,
    joint=("rank_budget",),
)
