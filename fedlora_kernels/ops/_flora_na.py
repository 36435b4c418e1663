"""flora_na: FLoRA-NA in one call (arXiv 2509.26399): gram, surrogate, weighted_sum.

    B_hat = sum_u q_u s_u B_u        A_hat = sum_v p_v A_v

with p and q so that B_hat A_hat comes closest to sum_k w_k s_k B_k A_k (see surrogate).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.backends.lists import stack
from fedlora_kernels.ops import checks
from fedlora_kernels.ops._surrogate import MAX_SWEEPS
from fedlora_kernels.ops.operator import Operator

FloraNA = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def flora_na(
    b: Tensor, a: Tensor, weights: Tensor, scale: Tensor, precision: str = "exact"
) -> FloraNA:
    """Surrogate averages of L modules; all clients of equal rank r.

    Args:
        b: [L,m,K*r], the clients' B side by side; bf16, fp16, fp32 or fp64.
        a: [L,K*r,n], the clients' A on top of each other; b's dtype.
        weights: [K], the clients' weights; float32 or float64.
        scale: [L,K], the clients' scalings; folded into B_hat.
        precision: of the Gram matrices, "exact" or "fast".

    Returns:
        B_hat [L,m,r] and A_hat [L,r,n] in the adapters' dtype; p, q [L,K] and objective
        [L,max_sweeps+1] as :func:`surrogate` gives them.

    Raises:
        ValueError: shapes disagree, R is no multiple of K, or the precision is unknown.
        TypeError: dtypes are not those named above.
    """
    return FLORA_NA(b, a, weights, scale, precision)


def flora_na_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    weights: Tensor,
    scale: Tensor,
    precision: str = "exact",
) -> FloraNA:
    """:func:`flora_na` of clients' factors where they lie: ``b[l*K + k]`` [m,r] beside
    ``a[l*K + k]`` [r,n], L and K from ``scale``. Results and errors are :func:`flora_na`'s.
    """
    return FLORA_NA_LIST(b, a, weights, scale, precision)


def _check_mixing(modules: int, weights: Tensor, scale: Tensor, precision: str) -> None:
    checks.dimensions("weights", weights, 1)
    checks.real("weights", weights)
    checks.real("scale", scale)
    checks.sizes("scale", scale, (modules, weights.shape[0]))
    checks.precision(precision)


def _check(b: Tensor, a: Tensor, weights: Tensor, scale: Tensor, precision: str = "exact") -> None:
    checks.pair(b, a)
    _check_mixing(b.shape[0], weights, scale, precision)
    if weights.shape[0] == 0 or b.shape[2] % weights.shape[0]:
        raise ValueError(
            f"the stacked rank {int(b.shape[2])} must be a multiple of the number of clients, "
            f"found {int(weights.shape[0])} weights (surrogate averages need equal ranks)"
        )


def _check_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    weights: Tensor,
    scale: Tensor,
    precision: str = "exact",
) -> None:
    checks.dimensions("scale", scale, 2)
    checks.list_pair(b, a, int(scale.shape[0]))
    _check_mixing(scale.shape[0], weights, scale, precision)
    if len(b) != scale.shape[0] * scale.shape[1]:
        raise ValueError(
            f"b and a must hold one tensor for each of the scalings {checks.shape(scale)}, "
            f"found {len(b)}"
        )
    checks.equal_sizes("b", b)


def _composed(
    b: Tensor, a: Tensor, weights: Tensor, scale: Tensor, precision: str = "exact"
) -> FloraNA:
    ops = torch.ops.fedlora
    clients = weights.shape[0]
    p, q, objective = ops.surrogate(
        ops.gram(b, False, precision), ops.gram(a, True, precision), weights, scale
    )
    b_hat = ops.weighted_sum(b.unflatten(2, (clients, -1)).movedim(2, 1), q * scale.double())
    a_hat = ops.weighted_sum(a.unflatten(1, (clients, -1)), p)
    return b_hat, a_hat, p, q, objective


def _composed_list(
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    weights: Tensor,
    scale: Tensor,
    precision: str = "exact",
) -> FloraNA:
    modules = scale.shape[0]
    result: FloraNA = torch.ops.fedlora.flora_na(
        stack(b, modules, rows=False), stack(a, modules, rows=True), weights, scale, precision
    )
    return result


def _fake(
    b: Tensor, a: Tensor, weights: Tensor, scale: Tensor, precision: str = "exact"
) -> FloraNA:
    modules, clients = scale.shape
    rank = b.shape[2] // clients
    return (
        b.new_empty((modules, b.shape[1], rank)),
        b.new_empty((modules, rank, a.shape[2])),
        b.new_empty((modules, clients), dtype=torch.float64),
        b.new_empty((modules, clients), dtype=torch.float64),
        b.new_empty((modules, MAX_SWEEPS + 1), dtype=torch.float64),
    )


_OPTIONS = "Tensor weights, Tensor scale, str precision='exact'"
_RESULTS = "(Tensor b_hat, Tensor a_hat, Tensor p, Tensor q, Tensor objective)"
FLORA_NA: Operator[FloraNA] = Operator(
    f"flora_na(Tensor b, Tensor a, {_OPTIONS}) -> {_RESULTS}",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.flora_na,
)
FLORA_NA_LIST: Operator[FloraNA] = Operator(
    f"flora_na_list(Tensor[] b, Tensor[] a, {_OPTIONS}) -> {_RESULTS}",
    check=_check_list,
    composed=_composed_list,
)
