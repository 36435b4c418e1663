"""Robust: what a robust rule states about itself, and its function from inner products to weights.

A robust rule is a frozen dataclass in a file of its own. It looks at the clients' updates as points
(:class:`Updates`) and says how much each counts. The aggregation rule then does its work with these
weights. What a client sends beside its update (heads, biases, the magnitudes of DoRA) is not looked
at: it counts as the update does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora_kernels._options import Named, Option, option
from fedlora_kernels.adapters.error import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates
    from fedlora_kernels.rules import Rule

__all__ = ["ClientWeight", "Option", "Robust", "Weighing", "option"]


@dataclass(frozen=True)
class ClientWeight:
    """How one client counts."""

    name: str
    """the folder as typed, or client and number"""
    norm: float
    """||dW_k|| over all modules, as it was sent"""
    given: float
    """its share of the weights as they were given"""
    weight: float
    """w_k, its share of the robust weights"""
    scale: float
    """c_k, what its update is multiplied with"""


@dataclass(frozen=True)
class Weighing:
    """What a robust rule came to."""

    robust: Robust
    clients: tuple[ClientWeight, ...]

    @property
    def weights(self) -> list[float]:
        """w_k of all clients."""
        return [client.weight for client in self.clients]

    @property
    def scales(self) -> list[float]:
        """c_k of all clients."""
        return [client.scale for client in self.clients]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.robust.name,
            "options": {name: getattr(self.robust, name) for name in self.robust.options()},
            "clients": [asdict(client) for client in self.clients],
        }


@dataclass(frozen=True)
class Robust(Named):
    """A robust rule. Subclasses live in ``robust/<name>.py``."""

    noun = "robust rule"
    title: ClassVar[str]
    paper: ClassVar[str]
    """arXiv number, or another name"""
    published: ClassVar[int]
    """year"""
    stops: ClassVar[str]
    """against what it helps, in words"""
    scales: ClassVar[bool] = False
    """updates are scaled, and the weights stay as they are"""
    grades: ClassVar[bool] = False
    """clients that are not left out count by other weights than those that were given"""

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """How much each client counts.

        Args:
            updates: of the clients whose weight is not 0.
            weights: w_k > 0 as given, [K] float64.

        Returns:
            The robust weights [K] >= 0, of any positive sum.

        Raises:
            AdapterError: there are too few clients.
        """
        raise NotImplementedError(f"robust rule {self.name!r} defines no solve()")

    def factors(self, updates: Updates) -> Tensor:
        """What each update is multiplied with, c_k [K]: 1 where the rule does not scale."""
        return updates.norms.new_ones(len(updates))

    def weigh(self, updates: Updates, weights: Tensor, names: Sequence[str]) -> Weighing:
        """How all clients count. A client of weight 0 takes no part, and keeps it.

        Args:
            updates: of all clients.
            weights: w_k [K] float64, summing to 1.
            names: what the clients are called.

        Raises:
            AdapterError: there are too few clients of positive weight.
        """
        taking_part = weights.nonzero().flatten().tolist()
        points = updates.of(taking_part)
        robust_weights = self.solve(points, weights[taking_part])
        shares = (robust_weights / robust_weights.sum()).tolist()
        counted = dict(zip(taking_part, shares, strict=True))
        factors = dict(zip(taking_part, self.factors(points).tolist(), strict=True))
        rows = zip(names, updates.norms.tolist(), weights.tolist(), strict=True)
        return Weighing(
            self,
            tuple(
                ClientWeight(name, norm, given, counted.get(k, 0.0), factors.get(k, 1.0))
                for k, (name, norm, given) in enumerate(rows)
            ),
        )

    def refuse(self, rule: Rule) -> None:
        """Refuse an aggregation rule that the weights would not reach.

        Raises:
            ValueError: says why.
        """
        if self.scales and rule.sends == "a":
            raise ValueError(
                f"robust rule {self.name!r} scales B, and rule {rule.name!r} aggregates A alone; "
                "choose another robust rule"
            )
        if self.grades and rule.reweighs:
            raise ValueError(
                f"robust rule {self.name!r} gives each client a weight, and rule {rule.name!r} "
                "with its options weighs clients by itself; choose other options, or another "
                "robust rule"
            )

    def attackers_among(self, clients: int, asked: int | None, most: int, need: str) -> int:
        """How many attackers are assumed: as asked, or the most that so many clients allow.

        Args:
            clients: how many there are.
            asked: the option ``attackers``.
            most: how many the robust rule can bear among so many clients.
            need: how many clients it needs, in words.

        Raises:
            AdapterError: there are too few clients.
        """
        count = max(most, 0) if asked is None else asked
        if most < count:
            raise AdapterError(
                f"{clients} clients of positive weight: {self.name} with attackers={count} needs "
                f"{need}"
            )
        return count


def only(weights: Tensor, kept: Tensor) -> Tensor:
    """The weights of these clients, by their indices; 0 for the others."""
    robust_weights = weights.new_zeros(weights.shape)
    robust_weights[kept] = weights[kept]
    return robust_weights


def not_negative(**values: int | None) -> None:
    """Raise ValueError for an option that is given and negative."""
    for name, value in values.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, found {value}")
