"""Multi-Krum (Blanchard et al., NeurIPS 2017, arXiv 1703.02757): the mean of Krum's best clients.

The ``keep`` clients of the smallest scores (see krum.py) count by their given weights, the others
not at all. ``keep`` is K - f - 2 where nothing is said, and at most that.

The result is within sqrt(S / (K - 2 f - 2)) + r of the honest mean, with S the keep-th smallest
score of an honest client: each chosen client is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.robust._robust import only, option
from fedlora_kernels.robust.krum import Krum

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the clients whose nearest neighbors are nearest."""

    title = "Multi-Krum"

    keep: int | None = option(None, "how many clients count; default: K - f - 2")

    def __post_init__(self) -> None:
        """Raises ValueError: attackers is negative, or keep is under 1."""
        super().__post_init__()
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be at least 1, found {self.keep}")

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """The given weights of the best ``keep`` clients.

        Raises:
            AdapterError: there are fewer than 2 f + 3 clients, or fewer than keep + f + 2.
        """
        order, attackers = self.ranked(updates)
        most = len(updates) - attackers - 2
        if self.keep is not None and self.keep > most:
            raise AdapterError(
                f"{len(updates)} clients of positive weight: {self.name} with "
                f"attackers={attackers} keeps at most {most}, found keep={self.keep}"
            )
        return only(weights, order[: most if self.keep is None else self.keep])
