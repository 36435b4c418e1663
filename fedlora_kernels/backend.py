"""Which implementation of the operators this process runs.

One backend serves a process. It is chosen when the package is imported, because a second
registration for the same dispatch key silently replaces the first. ``FEDLORA_BACKEND`` forces one;
a forced backend that cannot serve raises and lists those that can.
"""

import os
from dataclasses import dataclass
from functools import cache

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
    return (
        _cpu(),
        Backend("composed", True, "torch operators in Gram space, on any device"),
        Backend("reference", True, "plain float64 torch, the specification; slow"),
    )


def _cpu() -> Backend:
    """The compiled kernels; loading them is part of finding out, unless another is forced."""
    why = native.missing()
    if not why and _forced() in ("", "cpu"):
        try:
            native.load("fedlora_cpu")
        except (ImportError, OSError) as error:
            why = f"libfedlora_cpu.so does not load: {error}"
    return Backend("cpu", not why, why or "C++, on a CPU; composed on other devices")


def _forced() -> str:
    return os.environ.get("FEDLORA_BACKEND", "")


@cache
def backend() -> str:
    """Name of the backend in use: the one ``FEDLORA_BACKEND`` names, else the best that serves.

    Raises:
        RuntimeError: the variable names a backend that cannot serve, or none of them.
    """
    serving = [candidate.name for candidate in backends() if candidate.serves]
    forced = _forced()
    if not forced:
        return serving[0]
    if forced not in serving:
        reasons = {candidate.name: candidate.reason for candidate in backends()}
        why = reasons.get(forced, "there is no backend of that name in this installation")
        raise RuntimeError(
            f"FEDLORA_BACKEND={forced} cannot serve ({why}); these can: {', '.join(serving)}"
        )
    return forced
