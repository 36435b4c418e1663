"""Which client holds which training examples, which clients take part, what each is tested on.

dirichlet   every label in proportions drawn from Dirichlet(alpha)
iid         every label in equal shares
by-label    sorted by label and cut into equal pieces: a client holds one or two labels
by-topic    client k holds the labels k, k + clients, ...: all of a topic, and no other's
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from integration.settings import Settings, SettingsError
from integration.settings.seeds import CLIENT_TEST, PARTICIPANTS, generator


def partition(labels: Sequence[int], settings: Settings) -> list[list[int]]:
    """One ascending list of positions in `labels` per client; every position once, no list empty.

    Raises SettingsError where there are too few examples, or too few topics.
    """
    clients, seed = settings.clients, settings.seed
    if settings.partition == "dirichlet":
        return dirichlet(labels, clients, settings.alpha, seed)
    if len(labels) < clients:
        raise SettingsError(f"{len(labels)} training examples do not give {clients} clients 1 each")
    values = np.asarray(labels)
    shuffled = np.random.default_rng([seed, clients]).permutation(len(values))
    if settings.partition == "iid":
        order = shuffled[np.argsort(values[shuffled], kind="stable")]
        parts = [order[client::clients] for client in range(clients)]
    elif settings.partition == "by-label":
        order = shuffled[np.argsort(values[shuffled], kind="stable")]
        parts = np.array_split(order, clients)
    else:
        topics = np.unique(values)
        if len(topics) < clients:
            raise SettingsError(
                f"by-topic gives every client a topic of its own; found {len(topics)} topics for "
                f"{clients} clients"
            )
        owner = {topic: place % clients for place, topic in enumerate(topics.tolist())}
        owners = np.array([owner[value] for value in values.tolist()])
        parts = [np.flatnonzero(owners == client) for client in range(clients)]
    return [sorted(int(position) for position in part) for part in parts]


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


def participants(settings: Settings, round_number: int) -> list[int]:
    """The clients of a round, ascending: a draw decided by (seed, round), at least one client."""
    count = max(1, round(settings.participation * settings.clients))
    if count == settings.clients:
        return list(range(count))
    drawn_from = generator(settings.seed, round_number, PARTICIPANTS)
    order = torch.randperm(settings.clients, generator=drawn_from)
    return sorted(order[:count].tolist())


def own_tests(
    held: Sequence[int], tests: Sequence[int], size: int, settings: Settings, client: int
) -> list[int]:
    """`size` positions among the test labels, drawn without repetition in the client's proportions.

    A test example's chance is that of its label among the labels `held` by the client. Fewer than
    `size` where the test split has no more examples of the client's labels.
    """
    if not size:
        return []
    values = torch.tensor(list(tests))
    most = max(int(values.max()), *held) + 1
    share = torch.bincount(torch.tensor(list(held)), minlength=most).double()
    there = torch.bincount(values, minlength=most).double()
    chance = (share / there.clamp(min=1))[values]
    possible = int((chance > 0).sum())
    if not possible:
        return []
    drawn_from = generator(settings.seed, client, CLIENT_TEST)
    drawn = torch.multinomial(chance, min(size, possible), generator=drawn_from)
    return sorted(drawn.tolist())
