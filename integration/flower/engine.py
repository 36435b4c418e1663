"""FlowerEngine: one rule's way to clients that are Flower nodes.

A round's participants get their start, the clients answer within a time limit, and what does not
come back usable leaves the round with the rest: nodes that are gone, replies that are late or
errors, tensors of other names, shapes or dtypes than were sent, numbers that are not finite.
`lost` says for every such client why; the metrics carry it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

import fedlora_kernels as flk
from fedlora_kernels.interop.exchange import difference
from integration.flower.messages import read_tensors, write_adapter
from integration.model.serialize import deserialize
from integration.model.trainer import LocalTrainer
from integration.rounds.client import Client, Update
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
        self._merged: dict[int, int] = {}

    def train(self, server: Server, number: int, on_step: Callable[[], None]) -> list[Update]:
        """The usable updates of round `number`, in the order of the clients' numbers.

        Raises RuntimeError where no client is left.
        """
        federation, trains = self._federation, server.trains(number)
        asked = participants(federation.settings, number)
        self._find(asked)
        self.lost = {k: "no node answers for it" for k in asked if k not in self._nodes}
        starts = {k: server.start(federation.clients[k], number) for k in asked if k in self._nodes}
        messages = {k: self._message(k, starts[k], server, number, trains) for k in starts}
        begun = time.perf_counter()
        replies = self._exchange(messages, self._reply_within)
        waited = time.perf_counter() - begun
        updates = []
        for k, start in starts.items():
            update = self._update(federation.clients[k], start, replies.get(k), trains)
            if isinstance(update, str):
                self.lost[k] = update
                self._merged.pop(k, None)  # whatever it holds: send everything next time
            else:
                self._merged[k] = len(server.merged)
                updates.append(update)
                for _ in range(federation.clients[k].steps(federation.settings)):
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
            questions = {
                node: Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
                for node in new
            }
            for node, reply in self._exchange(questions, self._nodes_within).items():
                number = None if reply.has_error() else _number(reply.content, "client", "number")
                if number is not None and 0 <= number < len(self._federation.clients):
                    self._nodes[int(number)] = node
            if all(k in self._nodes for k in asked) or time.monotonic() > until:
                return
            time.sleep(POLL)

    # ---- messages ------------------------------------------------------------------------------

    def _message(
        self, k: int, start: flk.Adapter, server: Server, number: int, trains: str
    ) -> Message:
        before = self._merged.get(k, 0)
        content = RecordDict(
            {
                "round": ConfigRecord(
                    {
                        "settings": self._settings,
                        "seed": self._federation.settings.seed,
                        "learning-rate": self._federation.settings.learning_rate,
                        "label": self._federation.label,
                        "rule": server.rule.name,
                        "number": number,
                        "trains": trains,
                        "merged-before": before,
                    }
                )
            }
        )
        write_adapter(content, "start", start)
        for place, adapter in enumerate(server.merged[before:]):
            write_adapter(content, f"merged/{place}", adapter)
        return Message(
            content,
            dst_node_id=self._nodes[k],
            message_type=MessageType.TRAIN,
            group_id=str(number),
        )

    def _exchange(self, messages: Mapping[int, Message], within: float) -> dict[int, Message]:
        """The replies that came in time, under the keys of their messages."""
        keys = list(messages)
        sent = list(self._grid.push_messages([messages[key] for key in keys]))
        waiting = {name: key for name, key in zip(sent, keys, strict=False) if name}
        replies: dict[int, Message] = {}
        until = time.monotonic() + within
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                key = waiting.pop(reply.metadata.reply_to_message_id, None)
                if key is not None:
                    replies[key] = reply
            if time.monotonic() > until:
                break
            if waiting:
                time.sleep(POLL)
        return replies

    # ---- replies -------------------------------------------------------------------------------

    def _update(
        self, client: Client, start: flk.Adapter, reply: Message | None, trains: str
    ) -> Update | str:
        """The client's update, or why its reply cannot be used."""
        if reply is None:
            return f"no reply within {self._reply_within:g} s"
        if reply.has_error():
            return f"its node reports: {' '.join(str(reply.error.reason).split())}"
        content = reply.content
        claimed = _number(content, "figures", "client")
        examples = _number(content, "figures", "examples")
        loss = _number(content, "figures", "loss")
        seconds = _number(content, "figures", "seconds")
        if claimed != client.number:
            return f"its reply is that of client {claimed}"
        if examples is None or examples < 1 or examples != int(examples):
            return f"examples must be a whole number of 1 or more, found {examples}"
        if loss is None or seconds is None or seconds < 0:
            return f"loss and seconds must be finite, found {loss} and {seconds}"
        try:
            record = content.array_records.get("update")
            tensors = {} if record is None else read_tensors(record)
        except flk.AdapterError as error:
            return str(error)
        if reason := difference(tensors, start.state_dict()):
            return reason
        serialized = {"tensors": tensors, "config": start.config}
        return Update(
            client=client.number,
            adapter=deserialize(serialized, self._federation.model.device),
            examples=int(examples),
            loss=loss,
            seconds=seconds,
            trains=trains,
        )


def _number(content: RecordDict, record: str, name: str) -> float | None:
    """A finite number of a record of metrics or configuration; None for whatever else is there."""
    found = content.get(record)
    value = None if found is None else dict(found).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
