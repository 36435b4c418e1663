"""The whole pipeline of torch's batched parts: Gram matrices by bmm, two eigh, two products."""

import torch

from benchmarks.stand.correctness import Pair
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Truncation


def bmm_eigh(task: Truncation) -> list[Pair]:
    """Of one kind of modules, in float64, from its Gram matrices.

    D G_A D = V S V^T; with L = V S^(1/2), eigenvectors W of L^T G_B L give B_g = B L W and
    A_g = W^T L^+ D A, without equilibration.
    """
    (stacks,) = task.round.parts
    b, a, scale = stacks.b, stacks.a, stacks.scale
    wide_b, wide_a = b.double(), a.double() * scale[:, :, None]
    values, vectors = torch.linalg.eigh(wide_a @ wide_a.mT)
    root = values.clamp_min(0).sqrt()
    root = root.where(values > values[:, -1:] * values.shape[1] * torch.finfo(values.dtype).eps, 0)
    factor = vectors * root[:, None, :]
    squares, rotation = torch.linalg.eigh(factor.mT @ (wide_b.mT @ wide_b) @ factor)
    squares, rotation = squares.flip(-1).clamp_min(0), rotation.flip(-1)[:, :, : task.max_rank]
    shares = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
    ranks = ((shares < task.energy).sum(-1) + 1).clamp_max(task.fixed_rank)
    inverse = torch.where(root > 0, 1 / root, 0)
    b_g = (wide_b @ (factor @ rotation)).to(b.dtype)
    a_g = (((rotation.mT * inverse[:, None, :]) @ vectors.mT) @ wide_a).to(a.dtype)
    return [(b[:, :p], a[:p]) for b, a, p in zip(b_g, a_g, ranks.tolist(), strict=True)]


PEER: Peer[Truncation] = Peer(
    "bmm + 2 eigh + bmm",
    "torch.bmm and torch.linalg.eigh in float64",
    lambda task: Prepared(lambda: bmm_eigh(task), facts=task.facts),
    lambda task, found: task.checks(found, ranks=False),
)
