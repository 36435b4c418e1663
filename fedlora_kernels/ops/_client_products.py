"""client_products: how the clients' own updates lie to each other, from two Gram matrices.

    <s_j B_j A_j, s_k B_k A_k> = s_j s_k sum((B_j^T B_k) * (A_j A_k^T))

Both factors of the sum are blocks of G_B and G_A: compiled kernels read the lower triangles once.
Distances between clients and the weights of :mod:`fedlora_kernels.robust` follow from them.
"""

from collections.abc import Sequence

from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator

# Entries of a matrix that are multiplied at once, 2 MiB.
_TOGETHER = 1 << 18


def client_products(gram_b: Tensor, gram_a: Tensor, scale: Tensor, ranks: Sequence[int]) -> Tensor:
    """The inner products of the clients' updates, per module.

    Args:
        gram_b: [L,R,R] float64.
        gram_a: [L,R,R] float64.
        scale: s_k, [L,K], float32 or float64.
        ranks: r_k, K numbers from 0 on with the sum R.

    Returns:
        [L,K,K] float64, exactly symmetric.

    Raises:
        ValueError: shapes disagree, a rank is negative, or the ranks do not sum to R.
        TypeError: dtypes are not those named above.
    """
    return CLIENT_PRODUCTS(gram_b, gram_a, scale, list(ranks))


def _check(gram_b: Tensor, gram_a: Tensor, scale: Tensor, ranks: Sequence[int]) -> None:
    checks.grams(gram_b, gram_a)
    checks.real("scale", scale)
    checks.sizes("scale", scale, (gram_b.shape[0], len(ranks)))
    checks.ranks(ranks, gram_b.shape[1])


def _composed(gram_b: Tensor, gram_a: Tensor, scale: Tensor, ranks: Sequence[int]) -> Tensor:
    modules, stacked_rank = gram_b.shape[:2]
    owner = [client for client, rank in enumerate(ranks) for _ in range(rank)]
    belongs = gram_b.new_zeros(stacked_rank, len(ranks))
    belongs[range(stacked_rank), owner] = 1
    found = gram_b.new_zeros(modules, len(ranks), len(ranks))
    height = max(1, min(stacked_rank, _TOGETHER // max(1, stacked_rank)))
    step = max(1, _TOGETHER // max(1, height * stacked_rank))
    for first in range(0, modules, step):
        some = slice(first, first + step)
        for start in range(0, stacked_rank, height):
            rows = slice(start, start + height)
            entries = gram_b[some, rows] * gram_a[some, rows]
            found[some] += belongs[rows].mT @ (entries @ belongs)
    scale = scale.double()
    found = scale[:, :, None] * found * scale[:, None, :]
    return found.tril() + found.tril(-1).mT


def _fake(gram_b: Tensor, gram_a: Tensor, scale: Tensor, ranks: Sequence[int]) -> Tensor:
    return gram_b.new_empty((gram_b.shape[0], len(ranks), len(ranks)))


CLIENT_PRODUCTS: Operator[Tensor] = Operator(
    "client_products(Tensor gram_b, Tensor gram_a, Tensor scale, int[] ranks) -> Tensor",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.client_products,
)
