"""Stacks by torch.cat: of the factors as they are, and with weights and scalings on A's side."""

import torch

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Stack, stacked_and_scaled


def _prepare(task: Stack) -> Prepared:
    return Prepared(
        lambda: [(torch.cat(b, dim=1), torch.cat(a)) for b, a, _ in task.round.modules],
        note="the factors as they are, without weights and scalings",
    )


PEER = Peer(
    "torch.cat",
    "torch.cat",
    _prepare,
    lambda task, found: task.checks(task.scaled(found)),
    less=True,
)
SCALED = Peer(
    "torch.cat of scaled factors",
    "torch.cat",
    lambda task: Prepared(lambda: list(stacked_and_scaled(task.round))),
    Stack.checks,
)
