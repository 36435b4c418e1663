"""torch.linalg.eigh of a batch of symmetric matrices."""

import torch

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Eigenproblems

PEER = Peer(
    "torch.linalg.eigh",
    "torch",
    lambda task: Prepared(lambda: tuple(torch.linalg.eigh(task.matrices))),
    Eigenproblems.checks,
)
