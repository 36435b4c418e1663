"""A comparison's rounds on LoraStrategy: its messages, its reading of replies, its lost clients.

The local engine's server says what the clients start from and aggregates what they send, so that
both engines evaluate, record and resume alike. A message holds what LoraStrategy sends, and in its
config the round's settings beside "trains". A reply holds the trained adapter, under FedAvg's names
of records, and in its metrics what an Update needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

import fedlora_kernels as flk
from fedlora_kernels.interop.exchange import CONFIG, Client, Exchange, Reply
from fedlora_kernels.interop.flower import LoraStrategy
from integration.model.serialize import reread, serialize
from integration.rounds.client import Update
from integration.rounds.federation import Federation
from integration.rounds.server import Server


class ServerExchange(Exchange):
    """What the clients are sent comes from the local engine's server, and so do their ranks."""

    any_rank = False

    def __init__(self, server: Server, federation: Federation) -> None:
        super().__init__(server.rule)
        self._server = server
        self._federation = federation
        self.clients: dict[int, int] = {}
        """node -> number of the client, of the round's participants"""
        self.starts: dict[Client, flk.Adapter] = {}
        """node -> what its client starts from"""

    def ask(self, number: int, clients: Mapping[int, int]) -> None:
        """Prepare round `number`; `clients` maps nodes to the numbers of their clients."""
        self.round = number - 1
        self.merged = self._server.merged
        self.clients = dict(clients)
        self.starts = {
            node: self._server.start(self._federation.clients[k], number)
            for node, k in clients.items()
        }

    @property
    def trains(self) -> str:
        """The factors that clients train in the coming round: "both", "a" or "b"."""
        return self._server.trains(self.round + 1)

    def tensors(self, client: Client) -> dict[str, Tensor]:
        """What a client trains from, on the CPU."""
        return dict(serialize(self.starts[client])["tensors"])

    def receive(self, client: Client, reply: Reply) -> None:
        """A client's reply; ranks and scalings are those that it was sent."""
        super().receive(client, replace(reply, config=self.starts[client].config))


class ComparisonStrategy(LoraStrategy):
    """LoraStrategy whose participants, starts and aggregation are a comparison's."""

    exchange: ServerExchange

    def __init__(self, server: Server, federation: Federation) -> None:
        super().__init__(server.rule)
        self.exchange = ServerExchange(server, federation)
        self._device = federation.model.device

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message to every node that the exchange asks; none is drawn by chance."""
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, list(self.exchange.clients), MessageType.TRAIN)

    def content(self, record: RecordDict, node: int) -> RecordDict:
        """What LoraStrategy sends, and the config of the adapter to start from."""
        content = super().content(record, node)
        text = json.dumps(self.exchange.starts[node].config, allow_nan=False)
        content.config_records[self.configrecord_key][CONFIG] = text
        return content

    def read(self, node: int, content: RecordDict) -> Reply:
        """What the reply of a node says.

        Raises:
            AdapterError: as in LoraStrategy; or it is another client's, or a figure is not usable.
        """
        reply = super().read(node, content)
        client = number_in(content, "metrics", "client")
        loss = number_in(content, "metrics", "loss")
        seconds = number_in(content, "metrics", "seconds")
        if client != self.exchange.clients[node]:
            raise flk.AdapterError(f"its reply is that of client {client}")
        if not (reply.weight >= 1 and reply.weight.is_integer()):
            raise flk.AdapterError(
                f"examples must be a whole number of 1 or more, found {reply.weight}"
            )
        if loss is None or seconds is None or seconds < 0:
            raise flk.AdapterError(f"loss and seconds must be finite, found {loss} and {seconds}")
        return reply

    def updates(self, replies: Iterable[Message]) -> list[Update]:
        """The usable updates in the order of the clients' numbers, for the server to aggregate."""
        contents = self.collect(replies)
        updates = []
        for node, adapter in self.exchange.usable().items():
            figures: dict[str, Any] = dict(contents[int(node)].metric_records["metrics"])
            updates.append(
                Update(
                    client=self.exchange.clients[int(node)],
                    adapter=reread(adapter, self._device),
                    examples=int(figures[self.weighted_by_key]),
                    loss=float(figures["loss"]),
                    seconds=float(figures["seconds"]),
                    trains=self.exchange.trains,
                )
            )
        return sorted(updates, key=lambda update: update.client)

    @property
    def lost_clients(self) -> dict[int, str]:
        """Number of a client -> why it is not in the last round, of those that were asked."""
        return {self.exchange.clients[node]: why for node, why in self.lost.items()}


def number_in(content: RecordDict, record: str, name: str) -> float | None:
    """A finite number of a record of metrics or configuration; None for whatever else is there."""
    found = content.get(record)
    value = None if found is None else dict(found).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
