"""Every operator's arguments, drawn from one batch: for the doors from other frameworks."""

from collections.abc import Iterator
from typing import Any

from matrices import Batch

import fedlora_kernels as flk

Call = tuple[str, tuple[Any, ...]]


def calls(batch: Batch) -> Iterator[Call]:
    """Every function on one batch, in both precisions; equal ranks add the averaging ones."""
    b, a, scale, weights, scalings = batch.b, batch.a, batch.scale, batch.weights, batch.scalings
    bs, as_ = batch.client_factors()
    gram_b, gram_a = flk.ops.gram(b, False), flk.ops.gram(a, True)
    sigma, total_energy, left, right, _ = flk.ops.spectrum(gram_b, gram_a, scale)
    columns = min(3, batch.attainable_rank)
    x, y = left[:, :, :columns], right[:, :columns]
    for precision in ("exact", "fast"):
        yield "gram", (b, False, precision)
        yield "gram", (a, True, precision)
        yield "gram_list", (bs, batch.modules, False, precision)
        yield "gram_list", (as_, batch.modules, True, precision)
        yield "stacked_svd", (b, a, scale, 0.9, None, precision)
        yield "stacked_svd_list", (bs, as_, scale, 0.99, 2, precision)
    yield "stacked_svd", (b, a, scale.float(), 1.0)
    yield "spectrum", (gram_b, gram_a, scale)
    yield "spectrum", (gram_b, gram_a, scale.float(), 0.9, 2)
    yield "select_rank", (sigma, total_energy, 0.9)
    yield "select_rank", (sigma, total_energy, 1.0, 2)
    yield "client_products", (gram_b, gram_a, scalings, batch.ranks)
    yield "client_products", (gram_b, gram_a, scalings.float(), batch.ranks)
    yield "combine", (b, a, x, y)
    yield "combine", (b, a, x.float(), y.float())
    yield "combine_list", (bs, as_, x, y)
    if len(set(batch.ranks)) > 1:
        return
    yield "weighted_sum", (a.unflatten(1, (batch.clients, -1)), weights)
    yield "weighted_sum", (b.unflatten(2, (batch.clients, -1)).movedim(2, 1), scalings)
    yield "weighted_sum_list", (as_, scalings)
    yield "surrogate", (gram_b, gram_a, weights, scalings)
    yield "surrogate", (gram_b, gram_a, weights.float(), scalings.float(), 3, 0.0)
    for precision in ("exact", "fast"):
        yield "flora_na", (b, a, weights, scalings, precision)
        yield "flora_na_list", (bs, as_, weights, scalings, precision)
