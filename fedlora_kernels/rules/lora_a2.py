"""LoRA-A2 (arXiv 2410.22815, ACL 2025): RoLoRA's turns, and of each client the ranks that matter.

    odd rounds    A is common    b_i = b_i^last + sum_k w_k m_ki (b_ki - b_i^last)
    even rounds   B is common    a_i = a_i^last + sum_k w_k m_ki (a_ki - a_i^last)

b_i is a column of B, a_i a row of A, and ^last the global adapter that the clients started from (in
the first round B = 0). m_ki is 1 for the ranks i, of all modules, that change the client's update
most: those with the largest s_k ||b_ki - b_i^last|| ||a_i||, or s_k ||b_i|| ||a_ki - a_i^last||.
Each client has ``budget`` ranks per module, on average.

The paper's clients choose before they train and send what they chose. Here they train all ranks,
and the server chooses from the trained factor that they send. Scalings s_k that differ are folded
into the factor that was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.rules._rule import Rule, at_least_one, option
from fedlora_kernels.rules.rolora import RoLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class LoRAA2(RoLoRA):
    """RoLoRA, which it is without a budget, with the mean over the ranks that clients chose."""

    title = "LoRA-A2"
    paper = "2410.22815"
    exact = "exact for the ranks kept"

    budget: int | None = option(
        None, "how many ranks of each client are used, per module on average; default: all"
    )
    masks: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """module -> which ranks count of the clients that have it, [K,r]; set by :meth:`prepared`"""

    def __post_init__(self) -> None:
        """Raises ValueError: budget is under 1."""
        at_least_one(budget=self.budget)

    def solve(self, grams: Grams) -> Solution:
        """The means over the ranks that count, and the first client's other factor.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        import torch

        from fedlora_kernels.gram_space.coefficients import Solution, common_scaling, padded

        count = len(grams.batch.client_ranks)
        if self.masks is None or count == 0:
            return super().solve(grams)
        masks = torch.stack([self.masks[module] for module in grams.modules]).to(grams.weights)
        scaling, folded = common_scaling(grams)
        weights = grams.weights[:count, None]
        trained = (folded[:, :count, None] * weights * masks).flatten(1)
        if count < len(grams.ranks):
            left = (weights * (1 - masks)).sum(1)
            trained = torch.cat([trained, folded[:, count:] * left], 1)
        first = torch.zeros_like(trained)
        first[:, : grams.ranks[0]] = 1
        b, a = (trained, first) if self.fixed == "a" else (first, trained)
        return Solution(replace(padded(grams, scaling[:, None] * b, a), common=scaling))

    @property
    def merging(self) -> LoRAA2 | None:
        """Itself, unless each client's own ranks are chosen."""
        return self if self.budget is None else None

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """Of each module what RoLoRA notes and, for a budget, the clients' scores.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        count = len(grams.batch.client_ranks)
        if 0 < count < len(grams.ranks):
            self.carried_rank(grams)
        of_factors = super().noted(grams)
        if self.budget is None or count == 0:
            return {module: (odd, None) for module, odd in of_factors.items()}
        began = count < len(grams.ranks)
        rows = zip(*(_scores(grams, side).cpu() for side in "ab"), strict=True)
        return {
            module: (odd, _Scores(grams.batch.clients[:count], began, {"a": of_a, "b": of_b}))
            for (module, odd), (of_a, of_b) in zip(of_factors.items(), rows, strict=True)
        }

    def knowing(self, notes: Mapping[str, Any]) -> LoRAA2:
        """The rule that knows which factor is common, and which ranks count.

        Raises:
            AdapterError: neither factor is common, or the clients trained A and nothing was
                carried; names the client and the module.
        """
        known = super().knowing({module: odd for module, (odd, _) in notes.items()})
        assert isinstance(known, LoRAA2)
        if self.budget is None:
            return known
        scores = {module: found for module, (_, found) in notes.items() if found is not None}
        unknown = next((module for module, found in scores.items() if not found.began), None)
        if known.fixed == "b" and unknown is not None:
            raise AdapterError(
                f"module {unknown}: the clients trained A, and the A that they started from is "
                "not known; give carried=last.carried of the last round's result (in Python only), "
                "or leave `budget` out"
            )
        return replace(known, masks=_chosen(scores, str(known.fixed), self.budget))

    def joins(self, carried: Any) -> Sequence[tuple[Adapter, float]]:
        """The last global adapter, with weight 0.

        Raises:
            TypeError: something is carried, and there is no budget.
        """
        if carried is None or self.budget is None:
            return Rule.joins(self, carried)
        return ((carried, 0.0),)

    def carry(self, result: Aggregation) -> Adapter | None:
        """The global adapter, where a budget needs the changes from it."""
        return None if self.budget is None else result.adapter


def _scores(grams: Grams, fixed: str) -> Tensor:
    """The squared sizes of the changes of every client's rank-1 terms, [L,K,r]."""
    count, rank = len(grams.batch.client_ranks), grams.ranks[0]
    trained, other = (grams.b, grams.a) if fixed == "a" else (grams.a, grams.b)
    scalings = grams.scalings[:, grams.batch.owner]
    trained = scalings[:, :, None] * trained * scalings[:, None, :]
    own = trained.diagonal(dim1=-2, dim2=-1).unflatten(1, (-1, rank))
    change = own[:, :count]
    if count < len(grams.ranks):
        last = trained[:, :, -rank:].unflatten(1, (-1, rank)).diagonal(dim1=-2, dim2=-1)
        change = (change - 2 * last[:, :count] + own[:, count:]).clamp_min(0)
    sizes = other.diagonal(dim1=-2, dim2=-1).unflatten(1, (-1, rank))
    found: Tensor = change * sizes[:, :count]
    return found


class _Scores(NamedTuple):
    """Of one module."""

    clients: tuple[int, ...]
    """the K clients that have it"""
    began: bool
    """whether it is known what they started from"""
    sizes: Mapping[str, Tensor]
    """the common factor -> the scores of what was trained beside it, [K,r]"""


def _chosen(scores: Mapping[str, _Scores], fixed: str, budget: int) -> dict[str, Tensor]:
    """Of every client the ranks with the largest scores, ``budget`` times its modules; of equal
    scores the first ones.
    """
    import torch

    rows = {module: found.sizes[fixed] for module, found in scores.items()}
    masks = {module: torch.zeros_like(row, dtype=torch.bool) for module, row in rows.items()}
    places: dict[int, list[tuple[str, int]]] = {}
    for module, found in scores.items():
        for place, client in enumerate(found.clients):
            places.setdefault(client, []).append((module, place))
    for mine in places.values():
        values = torch.stack([rows[module][place] for module, place in mine])
        best = values.flatten().argsort(descending=True, stable=True)[: budget * len(mine)]
        kept = torch.zeros(values.numel(), dtype=torch.bool)
        kept[best] = True
        for (module, place), row in zip(mine, kept.view_as(values), strict=True):
            masks[module][place] = row
    return masks
