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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

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
        masks = torch.stack([self.masks[module] for module in grams.modules]).double()
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

    def prepared(self, every: Iterable[Grams]) -> LoRAA2:
        """The rule that knows which factor is common, and which ranks count.

        Raises:
            AdapterError: clients' ranks differ, neither factor is common, or the clients trained A
                and nothing was carried; names the client and the module.
        """
        scores: dict[str, dict[str, tuple[tuple[int, ...], Tensor]]] = {"a": {}, "b": {}}
        unknown: list[str] = []

        def scored() -> Iterator[Grams]:
            for grams in every:
                count = len(grams.batch.client_ranks)
                if 0 < count < len(grams.ranks):
                    self.carried_rank(grams)
                yield grams  # ranks that differ are refused here
                if self.budget is None or count == 0:
                    continue
                if count == len(grams.ranks):
                    unknown.extend(grams.modules)
                for side, of in scores.items():
                    rows = zip(grams.modules, _scores(grams, side), strict=True)
                    of |= {module: (grams.batch.clients[:count], row) for module, row in rows}

        known = super().prepared(scored())
        assert isinstance(known, LoRAA2)
        if self.budget is None:
            return known
        if known.fixed == "b" and unknown:
            raise AdapterError(
                f"module {unknown[0]}: the clients trained A, and the A that they started from is "
                "not known; give carried=last.carried of the last round's result (in Python only), "
                "or leave `budget` out"
            )
        return replace(known, masks=_chosen(scores[str(known.fixed)], self.budget))

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


def _chosen(scores: Mapping[str, tuple[tuple[int, ...], Tensor]], budget: int) -> dict[str, Tensor]:
    """Of every client the ranks with the largest scores, ``budget`` times its modules; of equal
    scores the first ones.
    """
    import torch

    masks = {module: torch.zeros_like(row, dtype=torch.bool) for module, (_, row) in scores.items()}
    places: dict[int, list[tuple[str, int]]] = {}
    for module, (clients, _) in scores.items():
        for place, client in enumerate(clients):
            places.setdefault(client, []).append((module, place))
    for mine in places.values():
        values = torch.stack([scores[module][1][place] for module, place in mine])
        best = values.flatten().argsort(descending=True, stable=True)[: budget * len(mine)]
        kept = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        kept[best] = True
        for (module, place), row in zip(mine, kept.view_as(values), strict=True):
            masks[module][place] = row
    return masks
