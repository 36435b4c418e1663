"""The operators on JAX arrays, under ``jit`` and ``vmap``, in a process without torch.

    from fedlora_kernels.interop import jax as flk_jax

    b_g, a_g, sigma, ranks = flk_jax.stacked_svd(b, a, scale, energy=0.9)

Functions, arguments, results and errors are those of :mod:`fedlora_kernels.numpy`, and on a CPU so
are the bits. Arguments that are not arrays must be Python values, which are part of a compiled
function; so is the number of threads, that of ``fedlora_kernels.numpy`` while it is traced.

A wrong argument raises ValueError or TypeError while a function is traced. Factors that are not
finite raise ``jax.errors.JaxRuntimeError`` while it runs.

Without ``jax_enable_x64`` JAX has no 64-bit arrays. :func:`stacked_svd` and :func:`flora_na` then
take and give float32 and int32, and compute in float64 all the same; :func:`combine` and
:func:`weighted_sum` work as always; the functions on Gram matrices and singular values raise.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_kernels import numpy as on_numpy
from fedlora_kernels.backends import libraries

__all__ = [
    "client_products",
    "combine",
    "flora_na",
    "gram",
    "select_rank",
    "spectrum",
    "stacked_svd",
    "surrogate",
    "weighted_sum",
]

Array = jax.Array


def gram(x: Array, rows: bool, precision: str = "exact") -> Array:
    """Gram matrices of L stacked factors, [L,R,R] float64: see ``ops.gram``."""
    return cast(Array, _double("gram", locals()))


def spectrum(
    gram_b: Array,
    gram_a: Array,
    scale: Array,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """sigma, total_energy, left, right, info of ``B diag(scale) A``: see ``ops.spectrum``."""
    return cast(tuple[Array, Array, Array, Array, Array], _double("spectrum", locals()))


def select_rank(
    sigma: Array, total_energy: Array, energy: float, max_rank: int | None = None
) -> Array:
    """Rank per module at a share of its energy, [L] int64: see ``ops.select_rank``."""
    return cast(Array, _double("select_rank", locals()))


def surrogate(
    gram_b: Array,
    gram_a: Array,
    weights: Array,
    scale: Array,
    max_sweeps: int = 50,
    tol: float = 1e-12,
) -> tuple[Array, Array, Array]:
    """FLoRA-NA's mixing weights p, q and the objective: see ``ops.surrogate``."""
    return cast(tuple[Array, Array, Array], _double("surrogate", locals()))


def client_products(gram_b: Array, gram_a: Array, scale: Array, ranks: Sequence[int]) -> Array:
    """Inner products of the clients' updates, [L,K,K] float64: see ``ops.client_products``."""
    return cast(Array, _double("client_products", locals()))


def combine(b: Array, a: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Global factors ``B X`` and ``Y A`` in the adapters' dtype: see ``ops.combine``."""
    return cast(tuple[Array, Array], _call("combine", locals()))


def weighted_sum(stacked: Array, weights: Array) -> Array:
    """Weighted sums over the clients, [L,K,...] to [L,...]: see ``ops.weighted_sum``."""
    return cast(Array, _call("weighted_sum", locals()))


def stacked_svd(
    b: Array,
    a: Array,
    scale: Array,
    energy: float,
    max_rank: int | None = None,
    precision: str = "exact",
) -> tuple[Array, Array, Array, Array]:
    """B_g, A_g, sigma and ranks, FLoRIST in one call: see ``ops.stacked_svd``."""
    return cast(tuple[Array, Array, Array, Array], _call("stacked_svd", locals()))


def flora_na(
    b: Array, a: Array, weights: Array, scale: Array, precision: str = "exact"
) -> tuple[Array, Array, Array, Array, Array]:
    """B_hat, A_hat, p, q and the objective, FLoRA-NA in one call: see ``ops.flora_na``."""
    return cast(tuple[Array, Array, Array, Array, Array], _call("flora_na", locals()))


def _double(name: str, arguments: Mapping[str, Any]) -> Any:
    """:func:`_call` of an operator whose results have no use in float32."""
    if not _has_float64():
        raise TypeError(
            f"{name} computes in float64, which this JAX has switched off; "
            'call jax.config.update("jax_enable_x64", True) first'
        )
    return _call(name, arguments)


def _has_float64() -> bool:
    return bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)


def _call(name: str, arguments: Mapping[str, Any]) -> Any:
    for key, value in arguments.items():
        if key not in _ARRAYS and isinstance(value, jax.core.Tracer):
            raise TypeError(f"{key} must be a Python value, found a traced one; make it static")
    arrays = {key: jnp.asarray(value) for key, value in arguments.items() if key in _ARRAYS}
    results = _results(name, {**arguments, **arrays})
    attributes: dict[str, Any] = {
        f"argument_{position}": _attribute(value)
        for position, (key, value) in enumerate(arguments.items())
        if key not in arrays and value is not None
    }
    narrow = {} if _has_float64() else _NARROW
    with jax.enable_x64(True):
        found = jax.ffi.ffi_call(f"fedlora_{name}", results, vmap_method="broadcast_all")(
            *arrays.values(),
            dims=np.int64(next(iter(arrays.values())).ndim),
            threads=np.int64(on_numpy._threads),
            **attributes,
        )
        found = [array.astype(narrow.get(array.dtype, array.dtype)) for array in found]
    return found[0] if len(found) == 1 else tuple(found)


_ARRAYS = {"a", "b", "gram_a", "gram_b", "scale", "sigma", "stacked", "total_energy", "weights"}
_ARRAYS |= {"x", "y"}
_NARROW = {np.dtype("float64"): np.dtype("float32"), np.dtype("int64"): np.dtype("int32")}


def _attribute(value: Any) -> Any:
    """A Python value as one that XLA knows the width of."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Sequence):
        return np.array(value, dtype=np.int64)
    return np.int64(value) if isinstance(value, (int, np.integer)) else np.float64(value)


def _results(name: str, arguments: Mapping[str, Any]) -> list[jax.ShapeDtypeStruct]:
    """The types of an operator's results, and the errors of its arguments.

    They are those of the NumPy function for no module, which takes no memory and no time. Only
    for its error it is called with the shapes as they are: it raises before it reads anything.
    """
    arrays = {key: value for key, value in arguments.items() if key in _ARRAYS}
    stacks = [key for key, array in arrays.items() if key != "weights" or array.ndim > 1]
    modules = {arrays[key].shape[:1] for key in stacks}
    operator = getattr(on_numpy, name)
    if len(modules) == 1 and modules != {()}:
        empty = {
            key: np.empty((0, *array.shape[1:]) if key in stacks else array.shape, array.dtype)
            for key, array in arrays.items()
        }
        try:
            found = operator(**{**arguments, **empty})
        except (TypeError, ValueError):
            pass
        else:
            (count,) = modules.pop()
            found = found if isinstance(found, tuple) else (found,)
            return [jax.ShapeDtypeStruct((count, *one.shape[1:]), one.dtype) for one in found]
    whole = {key: np.empty(array.shape, array.dtype) for key, array in arrays.items()}
    operator(**{**arguments, **whole})
    raise AssertionError(f"{name} takes arguments for some modules but not for none")


def _register() -> None:
    on_cpu = libraries.library("fedlora_jax")
    if on_cpu is None:
        raise ImportError(
            "libfedlora_jax.so was not built with this installation: "
            "install jaxlib, then build fedlora_kernels again"
        )
    found = {"cpu": ctypes.CDLL(str(on_cpu))}
    on_cuda = libraries.library("fedlora_jax_cuda")
    if on_cuda is not None:
        found["CUDA"] = ctypes.CDLL(str(on_cuda))
    for platform, handlers in found.items():
        for name in __all__:
            capsule = jax.ffi.pycapsule(getattr(handlers, f"fedlora_{name}"))
            jax.ffi.register_ffi_target(f"fedlora_{name}", capsule, platform=platform)


_register()
