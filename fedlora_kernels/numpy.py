"""The operators on numpy arrays, in a process without torch: ``import fedlora_kernels.numpy``.

Functions, arguments, results and errors are those of :mod:`fedlora_kernels.ops`, and the results
have the same bits as the torch operators' on a CPU with as many threads or any other number.
bfloat16 arrays are ``ml_dtypes.bfloat16``. Arrays may have any strides; those whose last dimension
is not contiguous are copied first. The interpreter's lock is released while an operator computes.
"""

import os
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from fedlora_kernels.backends import libraries

libraries.load_openblas()

from fedlora_kernels import _numpy  # noqa: E402 - needs OpenBLAS in the process

__all__ = [
    "client_products",
    "combine",
    "combine_list",
    "flora_na",
    "flora_na_list",
    "gram",
    "gram_list",
    "select_rank",
    "set_num_threads",
    "spectrum",
    "stacked_svd",
    "stacked_svd_list",
    "surrogate",
    "weighted_sum",
    "weighted_sum_list",
]

Array = NDArray[Any]
# OpenMP's variable may list a number for each level of nesting; the first is the outermost.
_asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
_threads = int(_asked) if _asked.isdecimal() and int(_asked) else len(os.sched_getaffinity(0))


def set_num_threads(count: int) -> None:
    """How many threads an operator may use; at first OMP_NUM_THREADS or the processors there are.

    Raises:
        ValueError: count is under 1.
    """
    global _threads
    if count < 1:
        raise ValueError(f"there must be at least 1 thread, found {count}")
    _threads = count


def gram(x: Array, rows: bool, precision: str = "exact") -> Array:
    """Gram matrices of L stacked factors, [L,R,R] float64: see ``ops.gram``."""
    result: Array = _numpy.gram(x, rows, precision, _threads)
    return result


def gram_list(x: Sequence[Array], modules: int, rows: bool, precision: str = "exact") -> Array:
    """:func:`gram` of clients' factors where they lie, module-major: see ``ops.gram_list``."""
    result: Array = _numpy.gram_list(x, modules, rows, precision, _threads)
    return result


def spectrum(
    gram_b: Array,
    gram_a: Array,
    scale: Array,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """sigma, total_energy, left, right, info of ``B diag(scale) A``: see ``ops.spectrum``."""
    result: tuple[Array, Array, Array, Array, Array] = _numpy.spectrum(
        gram_b, gram_a, scale, energy, max_rank, _threads
    )
    return result


def select_rank(
    sigma: Array, total_energy: Array, energy: float, max_rank: int | None = None
) -> Array:
    """Rank per module at a share of its energy, [L] int64: see ``ops.select_rank``."""
    result: Array = _numpy.select_rank(sigma, total_energy, energy, max_rank, _threads)
    return result


def surrogate(
    gram_b: Array,
    gram_a: Array,
    weights: Array,
    scale: Array,
    max_sweeps: int = 50,
    tol: float = 1e-12,
) -> tuple[Array, Array, Array]:
    """FLoRA-NA's mixing weights p, q and the objective: see ``ops.surrogate``."""
    result: tuple[Array, Array, Array] = _numpy.surrogate(
        gram_b, gram_a, weights, scale, max_sweeps, tol, _threads
    )
    return result


def client_products(gram_b: Array, gram_a: Array, scale: Array, ranks: Sequence[int]) -> Array:
    """Inner products of the clients' updates, [L,K,K] float64: see ``ops.client_products``."""
    result: Array = _numpy.client_products(gram_b, gram_a, scale, ranks, _threads)
    return result


def combine(b: Array, a: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Global factors ``B X`` and ``Y A`` in the adapters' dtype: see ``ops.combine``."""
    result: tuple[Array, Array] = _numpy.combine(b, a, x, y, _threads)
    return result


def combine_list(b: Sequence[Array], a: Sequence[Array], x: Array, y: Array) -> tuple[Array, Array]:
    """:func:`combine` of clients' factors where they lie: see ``ops.combine_list``."""
    result: tuple[Array, Array] = _numpy.combine_list(b, a, x, y, _threads)
    return result


def weighted_sum(stacked: Array, weights: Array) -> Array:
    """Weighted sums over the clients, [L,K,...] to [L,...]: see ``ops.weighted_sum``."""
    result: Array = _numpy.weighted_sum(stacked, weights, _threads)
    return result


def weighted_sum_list(factors: Sequence[Array], weights: Array) -> Array:
    """:func:`weighted_sum` of factors where they lie: see ``ops.weighted_sum_list``."""
    result: Array = _numpy.weighted_sum_list(factors, weights, _threads)
    return result


def stacked_svd(
    b: Array,
    a: Array,
    scale: Array,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> tuple[Array, Array, Array, Array]:
    """B_g, A_g, sigma and ranks, FLoRIST in one call: see ``ops.stacked_svd``."""
    result: tuple[Array, Array, Array, Array] = _numpy.stacked_svd(
        b, a, scale, energy, max_rank, precision, _threads
    )
    return result


def stacked_svd_list(
    b: Sequence[Array],
    a: Sequence[Array],
    scale: Array,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> tuple[Array, Array, Array, Array]:
    """:func:`stacked_svd` of clients' factors where they lie: see ``ops.stacked_svd_list``."""
    result: tuple[Array, Array, Array, Array] = _numpy.stacked_svd_list(
        b, a, scale, energy, max_rank, precision, _threads
    )
    return result


def flora_na(
    b: Array, a: Array, weights: Array, scale: Array, precision: str = "exact"
) -> tuple[Array, Array, Array, Array, Array]:
    """B_hat, A_hat, p, q and the objective, FLoRA-NA in one call: see ``ops.flora_na``."""
    result: tuple[Array, Array, Array, Array, Array] = _numpy.flora_na(
        b, a, weights, scale, precision, _threads
    )
    return result


def flora_na_list(
    b: Sequence[Array],
    a: Sequence[Array],
    weights: Array,
    scale: Array,
    precision: str = "exact",
) -> tuple[Array, Array, Array, Array, Array]:
    """:func:`flora_na` of clients' factors where they lie: see ``ops.flora_na_list``."""
    result: tuple[Array, Array, Array, Array, Array] = _numpy.flora_na_list(
        b, a, weights, scale, precision, _threads
    )
    return result
