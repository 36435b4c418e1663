"""Which implementation of the operators this process runs.

One backend serves a process. It is chosen when the package is imported, because a second
registration for the same dispatch key silently replaces the first. ``FEDLORA_BACKEND`` forces one;
a forced backend that cannot serve raises and lists those that can.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from fedlora_kernels import native


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
    return (
        _cpu(),
        Backend("composed", torch, "torch operators, on any device" if torch else missing),
        Backend("reference", torch, "float64 torch, the specification; slow" if torch else missing),
    )


def _cpu() -> Backend:
    """The compiled kernels; loading them is part of finding out, unless another is forced."""
    why = native.missing()
    if not why and _forced() in ("", "cpu"):
        try:
            native.load("fedlora_cpu")
        except (ImportError, OSError) as error:
            why = f"libfedlora_cpu.so does not load: {error.__cause__ or error}"
    return Backend("cpu", not why, why or "C++, on a CPU; composed on other devices")


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
