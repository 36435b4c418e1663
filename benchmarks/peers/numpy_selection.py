"""Ranks module by module from numpy's cumulative sums, as FLoRIST's released code selects them."""

import numpy as np

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import ENERGY, MAX_RANK, Array, Selection


def ranks(sigma: Array, energy: float, max_rank: int) -> list[int]:
    """The smallest ranks that hold the share ``energy``."""
    found = []
    for values in sigma:
        cumulative = np.cumsum(values**2)
        reached = np.searchsorted(cumulative, energy * cumulative[-1])
        found.append(min(int(reached) + 1, max_rank))
    return found


PEER = Peer(
    "numpy, module by module",
    "FLoRIST, arXiv 2506.09199, algorithm 1 (released code: numpy.cumsum)",
    lambda task: Prepared(lambda: ranks(task.sigma.cpu().numpy(), ENERGY, MAX_RANK)),
    Selection.checks,
)
