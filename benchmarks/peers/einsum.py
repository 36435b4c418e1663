"""torch.einsum over the clients' stacked A, in the factors' dtype."""

import torch

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Mean


def _prepare(task: Mean) -> Prepared:
    weights = task.stacks.weights.to(task.stacked.dtype)
    return Prepared(lambda: torch.einsum("k,lkrn->lrn", weights, task.stacked))


PEER = Peer(
    "torch.einsum",
    "torch.einsum in the factors' dtype",
    _prepare,
    lambda task, found: task.checks(found, room=4),
)
