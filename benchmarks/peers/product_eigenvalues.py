"""sigma^2 as the eigenvalues of G_B D G_A D, which is not symmetric; values without vectors."""

import torch
from torch import Tensor

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Spectrum


def product_eigenvalues(task: Spectrum) -> list[Tensor]:
    """sigma^2 per module."""
    return [
        torch.linalg.eigvals(b @ (diagonal[:, None] * a * diagonal)).real.sort(descending=True)[0]
        for b, a, diagonal in zip(*task.grams, task.stacks.scale, strict=True)
    ]


PEER: Peer[Spectrum] = Peer(
    "eigenvalues of the product",
    "torch.linalg.eigvals, module by module",
    lambda task: Prepared(lambda: product_eigenvalues(task), note="values only"),
    lambda task, found: [task.values(torch.stack(found).clamp_min(0).sqrt(), task.ranks)],
    less=True,
    # On a GPU a general matrix takes 30 times as long as a symmetric one.
    answers=lambda task: not task.stacks.b.is_cuda,
)
