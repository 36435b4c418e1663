"""combine: the global factors from the clients' factors and a rule's coefficients.

    B_g = B X    [L,m,R] x [L,R,p]        A_g = Y A    [L,p,R] x [L,R,n]

Products are formed in the coefficients' dtype (float64 from the exact stages) and rounded once to
the adapters' dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.backends.lists import stack
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator

# How many elements are widened at once.
_WIDENED = 1 << 22

Pair = tuple[Tensor, Tensor]


def combine(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Pair:
    """Global factors of L modules.

    Args:
        b: [L,m,R], the clients' B side by side; bf16, fp16, fp32 or fp64.
        a: [L,R,n], the clients' A on top of each other; b's dtype.
        x: [L,R,p] float64 or float32.
        y: [L,p,R], x's dtype.

    Returns:
        B_g [L,m,p] and A_g [L,p,n] in the adapters' dtype.

    Raises:
        ValueError: shapes disagree.
        TypeError: dtypes are not those named above.
    """
    return COMBINE(b, a, x, y)


def combine_list(b: Sequence[Tensor], a: Sequence[Tensor], x: Tensor, y: Tensor) -> Pair:
    """:func:`combine` on clients' factors where they lie: ``b[l*K + k]`` [m,r_k] beside
    ``a[l*K + k]`` [r_k,n], L = ``x.shape[0]``. Results and errors are :func:`combine`'s.
    """
    return COMBINE_LIST(b, a, x, y)


def _check(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> None:
    checks.pair(b, a)
    _check_coefficients(x, y, b.shape[0], b.shape[2])


def _check_list(b: Sequence[Tensor], a: Sequence[Tensor], x: Tensor, y: Tensor) -> None:
    checks.dimensions("x", x, 3)
    rank = checks.list_pair(b, a, int(x.shape[0]))
    _check_coefficients(x, y, x.shape[0], rank)


def _check_coefficients(x: Tensor, y: Tensor, modules: int, rank: int) -> None:
    checks.dimensions("x", x, 3)
    checks.real("x", x)
    if y.dtype != x.dtype:
        raise TypeError(f"x and y must have one dtype, found {x.dtype} and {y.dtype}")
    checks.sizes("x", x, (modules, rank, x.shape[2]))
    checks.sizes("y", y, (modules, x.shape[2], rank))


def _composed(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Pair:
    step = max(1, _WIDENED // max(1, b.shape[0] * b.shape[2]))
    b_g = [(part.to(x.dtype) @ x).to(b.dtype) for part in b.split(step, dim=1)]
    a_g = [(y @ part.to(y.dtype)).to(a.dtype) for part in a.split(step, dim=2)]
    return torch.cat(b_g, dim=1), torch.cat(a_g, dim=2)


def _composed_list(b: Sequence[Tensor], a: Sequence[Tensor], x: Tensor, y: Tensor) -> Pair:
    modules = x.shape[0]
    result: Pair = torch.ops.fedlora.combine(
        stack(b, modules, rows=False), stack(a, modules, rows=True), x, y
    )
    return result


def _fake(b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Pair:
    modules, rows, _ = b.shape
    return b.new_empty((modules, rows, x.shape[2])), a.new_empty((modules, x.shape[2], a.shape[2]))


COMBINE: Operator[Pair] = Operator(
    "combine(Tensor b, Tensor a, Tensor x, Tensor y) -> (Tensor b_g, Tensor a_g)",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.combine,
)
COMBINE_LIST: Operator[Pair] = Operator(
    "combine_list(Tensor[] b, Tensor[] a, Tensor x, Tensor y) -> (Tensor b_g, Tensor a_g)",
    check=_check_list,
    composed=_composed_list,
)
