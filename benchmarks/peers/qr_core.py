"""QR decompositions of both stacks and the SVD of the core: the best known composition on a CPU."""

import torch

from benchmarks.peers.cut import rank_at
from benchmarks.stand.correctness import Pair
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Truncation


def qr_core(task: Truncation) -> list[Pair]:
    """B = Q_B R_B, (D A)^T = Q_A R_A, core R_B R_A^T = U S V^T, cut at p."""
    pairs = []
    for b, a in task.stacked():
        basis_b, upper_b = torch.linalg.qr(b)
        basis_a, upper_a = torch.linalg.qr(a.mT)
        left, values, right = torch.linalg.svd(upper_b @ upper_a.mT, full_matrices=False)
        p = rank_at(values, task.energy, task.max_rank)
        pairs.append((basis_b @ (left[:, :p] * values[:p]), right[:p] @ basis_a.mT))
    return pairs


PEER = Peer(
    "QR + QR + core SVD",
    "NVIDIA FLARE HLoRA aggregator: QR of both stacks, SVD of the core",
    lambda task: Prepared(lambda: qr_core(task), facts=task.facts),
    Truncation.checks,
)
