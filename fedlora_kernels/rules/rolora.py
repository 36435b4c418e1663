"""RoLoRA (arXiv 2409.02346): the clients train B and A in turn, and what they trained is averaged.

    odd rounds   A = A_1 = ... = A_K    B = sum_k w_k B_k
    even rounds  B = B_1 = ... = B_K    A = sum_k w_k A_k

With one factor common to all clients the mean of the other is exact. Which one is common is seen
from the factors; nothing has to count the rounds here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.adapters.factors import Factors
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class RoLoRA(Rule):
    """The mean of the factor that was trained beside the common one, bit for bit."""

    title = "RoLoRA"
    paper = "2409.02346"
    travels = "B and A in turn"
    exact = "exact"
    trains = "alternate"
    separable = True

    fixed: str | None = field(default=None, repr=False)
    """the common factor, "a" or "b"; set by :meth:`prepared`, no option"""

    def solve(self, grams: Grams) -> Solution:
        """The weighted mean of one factor, and the first client's other one.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        from fedlora_kernels.gram_space.coefficients import Mixture, Solution, common_scaling

        self.equal_rank(grams)
        scaling, folded = common_scaling(grams)
        first = folded.new_zeros(folded.shape)
        first[:, 0] = 1
        mean = grams.weights * folded
        q, p = (mean, first) if self.fixed == "a" else (first, mean)
        return Solution(Mixture(q, p, scaling, grams.ranks[0]))

    @property
    def joint(self) -> bool:
        """The common factor is the same one in all modules."""
        return True

    @property
    def merging(self) -> RoLoRA | None:
        """Itself."""
        return self

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """Of each module, factor -> the first client whose own differs, and what to say of it.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        self.equal_rank(grams)
        pairs, count = grams.batch.pairs, len(grams.ranks)
        notes: dict[str, dict[str, tuple[int, str]]] = {}
        for place, module in enumerate(grams.modules):
            mine = pairs[place * count : (place + 1) * count]
            odd = notes[module] = {}
            for side, other in (("a", "b"), ("b", "a")):
                k = next((k for k in range(count) if not _same(mine[k], mine[0], side)), None)
                if k is not None:
                    odd[side] = (
                        k,
                        f"{grams.batch.where(place * count + k)}: {side.upper()} differs from "
                        f"{grams.labels[0]}'s, and {other.upper()} is not common to all either; "
                        f"{self.name} expects clients that trained one factor and share the other",
                    )
        return notes

    def knowing(self, notes: Mapping[str, Any]) -> RoLoRA:
        """The rule that knows which factor is common; A where both are.

        Raises:
            AdapterError: neither factor is common; names the client and the module.
        """
        odd: dict[str, tuple[int, str]] = {}
        for found in notes.values():
            odd = {**found, **odd}  # the first of each
        if len(odd) == 2:  # the factor that more of the clients share
            raise AdapterError(max(odd["a"], odd["b"], key=lambda found: found[0])[1])
        return replace(self, fixed="b" if "a" in odd else "a")


def _same(one: Factors, other: Factors, side: str) -> bool:
    return one.same_a(other) if side == "a" else one.same_b(other)
