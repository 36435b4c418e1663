"""weighted_sum: out[l] = sum_k w_lk x[l, k], one pass over the factors.

Layout      A program owns a run of one module's elements and walks over the clients. The elements
            of a factor are addressed as rows of columns with a stride each, which covers factors
            inside a wider stack (B beside B); anything else is copied first.
Precision   float64 products and sums in ascending order of clients, rounded once.
Memory      registers only: 8 elements a thread, which is one load of 16 bytes of a 16-bit type.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora_kernels.backends.triton import device, tiles
from fedlora_kernels.backends.triton.compiled import traceable
from fedlora_kernels.backends.triton.factors import WIDEST, captured, check_together, upload


@triton.jit
def weighted_run(
    source,
    table,
    weights,
    out,
    clients,
    size,
    columns,
    stride_module,
    stride_client,
    stride_row,
    stride_column,
    weight_module,
    weight_client,
    LISTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A run of ELEMENTS of out; the grid is [modules * runs].

    ``source`` is the stack; with LISTED ``table`` holds the addresses [L, K] of the factors, which
    are contiguous, and ``source`` says their type.
    """
    runs = tl.cdiv(size, ELEMENTS)
    module = (tl.program_id(0) // runs).to(tl.int64)
    place = (tl.program_id(0) % runs).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < size
    if ONE_ROW:
        offsets = place * stride_column
    else:
        offsets = place // columns * stride_row + place % columns * stride_column
    weights += module * weight_module
    table += module * clients
    source += module * stride_module
    total = tl.zeros((ELEMENTS,), tl.float64)
    for _ in range(clients):
        if LISTED:
            factor = tl.load(table).to(source.dtype)
            if ALIGNED:
                factor = tl.multiple_of(factor, 16)
        else:
            factor = source
        weight = tl.load(weights).to(tl.float64)
        total += weight * tl.load(factor + offsets, inside, 0.0).to(tl.float64)
        table += 1
        source += stride_client
        weights += weight_client
    tl.store(out + module * size + place, total.to(out.dtype.element_ty), inside)


def weighted_sum(stacked: Tensor, weights: Tensor) -> Tensor:
    """``fedlora::weighted_sum``."""
    modules, clients = stacked.shape[:2]
    x = _rows(device.legible(stacked))
    return _launch(
        x,
        x,
        weights.expand(modules, clients),
        (x.shape[2] * x.shape[3], x.shape[3], *x.stride()),
        (modules, *stacked.shape[2:]),
        stacked.dtype,
    )


def weighted_sum_list(factors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``fedlora::weighted_sum_list``: the factors are read where they lie."""
    check_together(factors)
    first = factors[0]
    if captured(first):
        return weighted_sum(torch.stack(list(factors)).unflatten(0, weights.shape), weights)
    legible = [device.legible(factor).contiguous() for factor in factors]
    addresses = torch.tensor([factor.data_ptr() for factor in legible], dtype=torch.int64)
    return _launch(
        legible[0],
        upload(addresses, first.device),
        weights,
        (first.numel(), first.numel(), 0, 0, 0, 1),
        (weights.shape[0], *first.shape),
        first.dtype,
        listed=True,
        aligned=not bool((addresses % WIDEST).any()),
    )


def _rows(x: Tensor) -> Tensor:
    """[L, K, rows, columns] of a stack [L, K, ...], without a copy where strides allow it."""
    if x.dim() == 4 and x.stride(2) != x.shape[3] * x.stride(3):
        return x
    return x.reshape(x.shape[0], x.shape[1], 1, math.prod(x.shape[2:]))


def _launch(
    source: Tensor,
    table: Tensor,
    weights: Tensor,
    layout: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    listed: bool = False,
    aligned: bool = False,
) -> Tensor:
    """``layout``: elements, columns, then the strides of module, client, row and column."""
    tile = tiles.chosen("weighted_sum", source.device)
    size, columns = layout[:2]
    result = torch.empty(shape, dtype=device.result_dtype(dtype), device=source.device)
    traceable(weighted_run)[(shape[0] * triton.cdiv(size, tile["elements"]),)](
        source,
        table,
        weights,
        result,
        weights.shape[1],
        *layout,
        *weights.stride(),
        LISTED=listed,
        ALIGNED=aligned,
        ONE_ROW=size == columns,
        ELEMENTS=tile["elements"],
        num_warps=tile["warps"],
    )
    return result.to(dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "weighted_sum": weighted_sum,
    "weighted_sum_list": weighted_sum_list,
}
KERNELS: list[Any] = [weighted_run]
