"""Flower: bit-exact messages, the local engine's own bits, and clients that fail."""

import dataclasses
import itertools
import json
import math
import re
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fedlora_kernels as flk
from integration.compare import choose, compare
from integration.engine import LocalEngine
from integration.federation import Federation
from integration.server import Server
from integration.settings import from_preset
from integration.tasks import stdlib_chapters

pytest.importorskip("flwr", reason="needs Flower: pip install 'flwr[simulation]==1.41.*'")

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from integration.flower import client as client_app
from integration.flower import messages
from integration.flower.engine import FlowerEngine


@pytest.fixture(scope="module", autouse=True)
def parse_the_library_once():
    """The strings are the same for every run of this process."""
    found = stdlib_chapters.strings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_chapters, "strings", lambda: found)
        patch.setattr("integration.compare.write_report", lambda _: None)  # drawn elsewhere
        for name in ("run_id", "node_id", "task_id"):  # what Flower sets in its own processes
            patch.setattr(TaskIdentity, f"_{name}", 1)
        yield


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
                record = message.content.config_records["round"]
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


def take(out, settings, engine=LocalEngine, **more):
    """Run all rules of the settings; the lines of metrics.jsonl."""
    rules, _ = choose(settings, explicit=True)
    compare(settings, rules, out, Console(quiet=True), engine=engine, **more)
    return lines(out)


def adapters(out):
    """Every adapter below a folder, by its path."""
    found = sorted(out.rglob("adapter_model.safetensors"))
    return {str(path.relative_to(out)): load_file(path) for path in found}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for path, tensors in one.items():
        assert tensors.keys() == other[path].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other[path][key]), f"{path} {key}"


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_tensors_travel_bit_for_bit(dtype):
    patterns = torch.randint(-128, 128, (7, 5, dtype.itemsize), dtype=torch.int8)  # NaN among them
    tensors = {
        "any bits": patterns.view(dtype).squeeze(-1),
        "not contiguous": torch.randn(6, 4).to(dtype).T,
        "scalar": torch.tensor(1 / 3, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    found = messages.read_tensors(messages.write_tensors(tensors))
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        sent = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), sent)


def test_flowers_own_averaging_cannot_read_the_arrays():
    array = messages.write_tensors({"b": torch.ones(2, dtype=torch.bfloat16)})["b"]
    with pytest.raises(TypeError):
        array.numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat15"}, "b is bfloat15 in raw.le; expected raw.le and one of float64"),
        ({"stype": "numpy.ndarray"}, "b is float32 in numpy.ndarray"),
        ({"shape": (2, 3)}, r"b has 16 bytes; float32 of shape \[2, 3\] has 24"),
    ],
)
def test_records_that_hold_no_tensors_say_why(change, message):
    array = {"dtype": "float32", "shape": (2, 2), "stype": "raw.le", "data": bytes(16)} | change
    with pytest.raises(messages.MessageError, match=message):
        messages.read_tensors(ArrayRecord({"b": Array(**array)}))


def test_moments_travel(tmp_path):
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 11: {}}
    found = messages.read_moments(messages.write_moments(moments), torch.device("cpu"))
    assert found.keys() == {0}, "a parameter without a state needs none"
    assert torch.equal(found[0]["step"], moments[0]["step"])
    assert torch.equal(found[0]["exp_avg"], moments[0]["exp_avg"])


# ---- the same bits as the local engine -----------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rules": ("florist", "ffa")}, id="florist, ffa"),
        pytest.param({"rules": ("fedsa",)}, id="fedsa: every client its own B"),
        pytest.param({"rules": ("flora",), "rounds": 3}, id="flora: merged into the nodes' bases"),
        pytest.param({"rules": ("flexlora", "flora"), "ranks": (4, 2, 8)}, id="unequal ranks"),
        pytest.param(
            {"rules": ("fedit", "flora_na"), "optimizer_state": "keep", "rounds": 3},
            id="moments stay on the nodes",
        ),
        pytest.param(
            {"rules": ("flora",), "clients": 6, "participation": 0.5, "rounds": 3, "seeds": 2},
            id="half of the clients a round, two seeds",
        ),
    ],
)
def test_flower_gives_the_bits_of_the_local_engine(tmp_path, changes):
    settings = tiny(**changes)
    expected = take(tmp_path / "local", settings)
    found = take(tmp_path / "flower", settings, on(Nodes(settings.clients), settings))
    assert found == expected
    assert_same_bits(adapters(tmp_path / "flower"), adapters(tmp_path / "local"))


def test_a_merged_update_is_sent_once(tmp_path):
    settings = tiny(rules=("flora",), rounds=3)
    nodes = Nodes(3)
    take(tmp_path, settings, on(nodes, settings))
    sent = [sum("merged/" in key for key in m.content.array_records) for m in nodes.sent]
    assert sent == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_a_node_that_was_started_again_gets_all_merged_updates(tmp_path):
    """Its new node has another id and holds nothing; the round's bits stay the local engine's."""
    settings = tiny(rules=("flora",), rounds=3)

    class Restarted(Nodes):
        def push_messages(self, messages):
            if len(self.sent) == 6 and messages and messages[0].metadata.message_type == "train":
                self.contexts[messages[1].metadata.dst_node_id].state = RecordDict()
            return super().push_messages(messages)

        def get_node_ids(self):
            if len(self.sent) == 3 and len(self.contexts) == 3:
                del self.contexts[self.node(0)]
                self.start(0)
            return super().get_node_ids()

    nodes = Restarted(3)
    found = take(tmp_path / "flower", settings, on(nodes, settings))
    assert [entry["clients"] for entry in found] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    assert found[2]["lost"] == {
        "1": "its node reports: this node holds 0 of the first 1 merged updates; send them all"
    }
    local = take(tmp_path / "local", tiny(rules=("flora",), rounds=3))
    assert found[:2] == local[:2]


def test_a_run_on_flower_is_resumed(tmp_path):
    """Killed between two rounds: the nodes stay up and hold what they were sent."""
    settings = tiny(rules=("flora", "fedsa"), rounds=3)
    take(tmp_path / "unbroken", settings)
    nodes = Nodes(3)

    class Killed(FlowerEngine):
        def train(self, server, number, on_step):
            if number == 3 and server.rule.name == "flora":
                raise KeyboardInterrupt
            return super().train(server, number, on_step)

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        take(out, settings, partial(Killed, nodes, settings))
    take(out, settings, on(nodes, settings), resume=True)
    assert lines(out) == lines(tmp_path / "unbroken")
    assert_same_bits(adapters(out), adapters(tmp_path / "unbroken"))


# ---- clients that fail ---------------------------------------------------------------------------


def changed(**figures):
    """A reply with other figures."""

    def change(reply):
        for name, value in figures.items():
            reply.content["figures"][name] = value
        return reply

    return change


def with_tensor(change):
    """A reply whose first tensor goes through `change`; None takes it away."""

    def made(reply):
        tensors = messages.read_tensors(reply.content["update"])
        first = sorted(tensors)[0]
        new = change(tensors.pop(first))
        if new is not None:
            tensors[first] = new
        reply.content["update"] = messages.write_tensors(tensors)
        return reply

    return made


def renamed(reply):
    tensors = messages.read_tensors(reply.content["update"])
    reply.content["update"] = messages.write_tensors(tensors | {"virus": torch.zeros(1)})
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
        (lambda _: None, r"no reply within 0.3 s"),
        (raised, r"its node reports: out of memory"),
        (changed(client=2), r"its reply is that of client 2.0"),
        (changed(examples=0), r"examples must be a whole number of 1 or more, found 0.0"),
        (changed(examples=1.5), r"examples must be .* found 1.5"),
        (changed(loss=math.nan), r"loss and seconds must be finite, found None and "),
        (changed(seconds=-1.0), r"loss and seconds must be finite, found .* and -1.0"),
        (without("figures"), r"its reply is that of client None"),
        (without("update"), r"its update lacks \S+lora_A\S+ and 23 more"),
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
    server = Server(flk.rules()["florist"], federation.model, federation.clients, settings)
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
