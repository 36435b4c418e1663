"""gram: the Gram matrices of stacked factors, in float64.

    rows=True    G = x x^T    x [L,R,d]    the A side
    rows=False   G = x^T x    x [L,d,R]    the B side

The only stage that reads the adapters before the result is written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.backends.lists import stack as stack
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator

# How many elements are widened at once: 32 MB in float64, which leaves the cache to the product.
_WIDENED = 1 << 22
# Terms summed in float32 before they are added to the float64 total ("fast" precision).
_FAST_CHUNK = 512


def gram(x: Tensor, rows: bool, precision: str = "exact") -> Tensor:
    """Gram matrices of L stacked factors.

    Args:
        x: [L,R,d] when ``rows``, else [L,d,R]; bf16, fp16, fp32 or fp64.
        rows: True for ``x x^T`` (the A side), False for ``x^T x`` (the B side).
        precision: "exact" accumulates in float64; "fast" in float32, promoted to float64 after at
            most 512 terms (docs/kernels.md has each backend's number and its measured error).

    Returns:
        [L,R,R] float64, exactly symmetric.

    Raises:
        ValueError: x has not three dimensions, or the precision is unknown.
        TypeError: x is not a floating type named above.
    """
    return GRAM(x, rows, precision)


def gram_list(x: Sequence[Tensor], modules: int, rows: bool, precision: str = "exact") -> Tensor:
    """:func:`gram` of clients' factors where they lie.

    Args:
        x: module-major: ``x[l*K + k]`` is module l's factor of client k, [r_k,d] when ``rows``,
            else [d,r_k].
        modules: L.
        rows: as in :func:`gram`.
        precision: as in :func:`gram`.

    Returns:
        [L,R,R] float64 with R = sum of the clients' ranks.

    Raises:
        ValueError: the factors are no L times the same clients' matrices, or the precision is
            unknown.
        TypeError: the factors are not of one floating type.
    """
    return GRAM_LIST(x, modules, rows, precision)


def _check(x: Tensor, rows: bool, precision: str = "exact") -> None:
    checks.factor("x", x)
    checks.precision(precision)


def _check_list(x: Sequence[Tensor], modules: int, rows: bool, precision: str = "exact") -> None:
    checks.factor_list("x", x, modules)
    depth = 1 if rows else 0
    for index, tensor in enumerate(x):
        if tensor.shape[depth] != x[0].shape[depth]:
            raise ValueError(
                f"x[{index}] and x[0] must agree in d, "
                f"found {checks.shape(tensor)} and {checks.shape(x[0])}"
            )
    checks.precision(precision)


def _composed(x: Tensor, rows: bool, precision: str = "exact") -> Tensor:
    depth = 2 if rows else 1
    modules, rank = x.shape[0], x.shape[3 - depth]
    fast = precision == "fast" and x.dtype != torch.float64
    step = _FAST_CHUNK if fast else max(1, _WIDENED // max(1, modules * rank))
    total = torch.zeros((modules, rank, rank), dtype=torch.float64, device=x.device)
    for part in x.split(step, dim=depth):
        wide = part.to(torch.float32 if fast else torch.float64)
        total += wide @ wide.mT if rows else wide.mT @ wide
    return (total + total.mT) / 2


def _composed_list(
    x: Sequence[Tensor], modules: int, rows: bool, precision: str = "exact"
) -> Tensor:
    result: Tensor = torch.ops.fedlora.gram(stack(x, modules, rows), rows, precision)
    return result


def _fake(x: Tensor, rows: bool, precision: str = "exact") -> Tensor:
    rank = x.shape[1 if rows else 2]
    return x.new_empty((x.shape[0], rank, rank), dtype=torch.float64)


GRAM: Operator[Tensor] = Operator(
    "gram(Tensor x, bool rows, str precision='exact') -> Tensor",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.gram,
)
GRAM_LIST: Operator[Tensor] = Operator(
    "gram_list(Tensor[] x, SymInt modules, bool rows, str precision='exact') -> Tensor",
    check=_check_list,
    composed=_composed_list,
)
