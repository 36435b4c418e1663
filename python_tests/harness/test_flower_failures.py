"""Flower's nodes that fail: their client leaves the round, the reason is told, the rest goes on."""

import math
import re

import pytest
import torch

import fedlora_kernels as flk
from integration.rounds.federation import Federation
from integration.rounds.server import Server

pytest.importorskip("flwr", reason="needs Flower: the extra flower")

from flwr.app import Context, Error, Message, RecordDict
from nodes import Nodes, on, take, tiny

from fedlora_kernels.interop.flower import from_arrays, to_arrays
from integration.flower import client as client_app
from integration.flower.engine import FlowerEngine


@pytest.fixture(autouse=True)
def drawn_elsewhere(monkeypatch):
    """No report of these runs."""
    monkeypatch.setattr("integration.compare.write_report", lambda _: None)


def changed(**figures):
    """A reply with other figures."""

    def change(reply):
        for name, value in figures.items():
            reply.content["metrics"][name] = value
        return reply

    return change


def with_tensor(change):
    """A reply whose first tensor goes through `change`; None takes it away."""

    def made(reply):
        tensors = from_arrays(reply.content["arrays"])
        first = sorted(tensors)[0]
        new = change(tensors.pop(first))
        if new is not None:
            tensors[first] = new
        reply.content["arrays"] = to_arrays(tensors)
        return reply

    return made


def renamed(reply):
    tensors = from_arrays(reply.content["arrays"])
    reply.content["arrays"] = to_arrays(tensors | {"virus": torch.zeros(1)})
    return reply


def without(name):
    def change(reply):
        del reply.content[name]
        return reply

    return change


def raised(reply):
    return Message(Error(2, "out of\nmemory"), reply_to=reply)


@pytest.fixture(scope="module")
def federation():
    return Federation.build(tiny())


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda _: None, "no reply within the time limit"),
        (raised, r"its node reports: out of memory"),
        (changed(client=2), r"its reply is that of client 2.0"),
        (
            changed(**{"num-examples": 0}),
            r"examples must be a whole number of 1 or more, found 0.0",
        ),
        (changed(**{"num-examples": 1.5}), r"examples must be .* found 1.5"),
        (changed(loss=math.nan), r"loss and seconds must be finite, found None and "),
        (changed(seconds=-1.0), r"loss and seconds must be finite, found .* and -1.0"),
        (changed(**{"num-examples": math.nan}), r"examples must be .* found nan"),
        (without("metrics"), "its reply's MetricRecord has no number 'num-examples'"),
        (without("arrays"), "its reply has 0 ArrayRecords, expected one"),
        (with_tensor(lambda _: None), r"its update lacks \S+lora_A\S+"),
        (with_tensor(lambda x: x[:1]), r"lora_A\S+ is torch.float32 \[1, 384\], expected .*\[8,"),
        (with_tensor(lambda x: x.bfloat16()), r"is torch.bfloat16 .* expected torch.float32"),
        (with_tensor(lambda x: x.fill_(math.inf)), r"lora_A\S+ holds NaN or infinite values"),
        (renamed, r"its update has the unknown virus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_reply_that_cannot_be_used_says_why(federation, break_, reason):
    settings = federation.settings
    nodes = Nodes(3, broken={(1, 1): break_})
    engine = FlowerEngine(nodes, settings, federation, reply_within=0.3)
    server = Server(flk.rules.make("florist"), federation.model, federation.clients, settings)
    updates = engine.train(server, 1, lambda: None)
    assert [update.client for update in updates] == [0, 2]
    assert list(engine.lost) == [1]
    assert re.search(reason, engine.lost[1]), engine.lost


def test_a_client_that_fails_leaves_the_round_with_the_rest(tmp_path):
    settings = tiny(rules=("florist",), rounds=2)
    nodes = Nodes(3, broken={(1, 1): raised})
    first, second = take(tmp_path, settings, on(nodes, settings))
    assert first["clients"] == [0, 2]
    assert first["lost"] == {"1": "its node reports: out of memory"}
    assert second["clients"] == [0, 1, 2], "it is asked again in the next round"
    assert second["lost"] == {}


def test_a_client_without_a_node_leaves_the_round_with_the_rest(tmp_path):
    settings = tiny(rules=("fedsa",), rounds=1)
    (entry,) = take(tmp_path, settings, on(Nodes(2), settings))
    assert entry["clients"] == [0, 1]
    assert entry["lost"] == {"2": "no node answers for it"}


def test_a_late_reply_is_not_taken_for_the_next_rounds(tmp_path):
    """The reply of round 1 arrives in round 2, beside the right one."""
    settings = tiny(rules=("florist",), rounds=2)
    late = []

    class Late(Nodes):
        def pull_messages(self, message_ids):
            return late * (len(self.sent) > 3) + super().pull_messages(message_ids)

    def hold(reply):
        late.append(reply)

    found = take(tmp_path, settings, on(Late(3, broken={(1, 1): hold}), settings))
    assert [entry["clients"] for entry in found] == [[0, 2], [0, 1, 2]]


def test_a_round_without_any_client_is_an_error(tmp_path):
    settings = tiny(rules=("florist",), rounds=1, clients=2)
    nodes = Nodes(2, broken={(k, 1): raised for k in range(2)})
    said = "round 1 has no client left: client 0: its node reports: out of memory; client 1: its"
    with pytest.raises(RuntimeError, match=said):
        take(tmp_path, settings, on(nodes, settings))


def test_nodes_need_their_number():
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    message.metadata.__dict__["_message_id"] = "1"
    with pytest.raises(ValueError, match="--node-config 'partition-id=NUMBER'"):
        client_app.who(message, Context(0, 1, {}, RecordDict(), {}))
