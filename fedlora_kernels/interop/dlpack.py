"""The operators and ``aggregate`` on any arrays with ``__dlpack__``: NumPy, CuPy, JAX, torch.

    from fedlora_kernels.interop import dlpack

    b_g, a_g, sigma, ranks = dlpack.stacked_svd(b, a, scale, 0.9)

Functions, arguments, results and errors are those of :mod:`fedlora_kernels.ops`, with arrays in the
place of tensors. Inputs are read where they lie, without a copy. On a GPU the producer is handed
torch's current stream, so that torch's work waits for the producer's; the results are handed back
in the same way. Results are arrays of the first argument's kind; arguments of several kinds may be
mixed, but must be on one device.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fedlora_kernels import ops
from fedlora_kernels._aggregate import aggregate as aggregate_adapters
from fedlora_kernels._aggregation import Aggregation
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.peft_format import Config, label

__all__ = [
    "Aggregated",
    "aggregate",
    "client_products",
    "combine",
    "combine_list",
    "flora_na",
    "flora_na_list",
    "gram",
    "gram_list",
    "select_rank",
    "spectrum",
    "stacked_svd",
    "stacked_svd_list",
    "surrogate",
    "weighted_sum",
    "weighted_sum_list",
]

# DLPack's numbers of the devices that torch reads in place.
_CPU, _CUDA, _CUDA_HOST, _ROCM = 1, 2, 3, 10


class Aggregated(NamedTuple):
    """The result of :func:`aggregate`."""

    state_dict: dict[str, Any]
    """the global adapter's tensors under PEFT's keys, in the clients' kind and on their device"""
    config: Config
    """the global adapter's adapter_config.json"""
    aggregation: Aggregation
    """the same result in torch, with its report, its delivery and what the rule carries on"""


def aggregate(
    state_dicts: Sequence[Mapping[str, Any]], configs: object, **arguments: Any
) -> Aggregated:
    """Combine the clients' adapters, given as arrays under PEFT's keys, into one.

    Args:
        state_dicts: a mapping per client, from PEFT's saved keys to arrays with ``__dlpack__``.
        configs: the PEFT config, or the mapping of adapter_config.json, that all clients share; or
            a sequence with one per client.
        **arguments: those of ``flk.aggregate``: rule, weights, precision and so on. Where a
            ``device`` is given, the work is done there and the result comes back to the clients'.

    Returns:
        The global adapter in the kind and on the device of the first client's first array. No
        result shares memory with an input, unless the inputs are torch tensors.

    Raises:
        AdapterError: as in ``flk.aggregate``; an array cannot be read through DLPack, the clients'
            arrays are on several devices, or the clients' kind cannot hold the result's dtype.
        ValueError: the numbers of adapters and configs differ.
        TypeError: the rule has no such option.
    """
    clients = list(state_dicts)
    each = list(configs) if isinstance(configs, Sequence) else [configs] * len(clients)
    if len(each) != len(clients):
        raise ValueError(f"expected a config per adapter, found {len(each)} for {len(clients)}")
    named = [
        (f"{label(index, None)}, tensor {key}", array)
        for index, client in enumerate(clients)
        for key, array in client.items()
    ]
    try:
        tensors = _tensors(named)
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from None
    read = iter(tensors)
    adapters = []
    for index, (client, config) in enumerate(zip(clients, each, strict=True)):
        own = {key: next(read) for key in client}
        adapter = Adapter.from_state_dict(own, config, name=label(index, None))
        adapter.name = None  # later messages count the clients themselves
        adapters.append(adapter)
    result = aggregate_adapters(adapters, **arguments)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    like, place = named[0][1], tensors[0].device
    made = {}
    for key, tensor in result.adapter.state_dict().items():
        if not isinstance(like, Tensor) and tensor.untyped_storage().data_ptr() in inputs:
            tensor = tensor.clone()
        try:
            made[key] = _like(like, tensor.to(place))
        except TypeError as error:
            raise AdapterError(f"the result's tensor {key}: {error}") from None
    return Aggregated(made, result.adapter.config, result)


def _on_arrays(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's face, taking and giving arrays."""
    signature = inspect.signature(operator)
    hints = get_type_hints(operator)
    lists = {name for name, hint in hints.items() if hint == Sequence[Tensor]}
    arrays = {name for name, hint in hints.items() if hint is Tensor} | lists

    @wraps(operator)
    def face(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        named: list[tuple[str, Any]] = []
        for name, value in bound.arguments.items():
            if name in lists:
                bound.arguments[name] = value = list(value)
                named += [(f"{name}[{index}]", array) for index, array in enumerate(value)]
            elif name in arrays:
                named.append((name, value))
        read = iter(_tensors(named))
        for name, value in bound.arguments.items():
            if name in lists:
                bound.arguments[name] = [next(read) for _ in value]
            elif name in arrays:
                bound.arguments[name] = next(read)
        result = operator(*bound.args, **bound.kwargs)
        if not named:  # empty lists, which the operator refuses
            return result
        like = named[0][1]
        if isinstance(result, Tensor):
            return _like(like, result)
        return tuple(_like(like, tensor) for tensor in result)

    return face


def _tensors(named: Iterable[tuple[str, Any]]) -> list[Tensor]:
    """Arrays as torch tensors on the same memory, all on one device.

    Raises:
        TypeError: one has no ``__dlpack__``, or torch cannot read it.
        ValueError: they are on several devices, or on one that this torch has no support for.
    """
    tensors: list[Tensor] = []
    first = ""
    for name, array in named:
        tensor = _tensor(name, array)
        if not tensors:
            first = name
        elif tensor.device != tensors[0].device:
            raise ValueError(
                f"{name} is on {tensor.device}, and {first} on {tensors[0].device}; "
                "expected all arrays on one device"
            )
        tensors.append(tensor)
    return tensors


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise TypeError(
            f"{name} must be an array with __dlpack__ and __dlpack_device__, "
            f"found {type(array).__name__}"
        )
    try:
        device = int(array.__dlpack_device__()[0])
    except Exception as error:  # each framework raises its own for an array without memory
        raise TypeError(f"{name} has no memory to read: {_line(error)}") from None
    if device not in (_CPU, _CUDA_HOST) and not (
        device in (_CUDA, _ROCM) and torch.cuda.is_available()
    ):
        raise ValueError(
            f"{name} is on a device of DLPack's type {device}, which the installed torch cannot "
            "use; copy it to the CPU first"
        )
    try:
        return from_dlpack(array)
    except Exception as error:  # BufferError, RuntimeError or the framework's own
        raise TypeError(
            f"{name} cannot be read through DLPack: {_line(error)} "
            "(expected a plain numeric dtype and strides that are not negative)"
        ) from None


def _like(array: Any, tensor: Tensor) -> Any:
    """A result as an array of the same kind as ``array``, on the tensor's memory.

    Raises:
        TypeError: that kind has no from_dlpack, or cannot hold the tensor's dtype.
    """
    if isinstance(array, Tensor):
        return tensor
    if hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    else:
        namespace = sys.modules[type(array).__module__.partition(".")[0]]
    if not hasattr(namespace, "from_dlpack"):
        raise TypeError(f"{namespace.__name__} has no from_dlpack, which the results need")
    expected = str(tensor.dtype).removeprefix("torch.")
    try:
        # JAX refuses strides with gaps.
        result = namespace.from_dlpack(tensor.detach().contiguous())
    except Exception as error:  # BufferError, RuntimeError or the framework's own
        raise TypeError(f"{namespace.__name__} refuses {expected}: {_line(error)}") from None
    # JAX narrows 64-bit results without a word.
    if str(result.dtype).rpartition(".")[2] != expected:
        raise TypeError(
            f"{namespace.__name__} turned a result of {expected} into {result.dtype}; in JAX, "
            "switch on jax_enable_x64"
        )
    return result


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


client_products = _on_arrays(ops.client_products)
combine = _on_arrays(ops.combine)
combine_list = _on_arrays(ops.combine_list)
flora_na = _on_arrays(ops.flora_na)
flora_na_list = _on_arrays(ops.flora_na_list)
gram = _on_arrays(ops.gram)
gram_list = _on_arrays(ops.gram_list)
select_rank = _on_arrays(ops.select_rank)
spectrum = _on_arrays(ops.spectrum)
stacked_svd = _on_arrays(ops.stacked_svd)
stacked_svd_list = _on_arrays(ops.stacked_svd_list)
surrogate = _on_arrays(ops.surrogate)
weighted_sum = _on_arrays(ops.weighted_sum)
weighted_sum_list = _on_arrays(ops.weighted_sum_list)
