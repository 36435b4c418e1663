"""Flower's average of the clients' arrays, as FedIT runs it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Array, Averages, Mean

SOURCE = "Flower flwr.server.strategy.aggregate: numpy sums, as FedIT (arXiv 2305.05644) runs it"


def average(
    clients: Sequence[Sequence[Array]], examples: Sequence[float]
) -> list[npt.NDArray[Any]]:
    """sum_k w_k x_k for each of a client's arrays: multiply all, add pairwise, divide once."""
    weighted = [
        [array * number for array in arrays]
        for arrays, number in zip(clients, examples, strict=True)
    ]
    total = sum(examples)
    return [reduce(np.add, layer) / total for layer in zip(*weighted, strict=True)]


def _mean(task: Mean) -> Prepared:
    arrays, shares = task.arrays(), task.stacks.weights.tolist()
    return Prepared(lambda: average(arrays, shares))


def _averages(task: Averages) -> Prepared:
    arrays, shares = task.arrays(), task.round.shares
    return Prepared(lambda: average(arrays, shares), note="of both factors")


MEAN = Peer(
    "numpy average",
    SOURCE,
    _mean,
    lambda task, found: task.checks(torch.stack([torch.from_numpy(x) for x in found])),
    answers=lambda task: task.stacks.case.dtype == torch.float32,
)
PEER = Peer(
    "numpy average",
    SOURCE,
    _averages,
    lambda task, found: task.checks(*[[torch.from_numpy(x) for x in found[i::2]] for i in (0, 1)]),
    answers=lambda task: task.round.case.dtype == torch.float32,
)
AS_LESS = replace(PEER, less=True)
"""Beside tasks that ask for more than the average."""
