"""FlowerEngine: one rule's way to clients that are Flower nodes.

It finds the nodes of a round's participants and brings them the messages of ComparisonStrategy, and
the replies back to it. What does not come back usable leaves the round with the rest; `lost` says
for every such client why, and the metrics carry it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from integration.flower.strategy import ComparisonStrategy, number_in
from integration.model.trainer import LocalTrainer
from integration.rounds.client import Update
from integration.rounds.engine import NEW_MOMENTS
from integration.rounds.federation import Federation
from integration.rounds.partition import participants
from integration.rounds.server import Server
from integration.settings import Settings

POLL = 0.2
"""Seconds between two looks for replies."""

REPLY_WITHIN = 3600.0
"""Seconds that a client has for a round; later replies are not looked at."""

NODES_WITHIN = 60.0
"""Seconds to wait for the nodes of all clients of a run's first round."""


class FlowerEngine:
    """A round's messages to the nodes and the usable updates back.

    Attributes:
        lost: client -> why it is not in the last round, of the participants that are not.
        transfer_ms: what the last round's exchange took beyond its longest training: packing,
            the network, waiting for a free worker.
    """

    def __init__(
        self,
        grid: Grid,
        settings: Settings,
        federation: Federation,
        trainer: LocalTrainer | None = None,
        *,
        reply_within: float = REPLY_WITHIN,
        nodes_within: float = NODES_WITHIN,
    ) -> None:
        """`settings` are the run's; `federation` is that of one of its seeds."""
        self.lost: dict[int, str] = {}
        self.transfer_ms = 0.0
        self._grid = grid
        self._settings = json.dumps(dataclasses.asdict(settings), allow_nan=False)
        self._federation = federation
        self._reply_within = reply_within
        self._nodes_within = nodes_within
        self._nodes: dict[int, int] = {}
        self._strategy: ComparisonStrategy | None = None

    def train(self, server: Server, number: int, on_step: Callable[[], None]) -> list[Update]:
        """The usable updates of round `number`, in the order of the clients' numbers.

        Raises RuntimeError where no client is left.
        """
        federation = self._federation
        if self._strategy is None:
            self._strategy = ComparisonStrategy(server, federation)
        strategy = self._strategy
        asked = participants(federation.settings, number)
        self._find(asked)
        there = {self._nodes[k]: k for k in asked if k in self._nodes}
        strategy.exchange.ask(number, there)
        config = ConfigRecord(
            {
                "settings": self._settings,
                "seed": federation.settings.seed,
                "learning-rate": federation.settings.learning_rate,
                "label": federation.label,
                "rule": server.rule.name,
                "number": number,
                "merged": len(server.merged),
            }
        )
        messages = list(strategy.configure_train(number, ArrayRecord(), config, self._grid))
        begun = time.perf_counter()
        replies = self._exchange(messages, self._reply_within)
        waited = time.perf_counter() - begun
        updates = strategy.updates(replies)
        gone = {k: "no node answers for it" for k in asked if k not in there.values()}
        self.lost = dict(sorted({**gone, **strategy.lost_clients}.items()))
        for update in updates:
            for _ in range(federation.clients[update.client].steps(federation.settings)):
                on_step()
        if not updates:
            why = "; ".join(f"client {k}: {reason}" for k, reason in self.lost.items())
            raise RuntimeError(f"round {number} has no client left: {why}")
        self.transfer_ms = 1e3 * max(0.0, waited - max(update.seconds for update in updates))
        return updates

    def take(self, updates: list[Update]) -> None:
        """Only note who is missing: what belongs to a client stays on its node."""
        there = {update.client for update in updates}
        asked = participants(self._federation.settings, 1)
        self.lost = {k: "lost in the rules' common first round" for k in asked if k not in there}
        self.transfer_ms = 0.0

    def state(self) -> dict[str, Any]:
        """Nothing: the nodes keep their own, for as long as the run lasts."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Go on with nodes that hold nothing: Flower gives every run new contexts on its nodes."""
        keep = self._federation.settings.optimizer_state == "keep"
        return [NEW_MOMENTS] if keep else []

    # ---- nodes ---------------------------------------------------------------------------------

    def _find(self, asked: Sequence[int]) -> None:
        """Ask nodes that are new which client they are; wait for missing ones in the first round.

        A client whose node was started again is found under its new node.
        """
        until = time.monotonic() + (0.0 if self._nodes else self._nodes_within)
        while True:
            here = set(self._grid.get_node_ids())
            self._nodes = {k: node for k, node in self._nodes.items() if node in here}
            new = here - set(self._nodes.values())
            questions = [
                Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
                for node in new
            ]
            for reply in self._exchange(questions, self._nodes_within):
                number = None if reply.has_error() else number_in(reply.content, "client", "number")
                if number is not None and 0 <= number < len(self._federation.clients):
                    self._nodes[int(number)] = reply.metadata.src_node_id
            if all(k in self._nodes for k in asked) or time.monotonic() > until:
                return
            time.sleep(POLL)

    # ---- messages ------------------------------------------------------------------------------

    def _exchange(self, messages: Sequence[Message], within: float) -> list[Message]:
        """The replies that came in time. Flower's own `send_and_receive` looks every 3 seconds."""
        waiting = set(filter(None, self._grid.push_messages(messages)))
        replies = []
        until = time.monotonic() + within
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.remove(reply.metadata.reply_to_message_id)
                    replies.append(reply)
            if time.monotonic() > until:
                break
            if waiting:
                time.sleep(POLL)
        return replies
