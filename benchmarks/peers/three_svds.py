"""FLoRIST's own way to its factors: the SVDs of both stacks and of the core between them."""

import torch

from benchmarks.peers.cut import rank_at
from benchmarks.stand.correctness import Pair
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Truncation


def three_svds(task: Truncation) -> list[Pair]:
    """B = U_B S_B V_B^T, D A = U_A S_A V_A^T, core S_B V_B^T U_A S_A = U S V^T, cut at p.

    B_g = U_B U_p S_p, A_g = V_p^T V_A^T; weights and scalings are on the A side.
    """
    pairs = []
    for b, a in task.stacked():
        left_b, values_b, right_b = torch.linalg.svd(b, full_matrices=False)
        left_a, values_a, right_a = torch.linalg.svd(a, full_matrices=False)
        core = values_b[:, None] * (right_b @ left_a) * values_a
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        p = rank_at(values, task.energy, task.max_rank)
        pairs.append((left_b @ (left[:, :p] * values[:p]), right[:p] @ right_a))
    return pairs


PEER = Peer(
    "three SVDs",
    "FLoRIST, arXiv 2506.09199, algorithm 1 (released code: torch.linalg.svd three times)",
    lambda task: Prepared(lambda: three_svds(task), facts=task.facts),
    Truncation.checks,
)
