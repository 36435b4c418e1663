"""FlexLoRA's own way: the SVD of the dense update."""

import torch

from benchmarks.peers.cut import rank_at
from benchmarks.stand.correctness import Pair
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Truncation


def dense_svd(task: Truncation) -> list[Pair]:
    """dW = sum_k w_k s_k B_k A_k = U S V^T, cut at p."""
    pairs = []
    for update in task.dense():
        left, values, right = torch.linalg.svd(update, full_matrices=False)
        p = rank_at(values, task.energy, task.max_rank)
        pairs.append((left[:, :p] * values[:p], right[:p]))
    return pairs


PEER = Peer(
    "dense SVD",
    "FlexLoRA, arXiv 2402.11505: SVD of the dense update",
    lambda task: Prepared(lambda: dense_svd(task), facts=task.facts),
    Truncation.checks,
)
