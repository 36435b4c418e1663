"""What the launchers ask about the device they launch on."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fedlora_kernels.backends.triton.runtime import interpreted, release

# The interpreter's stand-in for a GPU's multiprocessors: enough that long factors are split.
_INTERPRETED_UNITS = 2

# Before sm_80 Triton multiplies no matrices on tensor cores and has no bfloat16.
_CAPABILITY = (8, 0)

P = ParamSpec("P")
T = TypeVar("T")


@cache
def name(device: torch.device) -> str:
    """The device's name, as tile files are called; every launch asks for it.

    Raises:
        RuntimeError: the device is an NVIDIA GPU older than Triton's matrix products.
    """
    if interpreted():
        return "interpreter"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            raise RuntimeError(
                f"triton needs sm_80, found sm_{capability[0]}{capability[1]}; "
                "set FEDLORA_BACKEND=composed"
            )
    properties = torch.get_device_module(device).get_device_properties(device)
    return str(properties.name).replace(" ", "_").replace("/", "_")


@cache
def units(device: torch.device) -> int:
    """How many programs run side by side at least: multiprocessors, compute units."""
    if interpreted():
        return _INTERPRETED_UNITS
    properties = torch.get_device_module(device).get_device_properties(device)
    count = getattr(properties, "multi_processor_count", None)
    return int(count if count is not None else properties.max_compute_units)


@cache
def splits_float32(device: torch.device) -> bool:
    """Whether float32 is multiplied as TF32 heads and rests: on NVIDIA's tensor cores, and in the
    interpreter to test it. AMD's matrix cores multiply float32 as it is, and Triton 3.6 does not
    compile the split for sm_100.
    """
    if interpreted():
        return True
    if torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) < (10, 0) or release() >= (3, 7)


def legible(tensor: Tensor) -> Tensor:
    """The tensor as Triton can read it: the interpreter holds bfloat16 as integers and multiplies
    their bit patterns, so it gets the same values in float32.
    """
    return tensor.float() if interpreted() and tensor.dtype == torch.bfloat16 else tensor


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel stores results of ``dtype``: see :func:`legible`; the
    interpreter also cuts float32 off to bfloat16 instead of rounding.
    """
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def on_device(launch: Callable[P, T]) -> Callable[P, T]:
    """Launch on the device of the first tensor among the arguments, not on the current one."""

    @wraps(launch)
    def there(*args: P.args, **kwargs: P.kwargs) -> T:
        with _current(args[0]):
            return launch(*args, **kwargs)

    return there


def _current(argument: object) -> AbstractContextManager[object]:
    first = argument[0] if isinstance(argument, (list, tuple)) else argument
    if isinstance(first, Tensor) and first.device.type == "cuda":
        return torch.cuda.device(first.device)
    return nullcontext()
