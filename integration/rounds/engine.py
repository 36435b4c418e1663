"""How the clients of a round come to train: here in one process, one after the other.

An engine takes the server's starts to the clients of a round and brings their updates back, those
of the clients that answered. It keeps what belongs to the clients alone (AdamW's moments).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from integration.model.trainer import LocalTrainer, Moments
from integration.rounds.client import Update
from integration.rounds.federation import Federation
from integration.rounds.partition import participants
from integration.rounds.server import Server

NEW_MOMENTS = (
    "AdamW's moments ended with Flower's nodes, its clients begin with new ones: what follows is "
    "right, but not bit for bit what an unbroken run would have given"
)
"""The warning of a resumed run whose clients keep their moments, but not there."""


class Engine(Protocol):
    """One rule's way to its clients."""

    lost: dict[int, str]
    """Client -> why it is not in the last round, of the participants that are not."""
    transfer_ms: float
    """What the last round's messages took beyond its longest training."""

    def train(self, server: Server, number: int, on_step: Callable[[], None]) -> list[Update]:
        """The updates of round `number`, in the order of the clients' numbers."""

    def take(self, updates: list[Update]) -> None:
        """Go on from these updates, as if the clients had trained them here."""

    def state(self) -> dict[str, Any]:
        """What the next round needs, as plain tensors and JSON types."""

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a state, also one of another engine; warnings of what it lacks."""


EngineOf = Callable[[Federation, LocalTrainer], Engine]
"""Makes the engine of one rule under one seed."""


class LocalEngine:
    """All clients in this process, on one model whose adapters are switched."""

    def __init__(self, federation: Federation, trainer: LocalTrainer) -> None:
        self._federation = federation
        self._trainer = trainer
        self._moments: dict[tuple[int, str], Moments] = {}
        self.lost: dict[int, str] = {}
        self.transfer_ms = 0.0

    def train(self, server: Server, number: int, on_step: Callable[[], None]) -> list[Update]:
        """The updates of round `number`, in the order of the clients' numbers."""
        federation, trains = self._federation, server.trains(number)
        updates = []
        for client in (federation.clients[k] for k in participants(federation.settings, number)):
            updates.append(
                client.train(
                    federation.model,
                    self._trainer,
                    federation.train,
                    server.start(client, number),
                    number,
                    federation.settings,
                    trains,
                    self._moments.get((client.number, trains)),
                    on_step,
                )
            )
        self.take(updates)
        return updates

    def take(self, updates: list[Update]) -> None:
        """Keep the moments that the updates bring."""
        for update in updates:
            if update.moments is not None:
                self._moments[update.client, update.trains] = update.moments

    def state(self) -> dict[str, Any]:
        """The clients' moments, where they keep them."""
        return {"moments": [[*key, moments] for key, moments in self._moments.items()]}

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Go on with these moments; a run that was begun on Flower has left none."""
        device = self._federation.model.device
        self._moments = {
            (number, trains): {
                place: {name: _placed(name, x, device) for name, x in moment.items()}
                for place, moment in moments.items()
            }
            for number, trains, moments in state.get("moments", ())
        }
        keep = self._federation.settings.optimizer_state == "keep"
        return [NEW_MOMENTS] if keep and "moments" not in state else []


def _placed(name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """AdamW counts its steps on the CPU."""
    return tensor if name == "step" else tensor.to(device)
