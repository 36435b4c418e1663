"""Geometric median (RFA, Pillutla et al., arXiv 1912.13445): the point nearest to all clients.

    z = sum_k p_k dW_k minimizes sum_k w_k ||z - dW_k||        p_k ~ w_k / ||z - dW_k||

p are the weights; :meth:`Updates.geometric_median` finds them from the K x K inner products. The
given weights w_k count, so an attacker that claims many examples counts more: phi is the attackers'
share of the given weights.

With r the largest distance of an honest update from the honest mean and phi < 1/2, z is within
2 (1 - phi) / (1 - 2 phi) * r of that mean, wherever the attackers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.robust._robust import Robust, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates


@dataclass(frozen=True)
class GeometricMedian(Robust):
    """Every client counts, the less the farther it is from the others."""

    title = "geometric median"
    paper = "1912.13445"
    published = 2019
    stops = "attackers with less than half of the weights"
    grades = True

    smoothing: float = option(
        1e-6, "the smallest distance that counts, as a share of the clients' median distance"
    )
    tol: float = option(
        1e-9, "stop when the median moves by no more than this share of the median distance"
    )
    max_steps: int = option(1000, "the largest number of steps")

    def __post_init__(self) -> None:
        """Raises ValueError: an option is out of range."""
        if not 0 < self.smoothing < 1:
            raise ValueError(f"smoothing must lie in (0, 1), found {self.smoothing}")
        if not self.tol >= 0:
            raise ValueError(f"tol must not be negative, found {self.tol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, found {self.max_steps}")

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """p."""
        return updates.geometric_median(
            weights, tol=self.tol, smoothing=self.smoothing, max_steps=self.max_steps
        )
