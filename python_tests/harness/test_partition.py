"""Dirichlet split: every example once, no empty client, decided by its arguments alone."""

from collections import Counter

import pytest

from integration.rounds.partition import dirichlet
from integration.settings import SettingsError

LABELS = [position % 8 for position in range(997)]


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
@pytest.mark.parametrize("clients", [1, 3, 8, 64])
def test_every_example_belongs_to_one_client(alpha, clients):
    parts = dirichlet(LABELS, clients, alpha, seed=0)
    assert len(parts) == clients
    assert all(parts), "a client is empty"
    assert sorted(position for part in parts for position in part) == list(range(len(LABELS)))


def test_the_seed_decides():
    assert dirichlet(LABELS, 8, 0.5, seed=3) == dirichlet(LABELS, 8, 0.5, seed=3)
    assert dirichlet(LABELS, 8, 0.5, seed=3) != dirichlet(LABELS, 8, 0.5, seed=4)


def test_small_alpha_is_uneven_and_large_alpha_is_even():
    """Share of a client's largest class: near 1 for alpha -> 0, near 1/8 for alpha -> infinity."""

    def largest_share(alpha):
        parts = dirichlet(LABELS, 8, alpha, seed=0)
        return max(
            max(Counter(LABELS[position] for position in part).values()) / len(part)
            for part in parts
        )

    assert largest_share(0.05) > 0.6
    assert largest_share(1e4) < 0.2


def test_the_minimum_is_kept_where_dirichlet_leaves_clients_out():
    parts = dirichlet([0] * 40, 8, 0.01, seed=1, minimum=5)
    assert [len(part) for part in parts] == [5] * 8


def test_too_few_examples_are_an_error():
    with pytest.raises(SettingsError, match="3 training examples do not give 4 clients 1 each"):
        dirichlet([0, 1, 2], 4, 0.5, seed=0)
