"""A randomized SVD of the dense update at a fixed rank, with torch's two power iterations."""

from collections.abc import Sequence

import torch

from benchmarks.stand import correctness
from benchmarks.stand.correctness import Check, Pair
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Truncation

EXCESS = 0.05
"""Two power iterations leave a randomized SVD some percent above the optimum."""


def svd_lowrank(task: Truncation) -> list[Pair]:
    """dW = U S V^T, approximately."""
    pairs = []
    for update in task.dense():
        left, values, right = torch.svd_lowrank(update, q=task.fixed_rank)
        pairs.append((left * values, right.mT))
    return pairs


def check(task: Truncation, pairs: Sequence[Pair]) -> list[Check]:
    """Within some percent of the best update of the same rank."""
    each = zip(task.round.parts, task.round.split(pairs), strict=True)
    return [x for part, mine in each for x in correctness.near_optimal(part, mine, EXCESS)]


PEER = Peer(
    "svd_lowrank",
    "torch.svd_lowrank (Halko et al., arXiv 0909.4061) on the dense update",
    lambda task: Prepared(
        lambda: svd_lowrank(task),
        note=f"fixed rank {task.fixed_rank}, randomized",
        facts=task.facts,
    ),
    check,
)
