"""RBLA (arXiv 2408.08699): factors of different ranks averaged position by position.

    A[i] = sum_k v_ki A_k[i]    B[:,i] = sum_k v_ki s_k B_k[:,i]
    v_ki = w_k / sum_{j: r_j >= i} w_j

HetLoRA's zero-padding dilutes the positions that few clients have; here a position's mean is over
the clients that have it (the masked mean that FediLoRA takes as well). Client k takes the first r_k
rows and columns. A client without a module has rank 0. The means belong to positions, so the result
depends on the basis of every client's factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class RBLA(Rule):
    """The means over the clients that have a position."""

    title = "RBLA"
    paper = "2408.08699"
    exact = "means over holders, not exact"
    heterogeneous = True
    receives = "leading"

    def solve(self, grams: Grams) -> Solution:
        """The coefficients that average."""
        from fedlora_kernels.gram_space.coefficients import Solution, holders, padded

        shares = holders(grams).expand_as(grams.scale)
        return Solution(padded(grams, shares * grams.scalings[:, grams.batch.owner], shares))
