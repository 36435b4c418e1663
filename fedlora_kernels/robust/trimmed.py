"""Trimmed selection: the f farthest clients are left out, the others count by their given weights.

A client is far by its distance from the geometric median of all (``by="center"``), or by the median
of its distances to the other clients (``by="neighbors"``; the lower one of two). f must be less
than half of the clients. FABA (Xia et al., IJCAI 2019) leaves out, one after the other, the client
farthest from the mean of those that are left; here all f are left out at once, by a distance that
attackers cannot move.

With r the largest distance of an honest update from the honest mean, D the largest between two
honest ones, and phi the attackers' share of the given weights:

    by="neighbors"    the result is within D + r of the honest mean
    by="center"       within r (1 + 4 (1 - phi) / (1 - 2 phi))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fedlora_kernels.robust._robust import Robust, not_negative, only, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates

By = Literal["neighbors", "center"]


@dataclass(frozen=True)
class Trimmed(Robust):
    """All clients but the farthest."""

    title = "trimmed selection"
    paper = "FABA, IJCAI 2019"
    published = 2019
    stops = "fewer than half of the clients, of any kind"

    attackers: int | None = option(
        None, "how many clients to leave out, f; default: (K - 1) / 2 of K clients"
    )
    by: By = option(
        "neighbors",
        "what makes a client far: neighbors, its median distance to the others; or center, its "
        "distance from the geometric median",
    )

    def __post_init__(self) -> None:
        """Raises ValueError: attackers is negative, or by is unknown."""
        not_negative(attackers=self.attackers)
        if self.by not in get_args(By):
            expected = " or ".join(get_args(By))
            raise ValueError(f"by must be {expected}, found {self.by!r}")

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """The given weights of the K - f nearest clients.

        Raises:
            AdapterError: half of the clients or more are to be left out.
        """
        count = len(updates)
        need = "at least 2 * attackers + 1 clients"
        attackers = self.attackers_among(count, self.attackers, (count - 1) // 2, need)
        if self.by == "neighbors":
            far = updates.medians
        else:
            far = updates.distances(updates.geometric_median(weights))
        return only(weights, far.argsort(stable=True)[: count - attackers])
