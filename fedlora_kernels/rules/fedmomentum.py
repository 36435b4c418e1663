"""FedMomentum (arXiv 2603.08014): the leading components go on training, the rest is merged.

    dW = U S V^T    B = U_r S_r^(1/2)    A = S_r^(1/2) V_r^T    residual = the components r+1 to q

q is the smallest rank that holds a share of the energy, 0.9999. The clients merge the residual into
their base and go on from B and A, so that what they have learned keeps its directions: that is the
training momentum of the paper's name. ``momentum`` adds a share of the last round's aggregate in
its product form as well, as one more client in the stack:

    V_t = dW_t + momentum V_(t-1)        which is decomposed in the place of dW
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FedMomentum(Rule):
    """The leading components as the adapter, and the tail as a residual."""

    title = "FedMomentum"
    paper = "2603.08014"
    exact = "exact up to the energy kept"
    after = "merge"
    residual = True
    bounded = True

    kept_energy: float = option(
        0.9999, "share of the energy that adapter and residual hold together, in (0, 1]"
    )
    momentum: float = option(0.0, "share of the last round's update that is added, in [0, 1)")

    def __post_init__(self) -> None:
        """Raises ValueError: an option is out of range."""
        if not 0 < self.kept_energy <= 1:
            raise ValueError(f"kept_energy must lie in (0, 1], found {self.kept_energy}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), found {self.momentum}")

    def solve(self, grams: Grams) -> Solution:
        """The leading singular components, and the others up to the energy.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels import ops
        from fedlora_kernels.gram_space.coefficients import Solution, between, leading
        from fedlora_kernels.ops import checks

        checks.resolvable(self.kept_energy, grams.precision)
        ranks = grams.batch.client_ranks
        self.equal_rank(grams)
        width = min(max(ranks, default=0), grams.full_rank)
        found = grams.spectrum
        ends = ops.select_rank(found.sigma, found.total_energy, self.kept_energy, grams.full_rank)
        kept = leading(found.left, found.right, ends) if self.momentum else None
        return Solution(
            leading(*found.split("balanced"), ranks=grams.same_rank(width)),
            between(found.left, found.right, width, ends),
            kept=kept,
            spectrum=found,
        )

    def joins(self, carried: Any) -> Sequence[tuple[Adapter, float]]:
        """The last aggregate, with the weight ``momentum``.

        Raises:
            TypeError: something is carried, and ``momentum`` is 0.
        """
        if carried is None or not self.momentum:
            return super().joins(carried)
        return ((carried, self.momentum),)

    def carry(self, result: Aggregation) -> Adapter | None:
        """The aggregate, adapter and residual together."""
        return result.kept

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """At most min(R, m, n); the clients' rank at least."""
        return min(sum(ranks), *size)
