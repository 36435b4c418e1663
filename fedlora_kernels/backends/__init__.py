"""The backends: which implementations of the operators there are, and which one is in use.

A process uses one backend, because a second registration for a dispatch key silently replaces the
first. It is chosen once, when the operators are registered or :func:`backend` is first called:
the one that ``FEDLORA_BACKEND`` names, else the best that can be used. A backend handles the
tensors on its device, and ``composed`` those on any other. Where ``cuda`` or ``triton`` handles the
GPU, the ``cpu`` library handles the tensors on the CPU, if it is there.

A new backend is one file here and one row of the table below.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from fedlora_kernels.backends.base import Backend
from fedlora_kernels.backends.compiled import Compiled
from fedlora_kernels.backends.composed import Composed
from fedlora_kernels.backends.reference import Reference
from fedlora_kernels.backends.triton import Triton

if TYPE_CHECKING:
    from fedlora_kernels.ops.operator import Operators

__all__ = ["Backend", "activate", "backend", "handling", "ordered"]

_CPU = Compiled("cpu", "fedlora_cpu", "C++, on a CPU; composed on other devices")
_COMPOSED = Composed()

_BACKENDS: tuple[Backend, ...] = (
    Compiled("cuda", "fedlora_cuda", "CUDA, on an NVIDIA GPU", needs_gpu=True),
    Triton(),
    _CPU,
    _COMPOSED,
    Reference(),
    Compiled(
        "cuda-emulated",
        "fedlora_cuda_emulated",
        "CUDA kernels run on the CPU; for tests",
        only_forced=True,
    ),
)


def ordered() -> tuple[Backend, ...]:
    """All backends, best first, those that only ``FEDLORA_BACKEND`` chooses last.

    Each has ``name``, ``serves`` and ``reason``: whether this process can use it, and why or why
    not. The backend in use is chosen by this, so that a library that does not load is known.
    """
    with suppress(RuntimeError):  # backend() raises it again; here every reason is asked for
        _chosen()
    return _by_preference()


def backend() -> str:
    """Name of the backend in use: the one that ``FEDLORA_BACKEND`` names, else the best.

    Raises:
        RuntimeError: the variable names a backend that cannot be used or is not known.
    """
    return _chosen().name


def handling(device: str) -> Backend:
    """The backend whose implementations tensors on a device get, such as "cpu" or "cuda".

    Raises:
        RuntimeError: as :func:`backend`.
    """
    chosen = _chosen()
    if chosen.handles(device):
        return chosen
    return _CPU if chosen.leaves_cpu and _CPU.serves and _CPU.handles(device) else _COMPOSED


def activate(operators: "Operators") -> None:
    """Register the implementations of the backend in use; ``fedlora_kernels.ops`` does so once.

    Raises:
        RuntimeError: as :func:`backend`.
    """
    _chosen().activate(operators)


def _by_preference() -> tuple[Backend, ...]:
    return tuple(sorted(_BACKENDS, key=lambda candidate: candidate.only_forced))


@cache
def _chosen() -> Backend:
    """The backend in use, loaded, and with it the CPU's library where it leaves the CPU to that."""
    forced = os.environ.get("FEDLORA_BACKEND", "")
    known = {candidate.name: candidate for candidate in _by_preference()}
    if forced:
        candidates = [known[forced]] if forced in known else []
    else:
        candidates = [candidate for candidate in known.values() if not candidate.only_forced]
    chosen = next((candidate for candidate in candidates if candidate.start()), None)
    if chosen is None:
        raise RuntimeError(_refusal(forced, known))
    if chosen.leaves_cpu:
        _CPU.start()
    return chosen


def _refusal(forced: str, known: Mapping[str, Backend]) -> str:
    if not forced:
        return f"no backend can serve: {known['composed'].reason}"
    missing = "there is no backend of that name in this installation"
    why = known[forced].reason if forced in known else missing
    serving = [candidate.name for candidate in known.values() if candidate.serves]
    return (
        f"FEDLORA_BACKEND={forced} cannot serve ({why}); these can: {', '.join(serving) or 'none'}"
    )
