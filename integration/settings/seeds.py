"""Where randomness comes from: every draw is decided by (run, round, client, ...) and nothing else.

No generator lives longer than one use, so a run that is continued after a crash has no random state
to restore, and clients may train in any order, or on other machines.
"""

from __future__ import annotations

import torch

PARTICIPANTS = 1_000_001
"""Marks the draw of a round's participants; client numbers stay below it."""

CLIENT_TEST = 1_000_002
"""Marks the draw of a client's own test examples."""

BASE = 1_000_003
"""Decides random base weights, heads and VeRA's projections. They belong to the model, as
pretrained ones would: runs of different seeds start from the same."""


def seed(*parts: int) -> int:
    """One number for one (run, round, client, ...)."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return mixed


def generator(*parts: int) -> torch.Generator:
    """A generator of its own for one (run, round, client, ...), on the CPU."""
    return torch.Generator().manual_seed(seed(*parts))
