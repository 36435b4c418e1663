"""Which implementation of the operators this process runs.

One backend serves a process. It is chosen when the package is imported, because a second
registration for the same dispatch key silently replaces the first. ``FEDLORA_BACKEND`` forces one;
a forced backend that cannot serve raises and lists those that can.

A backend serves the tensors of its device, and ``composed`` those of any other. Two get on: where
``cuda`` or ``triton`` serves the GPU, the ``cpu`` library serves the tensors on the CPU, if it is
there.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from fedlora_kernels import native, triton


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, and why it can or cannot serve here."""

    name: str
    serves: bool
    reason: str


@cache
def backends() -> tuple[Backend, ...]:
    """All backends, best first, each with what was found out about it on this machine."""
    torch = find_spec("torch") is not None
    missing = "torch is not installed"
    kernels = Backend("triton", *triton.serves())
    # Interpreted, they take the CPU's tensors, slowly: last, so that only force chooses them.
    first, last = ((), (kernels,)) if triton.interpreted() else ((kernels,), ())
    beside = ("", "cuda", *(item.name for item in first))
    return (
        _cuda(),
        *first,
        _compiled("cpu", "fedlora_cpu", "C++, on a CPU; composed on other devices", beside),
        Backend("composed", torch, "torch operators, on any device" if torch else missing),
        Backend("reference", torch, "float64 torch, the specification; slow" if torch else missing),
        _compiled(
            "cuda-emulated", "fedlora_cuda_emulated", "CUDA kernels run on the CPU; for tests"
        ),
        *last,
    )


def _cuda() -> Backend:
    why = native.missing("fedlora_cuda")
    if not why:
        import torch

        why = "" if torch.cuda.is_available() else "torch finds no NVIDIA GPU"
    return _compiled("cuda", "fedlora_cuda", "CUDA, on an NVIDIA GPU", ("",), why)


def _compiled(
    name: str, library: str, what: str, beside: tuple[str, ...] = (), why: str = ""
) -> Backend:
    """A compiled backend; loading its library, unless another is forced, is part of finding out.

    Args:
        name: the backend's.
        library: the library's.
        what: what to say where it serves.
        beside: for which other values of ``FEDLORA_BACKEND`` the library is loaded.
        why: why it cannot serve, where that is known already.
    """
    why = why or native.missing(library)
    if not why and _forced() in (name, *beside):
        try:
            native.load(library)
        except (ImportError, OSError) as error:
            why = f"lib{library}.so does not load: {error.__cause__ or error}"
    return Backend(name, not why, why or what)


def _forced() -> str:
    return os.environ.get("FEDLORA_BACKEND", "")


@cache
def backend() -> str:
    """Name of the backend in use: the one ``FEDLORA_BACKEND`` names, else the best that serves.

    Raises:
        RuntimeError: the variable names a backend that cannot serve, or none of them.
    """
    reasons = {candidate.name: candidate.reason for candidate in backends()}
    serving = [candidate.name for candidate in backends() if candidate.serves]
    forced = _forced()
    if not forced and not serving:
        raise RuntimeError(f"no backend can serve: {reasons['composed']}")
    if forced and forced not in serving:
        why = reasons.get(forced, "there is no backend of that name in this installation")
        raise RuntimeError(
            f"FEDLORA_BACKEND={forced} cannot serve ({why}); "
            f"these can: {', '.join(serving) or 'none'}"
        )
    return forced or serving[0]
