"""Which client holds which training examples: a Dirichlet split by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from integration.settings import SettingsError


def dirichlet(
    labels: Sequence[int], clients: int, alpha: float, seed: int, minimum: int = 1
) -> list[list[int]]:
    """Give every example to one client, class by class in proportions drawn from Dirichlet(alpha).

    Small `alpha` (0.1) gives every client a few classes only, large `alpha` (100) gives all clients
    the same mixture. Clients left with fewer than `minimum` examples take the last examples of the
    largest client. The result depends on the arguments only.

    Returns one ascending list of positions in `labels` per client.
    Raises SettingsError where there are fewer than `clients * minimum` examples.
    """
    if len(labels) < clients * minimum:
        raise SettingsError(
            f"{len(labels)} training examples do not give {clients} clients {minimum} each"
        )
    generator = np.random.default_rng([seed, clients])
    held: list[list[int]] = [[] for _ in range(clients)]
    values = np.asarray(labels)
    for label in np.unique(values):
        positions = generator.permutation(np.flatnonzero(values == label))
        shares = generator.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(positions)).astype(int)
        for client, part in zip(held, np.split(positions, cuts), strict=True):
            client.extend(int(position) for position in part)
    while len(smallest := min(held, key=len)) < minimum:
        smallest.append(max(held, key=len).pop())
    return [sorted(client) for client in held]
