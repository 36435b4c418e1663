"""Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757): the client with the nearest neighbors.

    score_k = sum of the K - f - 2 smallest d_jk^2 to the other clients, f attackers among K

The client of the smallest score (of equals the first) counts alone. The given weights are not used,
but a client of weight 0 takes no part. K must be at least 2 f + 3.

With S the smallest score of an honest client and r the largest distance of an honest update from
the honest mean, the result is within sqrt(S / (K - 2 f - 2)) + r of that mean: of the chosen
client's neighbors at least K - 2 f - 2 are honest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.robust._robust import Robust, not_negative, only, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates


@dataclass(frozen=True)
class Krum(Robust):
    """The one client whose nearest neighbors are nearest."""

    title = "Krum"
    paper = "1703.02757"
    published = 2017
    stops = "up to f < (K - 2) / 2 attackers of any kind"

    attackers: int | None = option(
        None, "how many clients may be attackers, f; default: (K - 3) / 2 of K clients"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: attackers is negative."""
        not_negative(attackers=self.attackers)

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """Weight for the best of :meth:`ranked`.

        Raises:
            AdapterError: there are fewer than 2 f + 3 clients.
        """
        order, _ = self.ranked(updates)
        return only(weights, order[:1])

    def ranked(self, updates: Updates) -> tuple[Tensor, int]:
        """The clients by their scores, the best first, and f.

        Raises:
            AdapterError: there are fewer than 2 f + 3 clients.
        """
        count = len(updates)
        most = (count - 3) // 2
        need = "at least 2 * attackers + 3 clients"
        attackers = self.attackers_among(count, self.attackers, most, need)
        nearest = updates.squared_distances.sort(-1).values[:, 1 : count - attackers - 1]
        return nearest.sum(-1).argsort(stable=True), attackers
