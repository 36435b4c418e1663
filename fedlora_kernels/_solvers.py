"""Which backend and which solver an aggregation would use, asked of the code that chooses."""

from dataclasses import dataclass, replace

import torch

from fedlora_kernels.backends import handling
from fedlora_kernels.backends.solver import DTYPES, Problem, Step
from fedlora_kernels.gram_space.batches import WIDE_RANK, is_wide, modules_at_once


@dataclass(frozen=True)
class Solvers:
    """What :func:`solvers` found."""

    backend: str
    """which backend handles tensors on the device"""
    modules_at_once: int
    """how many modules of this kind one call works on"""
    steps: tuple[Step, ...]
    """the solvers in the order in which they are tried"""


def solvers(
    stacked_rank: int,
    *,
    modules: int = 1,
    size: tuple[int, int] = (4096, 4096),
    dtype: str = "float32",
    device: str = "cpu",
    energy: float = 0.9,
    max_rank: int | None = None,
    precision: str = "exact",
) -> Solvers:
    """Which backend and which solver would find the singular values of L modules.

    The answer comes from the code that chooses: the compiled library is asked for its own limits on
    the device. Nothing is computed.

    Args:
        stacked_rank: R, the sum of the clients' ranks.
        modules: L, how many modules of one size and of these clients there are.
        size: (m, n) of their weights.
        dtype: of the factors: "bfloat16", "float16", "float32" or "float64".
        device: as torch names it, such as "cpu" or "cuda:0".
        energy: share of the energy to keep, in (0, 1].
        max_rank: how many singular values are needed at most.
        precision: "exact" or "fast".

    Returns:
        The backend, the number of modules of one call, and the solvers in their order, each with
        the stacked ranks for which it is chosen and where these limits come from.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: FEDLORA_BACKEND names a backend that cannot be used, or there is no such
            device.
    """
    if min(stacked_rank, modules, *size) < 1:
        raise ValueError("stacked_rank, modules and size must be at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision must be 'exact' or 'fast', found {precision!r}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], found {energy}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, found {max_rank}")
    problem = Problem(stacked_rank, size, dtype, precision, energy, max_rank)
    backend = handling(torch.device(device).type)
    wide = max(WIDE_RANK, -(-3 * min(size) // 4))
    if is_wide(stacked_rank, size):
        solver = "Gram matrix of the dense update's smaller side, its leading eigenvalues"
        steps: tuple[Step, ...] = (Step(solver, (wide, None), "R >= 3/4 min(m, n), counted"),)
    else:
        steps = tuple(_below(wide, step) for step in backend.solvers(problem, device))
    at_once = min(modules, modules_at_once(stacked_rank, size, torch.device(device)))
    return Solvers(backend.name, at_once, steps)


def _below(wide: int, step: Step) -> Step:
    """The step with its limits cut where the dense update takes over."""
    first, last = step.ranks
    return step if last is not None and last < wide else replace(step, ranks=(first, wide - 1))
