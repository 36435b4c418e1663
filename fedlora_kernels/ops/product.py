"""Products and decompositions of the matrices of a batch, each with the bits that it has alone.

BLAS rounds differently where a matrix does not begin on a cache line, and of several matrices with
an odd number of entries, one behind the other, only the first does. Here all of them do, so that a
module's result does not depend on the modules beside it: not on how they are batched, and not on
which process has them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LINE = 64
"""Bytes of a cache line."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """x [...,m,k] times y [...,k,n], whose leading dimensions broadcast: [...,m,n]."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or 0 in (x.numel(), y.numel()):
        return x @ y
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    left, right = (
        _apart(factor.expand(*batch, -1, -1).reshape(-1, *factor.shape[-2:])) for factor in (x, y)
    )
    out = _empty(left, (len(left), left.shape[1], right.shape[2]))
    torch.bmm(left, right, out=out)
    return out.unflatten(0, batch) if batch else out[0]


def decomposed(decompose: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> tuple[Tensor, ...]:
    """What torch.linalg.eigh or svd gives for x [...,m,n], one matrix after the other on a CPU."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return tuple(decompose(x))
    parts = [decompose(one) for one in x.reshape(-1, *x.shape[-2:])]
    return tuple(torch.stack(part).unflatten(0, x.shape[:-2]) for part in zip(*parts, strict=True))


def _apart(x: Tensor) -> Tensor:
    """The same matrices [L,m,n], each from a cache line on."""
    if x.stride(2) != 1 and x.stride(1) == 1:
        return _apart(x.mT).mT
    apart = len(x) == 1 or x.stride(0) * x.element_size() % LINE == 0
    if x.stride(2) == 1 and apart and x.data_ptr() % LINE == 0:
        return x
    return _empty(x, (len(x), x.shape[1], x.shape[2])).copy_(x)


def _empty(like: Tensor, shape: tuple[int, int, int]) -> Tensor:
    modules, rows, columns = shape
    numbers = LINE // like.element_size()
    each = -(-rows * columns // numbers) * numbers
    memory = like.new_empty(modules * each)
    return memory.as_strided((modules, rows, columns), (each, columns, 1))
