"""Attacks: a round of honest clients, some of which were replaced by attackers.

The honest clients share most of their update; noise makes each its own. Distances and bounds are
computed from the dense updates in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from federation import SIZES, Drawn, Federation, federation
from matrices import normal

Client = dict[str, Drawn]
Attack = Callable[[Client, torch.Generator], Client]

RANK = 4
OWN = 0.2
"""What each client has alone, as a share of what they have in common."""


def _scaled(client: Client, factor: float) -> Client:
    return {name: Drawn(factor * x.b, x.a, x.scaling) for name, x in client.items()}


def _noise(client: Client, generator: torch.Generator) -> Client:
    """Gaussian factors, ten times as large as the honest ones."""
    return {
        name: Drawn(10 * normal(generator, *x.b.shape), normal(generator, *x.a.shape), x.scaling)
        for name, x in client.items()
    }


def _colluding(client: Client, generator: torch.Generator) -> Client:
    """One update for all of them, in another direction and as large as an honest one."""
    fixed = torch.Generator().manual_seed(99)
    return {
        name: Drawn(normal(fixed, *x.b.shape), normal(fixed, *x.a.shape), x.scaling)
        for name, x in client.items()
    }


ATTACKS: dict[str, Attack] = {
    "flip signs": lambda client, generator: _scaled(client, -1.0),
    "scale by 100": lambda client, generator: _scaled(client, 100.0),
    "flip and scale by 100": lambda client, generator: _scaled(client, -100.0),
    "send noise": _noise,
    "collude": _colluding,
}


@dataclass(frozen=True)
class Attacked:
    """A round, and which of its clients attack."""

    round_: Federation
    attackers: tuple[int, ...]

    @cached_property
    def points(self) -> torch.Tensor:
        """The clients' updates, [K,P] float64."""
        return points(self.round_)

    @cached_property
    def shares(self) -> torch.Tensor:
        """The weights as given, summing to 1."""
        weights = torch.tensor(self.round_.weights, dtype=torch.float64)
        return weights / weights.sum()

    @property
    def honest(self) -> list[int]:
        return [k for k in range(len(self.points)) if k not in self.attackers]

    @property
    def share(self) -> float:
        """phi: the attackers' share of the weights."""
        return float(self.shares[list(self.attackers)].sum())

    @cached_property
    def mean(self) -> torch.Tensor:
        """h, the honest clients' weighted mean."""
        own = self.shares[self.honest]
        return (own / own.sum()) @ self.points[self.honest]

    @cached_property
    def radius(self) -> float:
        """r: the largest distance of an honest update from h."""
        return float((self.points[self.honest] - self.mean).norm(dim=1).max())

    @cached_property
    def diameter(self) -> float:
        """D: the largest distance between two honest updates."""
        return float(torch.cdist(self.points[self.honest], self.points[self.honest]).max())


def points(round_: Federation) -> torch.Tensor:
    """Every client's update of all modules as one row, [K,P] float64; zeros where it has none."""
    sizes = {
        name: (item.b.shape[0], item.a.shape[1])
        for client in round_.drawn
        for name, item in client.items()
    }
    rows = []
    for client in round_.drawn:
        parts = [
            client[name].update() if name in client else torch.zeros(*size, dtype=torch.float64)
            for name, size in sorted(sizes.items())
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def attacked(
    attack: str, attackers: int, clients: int = 9, *, common_a: bool = False, seed: int = 0
) -> Attacked:
    """A round of which the first clients attack."""
    generator = torch.Generator().manual_seed(seed)
    common = {
        name: (normal(generator, m, RANK), normal(generator, RANK, n))
        for name, (m, n) in SIZES.items()
    }
    drawn: list[Client] = []
    for k in range(clients):
        client = {}
        for name, (b, a) in common.items():
            own_b, own_a = normal(generator, *b.shape), normal(generator, *a.shape)
            a_k = a if common_a else a + OWN * own_a
            client[name] = Drawn((b + OWN * own_b).float(), a_k.float(), 2.0)
        if k < attackers:
            client = {
                name: Drawn(x.b.float(), common[name][1].float() if common_a else x.a.float(), 2.0)
                for name, x in ATTACKS[attack](client, generator).items()
            }
        drawn.append(client)
    weights = [float(2 + k % 3) for k in range(clients)]
    return Attacked(federation(drawn, weights), tuple(range(attackers)))
