"""Singular values from two symmetric eigenproblems and the SVD of the core, module by module."""

import torch
from torch import Tensor

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Spectrum


def two_roots(task: Spectrum) -> list[tuple[Tensor, Tensor]]:
    """Left coefficients and singular values per module."""
    found = []
    for b, a, diagonal in zip(*task.grams, task.stacks.scale, strict=True):
        values_b, vectors_b = torch.linalg.eigh(b)
        values_a, vectors_a = torch.linalg.eigh(a)
        root_b = values_b.clamp_min(0).sqrt()[:, None] * vectors_b.mT
        root_a = values_a.clamp_min(0).sqrt()[:, None] * vectors_a.mT
        _, sigma, right = torch.linalg.svd((root_b * diagonal) @ root_a.mT)
        found.append((diagonal[:, None] * (root_a.mT @ right.mT), sigma))
    return found


PEER: Peer[Spectrum] = Peer(
    "2 eigh + SVD",
    "torch.linalg, module by module",
    lambda task: Prepared(lambda: two_roots(task)),
    lambda task, found: [task.values(torch.stack([sigma for _, sigma in found]))],
)
