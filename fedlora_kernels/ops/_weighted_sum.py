"""weighted_sum: averages of factors, one pass over them.

    out[l] = sum_k w_k stacked[l, k]        or with w_lk where modules have their own weights

Sums are accumulated in float64 and rounded once to the factors' dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator

# How many elements are widened at once.
_WIDENED = 1 << 22


def weighted_sum(stacked: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over the clients.

    Args:
        stacked: [L,K,...], bf16, fp16, fp32 or fp64.
        weights: [K], or [L,K] for weights that differ between modules; float32 or float64.

    Returns:
        [L,...] in stacked's dtype.

    Raises:
        ValueError: shapes disagree.
        TypeError: dtypes are not those named above.
    """
    return WEIGHTED_SUM(stacked, weights)


def weighted_sum_list(factors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """:func:`weighted_sum` of factors where they lie: ``factors[l*K + k]``, all of one shape,
    weights [L,K]. Results and errors are :func:`weighted_sum`'s.
    """
    return WEIGHTED_SUM_LIST(factors, weights)


def _check(stacked: Tensor, weights: Tensor) -> None:
    if stacked.dim() < 2:
        raise ValueError(f"stacked must be [L,K,...], found shape {checks.shape(stacked)}")
    if stacked.dtype not in checks.FACTOR_DTYPES:
        raise TypeError(f"stacked must be a floating type, found {stacked.dtype}")
    checks.real("weights", weights)
    expected = stacked.shape[:2] if weights.dim() == 2 else stacked.shape[1:2]
    checks.sizes("weights", weights, expected)


def _check_list(factors: Sequence[Tensor], weights: Tensor) -> None:
    checks.dimensions("weights", weights, 2)
    checks.real("weights", weights)
    if len(factors) == 0 or len(factors) != weights.shape[0] * weights.shape[1]:
        raise ValueError(
            f"factors must hold one tensor for each of the weights {checks.shape(weights)}, "
            f"found {len(factors)}"
        )
    checks.equal_sizes("factors", factors)
    dtype = factors[0].dtype
    for index, factor in enumerate(factors):
        if factor.dtype != dtype or dtype not in checks.FACTOR_DTYPES:
            raise TypeError(
                f"factors[{index}] must be {dtype} (a floating type), found {factor.dtype}"
            )


def _composed(stacked: Tensor, weights: Tensor) -> Tensor:
    modules, clients = stacked.shape[:2]
    flat = stacked.flatten(2) if stacked.dim() > 2 else stacked[:, :, None]
    rows = weights.double().expand(modules, clients)[:, None, :]
    step = max(1, _WIDENED // max(1, modules * clients))
    parts = [(rows @ part.double()).to(stacked.dtype) for part in flat.split(step, dim=2)]
    return torch.cat(parts, dim=2).reshape((modules, *stacked.shape[2:]))


def _composed_list(factors: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(factors)).unflatten(0, (weights.shape[0], weights.shape[1]))
    result: Tensor = torch.ops.fedlora.weighted_sum(stacked, weights)
    return result


def _fake(stacked: Tensor, weights: Tensor) -> Tensor:
    return stacked.new_empty((stacked.shape[0], *stacked.shape[2:]))


WEIGHTED_SUM: Operator[Tensor] = Operator(
    "weighted_sum(Tensor stacked, Tensor weights) -> Tensor",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.weighted_sum,
)
WEIGHTED_SUM_LIST: Operator[Tensor] = Operator(
    "weighted_sum_list(Tensor[] factors, Tensor weights) -> Tensor",
    check=_check_list,
    composed=_composed_list,
)
