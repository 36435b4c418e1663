"""Batched products of torch's for Gram matrices and combinations, in float64 and in float32."""

import torch
from torch import Tensor

from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Combination, GramMatrices

SOURCE = "torch.matmul"


def gram(task: GramMatrices, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B^T B and A A^T of widened factors."""
    b, a = task.stacks.b.to(dtype), task.stacks.a.to(dtype)
    return b.mT @ b, a @ a.mT


def combine(task: Combination, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """B X and Y A in the coefficients' dtype, rounded to the factors'."""
    b, a = task.stacks.b, task.stacks.a
    return (b.to(x.dtype) @ x).to(b.dtype), (y @ a.to(y.dtype)).to(a.dtype)


def _combine(task: Combination, dtype: torch.dtype) -> Prepared:
    x, y = (side.to(dtype) for side in task.coefficients)
    return Prepared(lambda: combine(task, x, y))


GRAM_64 = Peer(
    "bmm in float64",
    SOURCE,
    lambda task: Prepared(lambda: gram(task, torch.float64)),
    GramMatrices.checks,
)
GRAM_32 = Peer(
    "bmm in float32",
    SOURCE,
    lambda task: Prepared(lambda: gram(task, torch.float32)),
    GramMatrices.checks,
)
COMBINE_64 = Peer(
    "bmm in float64", SOURCE, lambda task: _combine(task, torch.float64), Combination.checks
)
COMBINE_32 = Peer(
    "bmm in float32", SOURCE, lambda task: _combine(task, torch.float32), Combination.checks
)
