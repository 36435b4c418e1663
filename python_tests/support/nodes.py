"""Flower's nodes in this process, and runs on them."""

import dataclasses
import itertools
import json
from functools import partial

import flower_task  # noqa: F401
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from rich.console import Console

from integration.compare import compare
from integration.flower import client as client_app
from integration.flower.engine import FlowerEngine
from integration.rounds.engine import LocalEngine
from integration.rounds.rule import choose
from integration.settings import from_preset


def tiny(**changes):
    """Three clients, two rounds, two steps of four."""
    small = {"clients": 3, "rounds": 2, "steps": 2, "test_size": 20, "train_size": 60}
    settings = from_preset("quickstart", **(small | changes))
    return dataclasses.replace(settings, batch_size=4, max_tokens=12, shared_per_class=2)


class Nodes(Grid):
    """Flower's nodes in this process: the ClientApp itself, each node with a context of its own.

    `broken` maps (client, round) to what happens to its reply: a function of the reply that returns
    another one, or None for a reply that never comes.
    """

    def __init__(self, clients, broken=None):
        self.broken = broken or {}
        self.sent = []
        self._ids = itertools.count(1)
        self._replies = {}
        self.contexts = {}
        for number in range(clients):
            self.start(number)

    def start(self, number):
        node = 1000 + next(self._ids)
        config = {"partition-id": number}
        self.contexts[node] = Context(0, node, config, RecordDict(), {})
        return node

    def node(self, number):
        return next(n for n, c in self.contexts.items() if c.node_config["partition-id"] == number)

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        names = []
        for message in messages:
            name = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = name
            names.append(name)
            context = self.contexts[message.metadata.dst_node_id]
            try:
                reply = client_app.app(message, context)
            except Exception as error:  # what a node does with whatever its app raises
                reply = Message(Error(2, str(error)), reply_to=message)
            if message.metadata.message_type == "train":
                self.sent.append(message)
                record = message.content.config_records["config"]
                change = self.broken.get((context.node_config["partition-id"], record["number"]))
                reply = change(reply) if change else reply
            if reply is not None:
                reply.metadata.__dict__["_reply_to_message_id"] = name
                self._replies[name] = reply
        return names

    def pull_messages(self, message_ids):
        found = [name for name in message_ids if name in self._replies]
        return [self._replies.pop(name) for name in found]

    def set_run(self, run):
        raise NotImplementedError

    run = property(lambda _: None)
    create_message = send_and_receive = set_run


def on(nodes, settings, **limits):
    """The engine of a run on these nodes."""
    limits = {"reply_within": 0.5, "nodes_within": 0.5} | limits
    return partial(FlowerEngine, nodes, settings, **limits)


def lines(out):
    """metrics.jsonl without its times."""
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.endswith("_ms")} for entry in rounds]


def take(out, settings, engine=LocalEngine, console=None, **more):
    """Run all rules of the settings; the lines of metrics.jsonl."""
    rules, _ = choose(settings, explicit=True)
    compare(settings, rules, out, console or Console(quiet=True), engine=engine, **more)
    return lines(out)
