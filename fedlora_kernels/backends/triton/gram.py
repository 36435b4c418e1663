"""gram: Gram matrices of stacked factors, G = x x^T or x^T x, [L,R,R] float64.

Layout      A program owns one tile of one module's lower triangle and one share of the depth. It
            reads two tiles [depth, ranks], multiplies them over the depth and writes the sum; a
            second kernel adds the shares in ascending order and mirrors the triangle. Nothing is
            added atomically, so the same input gives the same bits.
Precision   exact: tiles are widened to float64 in registers, products and sums are float64 (mma
            m8n8k4 on sm_80, m16n8k16 on sm_90, v_mfma_f64_16x16x4 on gfx942, else fma).
            fast: products in the data's own type, sums in float32 that go to a float64 total every
            512 terms. On NVIDIA a float32 product is three TF32 ones, head head + head rest + rest
            head: 10 units in the last place of each product are lost at worst.
Memory      two tiles a pipeline stage: 2 x 64 x 16 x 4 bytes x 3 = 24 KB for float32 in exact.
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

# Terms summed in float32 before they go to the float64 total, as the operator promises. Shares of
# the depth are multiples of it, so that none is too short to be worth a program.
_CHUNK = 512
# Elements of the result that one program of the second kernel writes: 8 for each of 128 threads.
_ELEMENTS = 1024


@triton.jit
def gram_tiles(
    source,
    table,
    shares,
    modules,
    count,
    depth,
    pairs,
    length,
    stride_module,
    stride_rank,
    stride_depth,
    LISTED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    FAST: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """shares[split, module, i, j] = sum over the split's depth of x_i x_j, for i >= j.

    The grid is [splits * modules * pairs], pairs of one depth range side by side: they share reads.
    """
    program = tl.program_id(0)
    pair = program % pairs
    # Pairs count (0,0) (1,0) (1,1) (2,0) ...: row i starts at i (i + 1) / 2. The root is rounded
    # correctly and therefore exact where it is an integer.
    row = ((tl.sqrt_rn(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = pair - row * (row + 1) // 2
    module = ((program // pairs) % modules).to(tl.int64)
    split = (program // pairs // modules).to(tl.int64)

    i = row * RANKS + tl.arange(0, RANKS)
    j = column * RANKS + tl.arange(0, RANKS)
    left = rank_starts(
        source, table, i, count, module, stride_module, stride_rank, LISTED, UNIT, ALIGNED
    )
    right = rank_starts(
        source, table, j, count, module, stride_module, stride_rank, LISTED, UNIT, ALIGNED
    )
    left_step = rank_steps(
        source, table, i, count, module, modules, stride_depth, LISTED, UNIT, ALIGNED
    )
    right_step = rank_steps(
        source, table, j, count, module, modules, stride_depth, LISTED, UNIT, ALIGNED
    )
    offsets = tl.arange(0, DEPTH).to(tl.int64)[:, None]
    begin = split * length
    end = tl.minimum(begin + length, depth)

    total = tl.zeros((RANKS, RANKS), tl.float64)
    if FAST:
        for chunk in range(begin, end, CHUNK):
            part = tl.zeros((RANKS, RANKS), tl.float32)
            left_rest = tl.zeros((RANKS, RANKS), tl.float32)
            right_rest = tl.zeros((RANKS, RANKS), tl.float32)
            for start in range(chunk, tl.minimum(chunk + CHUNK, end), DEPTH):
                place = start + offsets
                u = tl.load(left + place * left_step, (place < depth) & (i < count)[None, :], 0.0)
                v = tl.load(right + place * right_step, (place < depth) & (j < count)[None, :], 0.0)
                if SPLIT:
                    u_head = head(u)
                    v_head = head(v)
                    u_rest = tl.trans(u - u_head)
                    u_head = tl.trans(u_head)
                    part = tl.dot(u_head, v_head, part, input_precision="tf32")
                    left_rest = tl.dot(u_rest, v_head, left_rest, input_precision="tf32")
                    right_rest = tl.dot(u_head, v - v_head, right_rest, input_precision="tf32")
                else:
                    part = tl.dot(tl.trans(u), v, part, input_precision="ieee")
            if SPLIT:
                # Two sums of their own, so that exchanging i and j exchanges them and nothing else:
                # what clients share must cancel to the last bit, which one chain would not grant.
                part += left_rest + right_rest
            total += part.to(tl.float64)
    else:
        for start in range(begin, end, DEPTH):
            place = start + offsets
            u = tl.load(left + place * left_step, (place < depth) & (i < count)[None, :], 0.0)
            v = tl.load(right + place * right_step, (place < depth) & (j < count)[None, :], 0.0)
            u = u.to(tl.float64)
            v = v.to(tl.float64)
            if source.dtype.element_ty.primitive_bitwidth == 16:
                # Triton lays float64 operands out by the width they were loaded with, for which
                # its float64 mma has no lowering at 16 bits; a sum of one term hides that width.
                u = tl.sum(u[:, :, None], axis=2)
                v = tl.sum(v[:, :, None], axis=2)
            total = tl.dot(tl.trans(u), v, total, input_precision="ieee", out_dtype=tl.float64)

    share = shares + (split * modules + module) * count * count
    place = i.to(tl.int64)[:, None] * count + j[None, :]
    tl.store(share + place, total, (i < count)[:, None] & (i[:, None] >= j[None, :]))


@triton.jit
def head(x):
    """The float32 nearest to x with the 11 significant bits that TF32 has."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def gram_sum(shares, gram, splits, count, size, ELEMENTS: tl.constexpr):
    """gram[module, i, j] = sum over splits of shares[split, module, max(i, j), min(i, j)]."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < size
    column = place % count
    row = place // count % count
    start = place - row * count - column
    source = shares + start + tl.maximum(row, column) * count + tl.minimum(row, column)
    total = tl.zeros((ELEMENTS,), tl.float64)
    for _ in range(splits):
        total += tl.load(source, inside, 0.0)
        source += size
    tl.store(gram + place, total, inside)


def gram(x: Tensor, rows: bool, precision: str = "exact") -> Tensor:
    """``fedlora::gram``."""
    return _launch(stacked(x, rows), precision)


def gram_list(x: Sequence[Tensor], modules: int, rows: bool, precision: str = "exact") -> Tensor:
    """``fedlora::gram_list``: the factors are read where they lie."""
    return _launch(listed(x, modules, rows), precision)


def _launch(x: Factors, precision: str) -> Tensor:
    fast = precision == "fast" and x.source.dtype != torch.float64
    where = x.source.device
    tile = tiles.chosen(tile_name(fast, x.source.dtype), where)
    ranks = tiles.fitting(x.ranks, tile["ranks"])
    count = triton.cdiv(x.ranks, ranks)
    pairs = count * (count + 1) // 2
    size = x.modules * x.ranks * x.ranks
    # As many shares of the depth as give every unit its programs, in whole chunks.
    wanted = triton.cdiv(tile["programs"] * device.units(where), max(1, pairs * x.modules))
    length = triton.cdiv(triton.cdiv(x.depth, wanted), _CHUNK) * _CHUNK
    splits = triton.cdiv(x.depth, max(1, length))
    shares = torch.empty((splits, size), dtype=torch.float64, device=where)
    result = torch.empty((x.modules, x.ranks, x.ranks), dtype=torch.float64, device=where)
    traceable(gram_tiles)[(splits * x.modules * pairs,)](
        x.source,
        x.table,
        shares,
        x.modules,
        x.ranks,
        x.depth,
        pairs,
        length,
        *x.strides,
        LISTED=x.listed,
        UNIT=x.unit,
        ALIGNED=x.aligned,
        FAST=fast,
        SPLIT=fast and x.source.dtype == torch.float32 and device.splits_float32(where),
        CHUNK=_CHUNK,
        RANKS=ranks,
        DEPTH=tile["depth"],
        num_warps=tile["warps"],
        num_stages=tile["stages"],
    )
    traceable(gram_sum)[(triton.cdiv(size, _ELEMENTS),)](
        shares, result, splits, x.ranks, size, ELEMENTS=_ELEMENTS
    )
    return result


def tile_name(fast: bool, dtype: torch.dtype) -> str:
    """The kernel's name in tile files: three sums of float32 products take three times the room."""
    if not fast:
        return "gram_exact"
    return "gram_fast_float32" if dtype == torch.float32 else "gram_fast"


OPERATORS: dict[str, Callable[..., Any]] = {"gram": gram, "gram_list": gram_list}
KERNELS: list[Any] = [gram_tiles, gram_sum]
