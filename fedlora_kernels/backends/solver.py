"""Which solver finds a module's singular values, and the stacked ranks for which it is chosen."""

from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Dtypes of factors."""


@dataclass(frozen=True)
class Problem:
    """What a backend chooses its solver by."""

    stacked_rank: int
    """R, the sum of the clients' ranks"""
    size: tuple[int, int]
    """(m, n) of the module's weight"""
    dtype: str
    """of the factors: "bfloat16", "float16", "float32" or "float64" """
    precision: str
    """"exact" or "fast" """
    energy: float
    """the share of the energy to keep"""
    max_rank: int | None
    """how many singular values are needed at most"""

    @property
    def smaller(self) -> int:
        """min(m, n)."""
        return min(self.size)


@dataclass(frozen=True)
class Step:
    """One solver, and when it is chosen. A later step is for what the steps before it leave."""

    solver: str
    """what computes"""
    ranks: tuple[int, int | None]
    """from and up to which stacked rank it is chosen, the problem's other facts being the same"""
    source: str
    """where these limits come from"""

    def __str__(self) -> str:
        first, last = self.ranks
        limits = f"R >= {first}" if last is None else f"R from {first} to {last}"
        return f"{self.solver} ({limits}: {self.source})"


def composed_route(rank: int, smaller: int, double: bool, precision: str) -> str:
    """Which way `stacked_svd` of torch operators goes; smaller is min(m, n)."""
    if double and precision == "exact":
        return "qr"
    return "smaller side" if rank >= smaller else "grams"


def composed_solvers(problem: Problem) -> tuple[Step, ...]:
    """What it uses; torch chooses the method of its decompositions itself."""
    smaller = problem.smaller
    double = problem.dtype == "float64"
    route = composed_route(problem.stacked_rank, smaller, double, problem.precision)
    if route == "qr":
        solver = "torch.linalg.qr of both factors, torch.linalg.svd of the core"
        return (Step(solver, (1, None), "float64 data in exact precision"),)
    if route == "smaller side":
        solver = "torch.linalg.eigh of the dense update's smaller side"
        return (Step(solver, (smaller, None), "R >= min(m, n)"),)
    solver = "torch.linalg.eigh of two R x R matrices"
    return (Step(solver, (1, smaller - 1), "R < min(m, n)"),)
