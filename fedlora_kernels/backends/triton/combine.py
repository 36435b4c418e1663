"""combine: the global factors, B_g = B X and A_g = Y A.

Layout      Both sides are one product, out[depth, column] = sum over ranks of x[depth, rank]
            c[rank, column], with A transposed by its strides. A program owns one tile of one module
            of it and walks over the ranks.
Precision   products and sums in the coefficients' type, float64 or float32, rounded once to the
            factors' type. float32 products of 16-bit factors are three TF32 products on NVIDIA: the
            factor is exact in TF32, so two units in the last place are lost before a rounding to
            11 bits; float32 factors are multiplied as they are.
Memory      factor and coefficient tiles, one fewer than pipeline stages: (64 x 32 x 2 + 32 x 64 x
            8) x 2 = 40 KB for bfloat16 factors with float64 coefficients in three stages.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora_kernels.backends.triton import device, tiles
from fedlora_kernels.backends.triton.compiled import traceable
from fedlora_kernels.backends.triton.factors import (
    Factors,
    listed,
    rank_starts,
    rank_steps,
    stacked,
)

Pair = tuple[Tensor, Tensor]


@triton.jit
def product(
    source,
    table,
    coefficients,
    out,
    modules,
    count,
    depth,
    columns,
    stride_module,
    stride_rank,
    stride_depth,
    coefficient_module,
    coefficient_rank,
    coefficient_column,
    out_module,
    out_depth,
    out_column,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile [DEPTH, COLUMNS] of out; the grid is [modules * depth tiles, column tiles]."""
    module = (tl.program_id(0) % modules).to(tl.int64)
    place = (tl.program_id(0) // modules * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    coefficients += module * coefficient_module + column * coefficient_column
    kind: tl.constexpr = coefficients.dtype.element_ty

    total = tl.zeros((DEPTH, COLUMNS), kind)
    for start in range(0, count, RANKS):
        ranks = start + tl.arange(0, RANKS)
        first = rank_starts(
            source, table, ranks, count, module, stride_module, stride_rank, LISTED, UNIT, ALIGNED
        )
        step = rank_steps(
            source, table, ranks, count, module, modules, stride_depth, LISTED, UNIT, ALIGNED
        )
        x = tl.load(first + place * step, (place < depth) & (ranks < count)[None, :], 0.0)
        c = tl.load(
            coefficients + ranks.to(tl.int64)[:, None] * coefficient_rank,
            (ranks < count)[:, None] & (column < columns),
            0.0,
        )
        x = x.to(kind)
        if source.dtype.element_ty.primitive_bitwidth == 16 and kind == tl.float64:
            # As in gram_tiles: hides the loaded width from the layout of float64 operands.
            x = tl.sum(x[:, :, None], axis=2)
        total = tl.dot(x, c, total, input_precision=PRECISION, out_dtype=kind)

    tl.store(
        out + module * out_module + place * out_depth + column * out_column,
        total.to(out.dtype.element_ty),
        (place < depth) & (column < columns),
    )


def combine(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Pair:
    """``fedlora::combine``."""
    return _both(stacked(b, rows=False), stacked(a, rows=True), x, y, b.dtype)


def combine_list(b: Sequence[Tensor], a: Sequence[Tensor], x: Tensor, y: Tensor) -> Pair:
    """``fedlora::combine_list``: the factors are read where they lie."""
    modules = x.shape[0]
    return _both(listed(b, modules, rows=False), listed(a, modules, rows=True), x, y, b[0].dtype)


def _both(b: Factors, a: Factors, x: Tensor, y: Tensor, dtype: torch.dtype) -> Pair:
    modules, columns = x.shape[0], x.shape[2]
    stored = device.result_dtype(dtype)
    b_g = torch.empty((modules, b.depth, columns), dtype=stored, device=x.device)
    a_g = torch.empty((modules, columns, a.depth), dtype=stored, device=x.device)
    _launch(b, x, b_g)
    _launch(a, y.mT, a_g.mT)
    return b_g.to(dtype), a_g.to(dtype)


def _launch(factors: Factors, coefficients: Tensor, out: Tensor) -> None:
    tile = tiles.chosen("combine", out.device)
    columns = tiles.fitting(out.shape[2], tile["columns"])
    narrow = factors.source.dtype in (torch.bfloat16, torch.float16)
    split = narrow and coefficients.dtype == torch.float32 and device.splits_float32(out.device)
    grid = (
        factors.modules * triton.cdiv(factors.depth, tile["depth"]),
        triton.cdiv(out.shape[2], columns),
    )
    traceable(product)[grid](
        factors.source,
        factors.table,
        coefficients,
        out,
        factors.modules,
        factors.ranks,
        factors.depth,
        out.shape[2],
        *factors.strides,
        *coefficients.stride(),
        *out.stride(),
        LISTED=factors.listed,
        UNIT=factors.unit,
        ALIGNED=factors.aligned,
        PRECISION="tf32x3" if split else "ieee",
        DEPTH=tile["depth"],
        RANKS=tile["ranks"],
        COLUMNS=columns,
        num_warps=tile["warps"],
        num_stages=stages(factors.listed, tile),
    )


def stages(listed: bool, tile: tiles.Tile) -> int:
    """A list's addresses are loaded in the loop, and a pipeline loses what is known of their
    alignment: the loads become narrow, and on sm_90 narrower than cp.async takes, which does not
    compile (Triton 3.7.1).
    """
    return 1 if listed else tile["stages"]


OPERATORS: dict[str, Callable[..., Any]] = {"combine": combine, "combine_list": combine_list}
KERNELS: list[Any] = [product]
