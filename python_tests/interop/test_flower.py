"""LoraStrategy: what flk.aggregate gives, through Flower's messages; who is lost, and why."""

import json
import logging
import math
import re

import pytest
import torch
from federation import draw
from vera import vera_clients

import fedlora_kernels as flk

pytest.importorskip("flwr", reason="needs Flower: pip install 'flwr[simulation]>=1.41'")

import flower_task  # noqa: F401
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedlora_kernels.interop import flower
from fedlora_kernels.interop.flower import LoraStrategy, from_arrays, raw, to_arrays

NODES = (11, 12, 13)
UNEQUAL = {"ranks": (4, 2, 6), "alphas": (4, 8, 3)}
RULES = {
    "fedit": {},
    "florist": {"energy": 0.8},
    "flora_na": {},
    "fedsa": {},
    "flexlora": {},
    "hetlora": {},
    "ffa": {},
}


class Grid:
    """Nodes that are asked and answer what a test says."""

    def __init__(self, answer, nodes=NODES):
        self.answer, self.nodes, self.sent = answer, nodes, []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, timeout=None):
        replies = []
        for index, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = str(index)
            self.sent.append(message)
            if message.metadata.message_type != "train":
                continue
            reply = self.answer(message)
            if isinstance(reply, RecordDict):
                reply = Message(reply, reply_to=message)
            if reply is not None:
                replies.append(reply)
        return replies[::-1]  # replies come in any order


def content(adapter, weight=1, **said):
    records = {
        "arrays": to_arrays(adapter.state_dict()),
        "metrics": MetricRecord({"num-examples": weight, "train_loss": 0.5}),
    }
    if said:
        records["said"] = ConfigRecord(said)
    return RecordDict(records)


def answers(round_, configs=True, change=None):
    """Every client sends what was drawn for it, whatever it was sent."""

    def answer(message):
        k = NODES.index(message.metadata.dst_node_id)
        adapter = round_.adapters[k]
        said = {"adapter_config": json.dumps(adapter.config)} if configs else {}
        reply = content(adapter, round_.weights[k], **said)
        return change(k, reply, message) if change else reply

    return answer


def run(strategy, answer, initial, rounds=1, **more):
    grid = Grid(answer)
    result = strategy.start(grid, to_arrays(initial.state_dict()), num_rounds=rounds, **more)
    return grid, result


def strategy(rule, **more):
    return LoraStrategy(rule=rule, fraction_evaluate=0.0, **more)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


ADMITTED = [
    (rule, ranks)
    for rule in RULES
    for ranks in ("equal", "unequal")
    if ranks == "equal" or flk.rules.find(rule).heterogeneous
]
"""The others are refused: test_unequal_ranks_leave_a_rule_that_cannot."""


@pytest.mark.parametrize(("rule", "ranks"), ADMITTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_that_of_aggregate(rule, ranks, dtype):
    round_ = draw(dtype=dtype, common_a=rule == "ffa", **(UNEQUAL if ranks == "unequal" else {}))
    expected = round_.aggregate(rule, **RULES[rule])
    made = strategy(rule, rule_options=RULES[rule])
    grid, result = run(made, answers(round_), round_.adapters[0], rounds=2)
    assert not made.lost
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())
    for message in grid.sent[3:]:  # the second round: what each node receives, in its own rank
        k = NODES.index(message.metadata.dst_node_id)
        found = from_arrays(message.content.array_records["arrays"])
        own = round_.adapters[k]
        assert {key: x.shape for key, x in found.items()} == {
            key: x.shape for key, x in own.state_dict().items()
        }
        wanted = expected.client_adapter(k).fit(own)
        if ranks == "equal" or expected.delivery.differs:
            for module in round_.modules:
                received = flk.Adapter.from_state_dict(found, own.config)
                close = 1e-5 if dtype == torch.float32 else 0.02
                gap = received.delta(module) - wanted.delta(module)
                assert gap.norm() <= close * (1 + wanted.delta(module).norm())
    metrics = result.train_metrics_clientapp[2]
    assert metrics["relative-error"] == expected.report.relative_error
    assert metrics["svd-floor"] == expected.report.svd_floor
    assert metrics["rank"] == expected.report.mean_rank
    assert metrics["bytes-up"] == sum(expected.bytes_up)
    assert metrics["bytes-down"] == sum(expected.bytes_down)
    assert metrics["lost-nodes"] == []
    assert metrics["train_loss"] == pytest.approx(0.5)


@pytest.mark.parametrize("rule", ["fedit", "florist", "flora_na", "fedsa", "flexlora"])
@pytest.mark.parametrize("alpha", [4, 12])
def test_one_common_scaling_cancels(rule, alpha):
    """Without any config: what returns is what a server that knows the config gives."""
    round_ = draw(alphas=(alpha,) * 3)
    found, _ = run(strategy(rule), answers(round_, configs=False), round_.adapters[0], 2)
    known, _ = run(
        strategy(rule, adapter_config=round_.adapters[0].config),
        answers(round_, configs=False),
        round_.adapters[0],
        2,
    )
    pairs = [sorted(x.sent[3:], key=lambda m: m.metadata.dst_node_id) for x in (found, known)]
    for one, other in zip(*pairs, strict=True):
        one, other = (from_arrays(m.content.array_records["arrays"]) for m in (one, other))
        one, other = (
            flk.Adapter.from_state_dict(x, round_.adapters[0].config) for x in (one, other)
        )
        for module in round_.modules:
            torch.testing.assert_close(one.delta(module), other.delta(module), rtol=1e-4, atol=1e-5)


def test_a_config_may_say_no_more_than_rank_and_alpha():
    round_ = draw(alphas=(4, 8, 16))

    def short(k, reply, _):
        alpha = (4, 8, 16)[k]
        reply["said"] = ConfigRecord({"adapter_config": json.dumps({"r": 4, "lora_alpha": alpha})})
        return reply

    made = strategy("flexlora")
    run(made, answers(round_, change=short), round_.adapters[0])
    expected = round_.aggregate("flexlora")
    for module in round_.modules:
        torch.testing.assert_close(
            made.result.adapter.delta(module), expected.adapter.delta(module)
        )


# ---- replies that cannot be used ---------------------------------------------------------------


def with_tensor(change):
    """The first tensor of client 1's reply goes through ``change``; None takes it away."""

    def made(reply):
        tensors = from_arrays(reply["arrays"])
        first = sorted(tensors)[0]
        new = change(tensors.pop(first))
        if new is not None:
            tensors[first] = new
        reply["arrays"] = to_arrays(tensors)
        return reply

    return made


def renamed(reply):
    tensors = from_arrays(reply["arrays"])
    tensors["other." + sorted(tensors)[0]] = tensors.pop(sorted(tensors)[0])
    reply["arrays"] = to_arrays(tensors)
    return reply


def half(reply):
    first = sorted(reply["arrays"])[0]
    array = raw(torch.ones(4, 17))
    reply["arrays"][first] = Array(array.dtype, array.shape, array.stype, array.data[:100])
    return reply


def half_of_numpy(reply):
    first = sorted(reply["arrays"])[0]
    array = reply["arrays"][first]
    reply["arrays"][first] = Array(array.dtype, array.shape, array.stype, array.data[:100])
    return reply


def without(name):
    def change(reply):
        del reply[name]
        return reply

    return change


def saying(text):
    def change(reply):
        reply["said"] = ConfigRecord({"adapter_config": text})
        return reply

    return change


def weighing(value):
    def change(reply):
        reply["metrics"]["num-examples"] = value
        return reply

    return change


BROKEN = {
    "rank 1": (with_tensor(lambda x: x[:1]), r"lora_A\S+ is torch.float32 \[1, 17\], expected"),
    "NaN": (with_tensor(lambda x: x.fill_(math.nan)), "holds NaN or infinite values"),
    "Inf": (with_tensor(lambda x: x.fill_(math.inf)), "holds NaN or infinite values"),
    "another name": (renamed, "found 'other' before PEFT's prefix"),
    "one more": (with_tensor(lambda _: None), r"its update lacks \S+lora_A"),
    "half of a raw tensor": (half, r"has 100 bytes; float32 of shape \[4, 17\] has 272"),
    "half of a tensor": (half_of_numpy, "cannot be read from numpy.ndarray"),
    "another dtype": (with_tensor(lambda x: x.double()), r"is torch.float64 \[4, 17\], expected"),
    "integers": (with_tensor(lambda x: x.long()), "is torch.int64"),
    "nothing": (lambda _: RecordDict(), "its reply has 0 ArrayRecords, expected one"),
    "no tensors": (lambda reply: _emptied(reply), "it sends no tensors"),
    "no arrays": (without("arrays"), "its reply has 0 ArrayRecords, expected one"),
    "no metrics": (without("metrics"), "its reply's MetricRecord has no number 'num-examples'"),
    "NaN examples": (weighing(math.nan), "its weight is nan, expected a finite number >= 0"),
    "negative examples": (weighing(-1), "its weight is -1.0, expected"),
    "a list of examples": (weighing([1, 2]), "has no number 'num-examples'"),
    "no JSON": (saying("{"), "its adapter_config is not valid JSON"),
    "no object": (saying("[1]"), "its adapter_config holds no JSON object"),
    "JSON with NaN": (saying('{"r": 4, "any": NaN}'), "its adapter_config is not valid JSON"),
    "JSON with 1e400": (saying('{"r": 4, "any": 1e400}'), "its adapter_config is not valid JSON"),
    "scaling 0": (saying('{"r": 4, "lora_alpha": 0}'), "scaling 0, with which no update reaches"),
    "another rank": (saying('{"r": 3, "lora_alpha": 3}'), "factors have rank 4"),
    "no number": (saying('{"r": "x"}'), "r is 'x', expected a whole number"),
    "no reply": (lambda _: None, "no reply within the time limit"),
}


def _emptied(reply):
    reply["arrays"] = ArrayRecord({})
    return reply


@pytest.mark.parametrize(("break_", "said"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("rule", ["fedit", "flexlora"])
def test_a_broken_reply_leaves_the_round_with_the_rest(rule, break_, said, caplog):
    round_ = draw()
    if said.startswith("lora_A") and rule == "flexlora":
        said = "factors have rank|expected"  # any rank, but not another than its config says
    broken = answers(round_, change=lambda k, reply, _: break_(reply) if k == 1 else reply)
    made = strategy(rule)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        _, result = run(made, broken, round_.adapters[0], rounds=2)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["lost-nodes"] == [12]
    assert metrics["clients"] == 2
    assert list(made.lost) == [12]
    assert re.search(said, made.lost[12]), made.lost
    assert "node 12 is not in the round: " in caplog.text
    rest = [round_.adapters[k] for k in (0, 2)]
    expected = flk.aggregate(rest, rule=rule, weights=[round_.weights[k] for k in (0, 2)])
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())


def test_an_error_leaves_the_round_with_the_rest():
    round_ = draw()

    def fails(k, reply, message):
        return Message(Error(2, "out of\nmemory"), reply_to=message) if k == 2 else reply

    made = strategy("florist")
    run(made, answers(round_, change=fails), round_.adapters[0])
    assert made.lost == {13: "its node reports: out of memory"}


def test_an_error_of_flowers_own_server_is_the_nodes():
    """SuperLink answers, in its own name, for a node that is gone."""
    round_ = draw()

    def gone(k, reply, message):
        if k != 2:
            return reply
        reply = Message(Error(3, "node unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    made = strategy("florist")
    run(made, answers(round_, change=gone), round_.adapters[0])
    assert made.lost == {13: "its node reports: node unavailable"}


def test_a_reply_that_only_the_rule_refuses():
    """FFA's clients share A; client 1 has trained its own."""
    round_ = draw(common_a=True)
    other = draw(seed=5).adapters[1]

    def trained(k, reply, _):
        return content(other, adapter_config=json.dumps(other.config)) if k == 1 else reply

    made = strategy("ffa")
    run(made, answers(round_, change=trained), round_.adapters[0])
    assert list(made.lost) == [12]
    assert "lora_A.weight differs from what it was sent; only B is trained" in made.lost[12]


def test_unequal_ranks_leave_a_rule_that_cannot():
    round_ = draw(ranks=(4, 2, 4))
    made = strategy("fedit")
    run(made, answers(round_), round_.adapters[0])
    assert list(made.lost) == [12]
    assert "is torch.float32 [2, 17], expected torch.float32 [4, 17]" in made.lost[12]


def test_unequal_ranks_need_a_config():
    round_ = draw(ranks=(4, 2, 4))
    made = strategy("florist")
    run(made, answers(round_, configs=False), round_.adapters[0])
    assert list(made.lost) == [12]


def test_a_client_without_config_beside_one_with():
    round_ = draw()

    def silent(k, reply, _):
        return content(round_.adapters[2]) if k == 2 else reply

    made = strategy("florist")
    run(made, answers(round_, change=silent), round_.adapters[0])
    assert made.lost[13].startswith("it sends no adapter_config, and node 11 sends one")


def test_a_round_without_any_client_is_an_error():
    round_ = draw()
    made = strategy("florist")
    with pytest.raises(AggregationError, match="round 1 has no client left: node 1"):
        run(made, answers(round_, change=lambda *_: None), round_.adapters[0])
    assert made.exchange.round == 0


@pytest.mark.parametrize("robust", [flk.robust.Trimmed(attackers=1), "clip"], ids=repr)
def test_robust_weights_are_those_of_aggregate(robust):
    drawn = draw(alphas=(4, 400, 4))
    made = strategy("florist", robust=robust)
    _, result = run(made, answers(drawn), drawn.adapters[0])
    expected = drawn.aggregate("florist", robust=robust)
    assert made.result.weighing.weights == expected.weighing.weights
    assert result.train_metrics_clientapp[1]["robust-weights"] == expected.weighing.weights
    assert_same(made.result.adapter.state_dict(), expected.adapter.state_dict())


def test_robust_rules_that_do_not_fit():
    with pytest.raises(ValueError, match="unknown robust rule 'mean'"):
        LoraStrategy(rule="florist", robust="mean")
    with pytest.raises(ValueError, match="scales B"):
        LoraStrategy(rule="fedsa", robust="clip")
    with pytest.raises(TypeError, match="no robust rule"):
        LoraStrategy(rule="florist", robust_options={"attackers": 1})
    drawn = draw()
    made = strategy("florist", robust="krum", robust_options={"attackers": 1})
    with pytest.raises(AggregationError, match="3 clients of positive weight: krum"):
        run(made, answers(drawn), drawn.adapters[0])


def test_a_strategy_is_called_directly():
    """Nothing was sent: the layout that most replies have counts."""
    round_ = draw()
    replies = []
    for k, node in enumerate(NODES):
        asked = Message(RecordDict(), dst_node_id=node, message_type="train")
        asked.metadata.__dict__["_message_id"] = str(k)
        reply = content(round_.adapters[k], round_.weights[k])
        replies.append(
            Message(with_tensor(lambda x: x[:1])(reply) if k == 0 else reply, reply_to=asked)
        )
    made = LoraStrategy(rule="fedit")
    arrays, metrics = made.aggregate_train(1, replies)
    assert metrics["lost-nodes"] == [11]
    assert set(arrays) == set(round_.adapters[0].state_dict())


# ---- rules that send less, merge, or remember --------------------------------------------------


def test_a_client_may_send_what_the_rule_needs():
    """FedSA shares A: B need not travel, and does not come back."""
    round_ = draw()

    def only_a(k, reply, _):
        tensors = {key: x for key, x in from_arrays(reply["arrays"]).items() if "lora_A" in key}
        reply["arrays"] = to_arrays(tensors)
        return reply

    made = strategy("fedsa")
    grid, _ = run(made, answers(round_, change=only_a), round_.adapters[0], rounds=2)
    expected = round_.aggregate("fedsa").shared
    for message in grid.sent[3:]:
        assert_same(from_arrays(message.content.array_records["arrays"]), dict(expected))


def test_rules_that_merge_need_clients_that_declare_it():
    round_ = draw(**UNEQUAL)
    with pytest.raises(AggregationError, match=r"flora merges its result .* must declare"):
        run(strategy("flora"), answers(round_), round_.adapters[0])

    def merging(k, reply, _):
        reply["merging"] = ConfigRecord({"merges": True})
        return reply

    made = strategy("flora")
    late = []

    def once_late(k, reply, message):
        """Client 2 misses the second round, and gets both updates in the third."""
        number = message.content["config"]["server-round"]
        late.append((k, number, sorted(message.content.array_records)))
        return None if (k, number) == (2, 2) else merging(k, reply, message)

    grid, _ = run(made, answers(round_, change=once_late), round_.adapters[0], rounds=4)
    sent = {(k, number): names for k, number, names in late}
    assert sent[0, 1] == ["arrays"]
    assert sent[0, 2] == ["arrays", "merged/0"]
    assert sent[0, 3] == ["arrays", "merged/1"]
    assert sent[2, 3] == ["arrays", "merged/0", "merged/1"]
    first = next(m for m in grid.sent[3:] if m.metadata.dst_node_id == 12)
    update = flower.read_adapter(first.content, "merged/0")
    expected = round_.aggregate("flora").adapter
    assert_same(update.state_dict(), expected.state_dict())
    start = from_arrays(first.content.array_records["arrays"])
    assert all(not x.any() for key, x in start.items() if "lora_B" in key)


@pytest.mark.parametrize("rule", ["fedex", "fedmomentum"])
def test_a_residual_is_merged_and_the_adapter_goes_on(rule):
    def merging(k, reply, _):
        reply["merging"] = ConfigRecord({"merges": True})
        return reply

    round_ = draw(alphas=(8, 8, 8))
    made = strategy(rule)
    grid, _ = run(made, answers(round_, change=merging), round_.adapters[0], rounds=2)
    expected = round_.aggregate(rule)
    second = next(m for m in grid.sent[3:] if m.metadata.dst_node_id == 11)
    assert sorted(second.content.array_records) == ["arrays", "merged/0"]
    rest = flower.read_adapter(second.content, "merged/0")
    assert_same(rest.state_dict(), expected.residual.state_dict())
    start = from_arrays(second.content.array_records["arrays"])
    began = flk.Adapter.from_state_dict(start, round_.adapters[0].config)
    for module in began.factors:
        torch.testing.assert_close(
            began.delta(module), expected.adapter.delta(module), rtol=1e-5, atol=1e-5
        )


def test_rounds_tell_what_to_train():
    round_ = draw(common_a=True)

    def obeying(k, reply, message):
        """The factor that is not trained is what it was sent."""
        fixed = {"a": "lora_B", "b": "lora_A"}[message.content["config"]["trains"]]
        sent = from_arrays(message.content.array_records["arrays"])
        own = from_arrays(reply["arrays"])
        reply["arrays"] = to_arrays({key: sent[key] if fixed in key else own[key] for key in own})
        return reply

    made = strategy("rolora")
    grid, _ = run(made, answers(round_, change=obeying), round_.adapters[0], rounds=2)
    assert [m.content["config"]["trains"] for m in grid.sent] == ["b"] * 3 + ["a"] * 3
    assert not made.lost


@pytest.mark.parametrize("odd", range(3))
@pytest.mark.parametrize("rule", ["florist", "fedit", "flexlora"])
def test_a_node_that_cannot_hold_the_result_leaves_the_round_with_the_rest(rule, odd):
    """In float16 and of a scaling that is too small for the others' update."""
    alphas = [2.0**-12 if k == odd else 800 for k in range(3)]
    round_ = draw(alphas=alphas, dtype=torch.float16)
    made = strategy(rule)
    grid, result = run(made, answers(round_), round_.adapters[0], rounds=3)
    for number in (2, 3):
        metrics = result.train_metrics_clientapp[number]
        assert (metrics["lost-nodes"], metrics["clients"]) == ([NODES[odd]], 2)
    asked = [message.metadata.dst_node_id for message in grid.sent[3:]]
    assert sorted(asked) == sorted(2 * [node for node in NODES if node != NODES[odd]])
    said = made.lost[NODES[odd]]
    assert re.match(rf"it cannot be sent the result: node {NODES[odd]}, module .*overflows", said)


def test_a_node_that_sat_out_gets_the_last_result():
    round_ = draw(**UNEQUAL)
    made = strategy("flexlora", min_train_nodes=1, min_available_nodes=3)
    run(made, answers(round_), round_.adapters[0])
    known = made.exchange.start(12).tensors
    assert {k: x.shape for k, x in known.items()} == {
        k: x.shape for k, x in round_.adapters[1].state_dict().items()
    }


# ---- going on ----------------------------------------------------------------------------------


def moving(round_):
    """Clients that depend on what they are sent: half of it, half of their own."""

    def change(k, reply, message):
        sent = from_arrays(message.content.array_records["arrays"])
        own = from_arrays(reply["arrays"])
        mixed = {
            key: (x + sent[key]) / 2 if sent[key].shape == x.shape else x for key, x in own.items()
        }
        reply["arrays"] = to_arrays(mixed)
        reply["merging"] = ConfigRecord({"merges": True})
        return reply

    return answers(round_, change=change)


@pytest.mark.parametrize(
    "rule", ["florist", "flexlora", "fedsa", "flora", "eclora", "fedrot", "florg", "fedmomentum"]
)
def test_a_restarted_server_goes_on_with_the_same_bits(rule, tmp_path):
    options = {"momentum": 0.5} if rule == "fedmomentum" else {}
    round_ = draw(**(UNEQUAL if flk.rules.find(rule).heterogeneous else {}))
    whole = strategy(rule, rule_options=options)
    _, unbroken = run(whole, moving(round_), round_.adapters[0], rounds=3)
    file = tmp_path / "kept" / "state.pt"
    run(strategy(rule, rule_options=options, state=file), moving(round_), round_.adapters[0], 2)
    seen = []
    made = strategy(rule, rule_options=options, state=file)
    _, result = run(
        made,
        moving(round_),
        round_.adapters[0],
        3,
        evaluate_fn=lambda number, _: seen.append(number),
    )
    assert seen == [2, 3]
    assert list(result.train_metrics_clientapp) == [3]
    assert_same(from_arrays(result.arrays), from_arrays(unbroken.arrays))
    assert_same(made.result.adapter.state_dict(), whole.result.adapter.state_dict())
    _, again = run(strategy(rule, rule_options=options, state=file), None, round_.adapters[0], 3)
    assert_same(from_arrays(again.arrays), from_arrays(unbroken.arrays))


@pytest.mark.parametrize("rule", ["florist", "fedsa", "flora", "fedmomentum"])
@pytest.mark.parametrize("kept", [False, True], ids=["no state", "state"])
def test_a_second_start_begins_anew_unless_a_state_is_kept(rule, kept, tmp_path):
    round_ = draw(alphas=(8, 8, 8))
    made = strategy(rule, state=tmp_path / "state.pt" if kept else None)
    first, again = (run(made, moving(round_), round_.adapters[0], rounds=2) for _ in range(2))
    assert_same(from_arrays(again[1].arrays), from_arrays(first[1].arrays))
    assert [len(grid.sent) for grid, _ in (first, again)] == [6, 0 if kept else 6]
    grid, other = run(made, moving(round_), draw(seed=3, alphas=(8, 8, 8)).adapters[0], rounds=3)
    assert len(grid.sent) == (3 if kept else 9)
    assert list(other.train_metrics_clientapp) == ([3] if kept else [1, 2, 3])
    fresh = strategy(rule)
    given = round_.adapters[0] if kept else draw(seed=3, alphas=(8, 8, 8)).adapters[0]
    _, expected = run(fresh, moving(round_), given, rounds=3)
    assert_same(from_arrays(other.arrays), from_arrays(expected.arrays))


def test_a_state_of_another_rule_or_damaged_is_refused(tmp_path):
    round_ = draw()
    file = tmp_path / "state.pt"
    run(strategy("florist", state=file), answers(round_), round_.adapters[0])
    with pytest.raises(
        flk.AdapterError, match="is of rule 'florist' in format 2, expected 'fedit'"
    ):
        strategy("fedit", state=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        flk.AdapterError, match=r"is not a state file .*; move it away to begin anew"
    ):
        strategy("florist", state=file)


# ---- arguments ---------------------------------------------------------------------------------


def test_fedavgs_arguments_are_taken():
    made = LoraStrategy(fraction_train=0.5, weighted_by_key="steps", arrayrecord_key="x")
    assert isinstance(made, FedAvg)
    assert (made.fraction_train, made.weighted_by_key, made.arrayrecord_key) == (0.5, "steps", "x")
    assert made.exchange.rule == flk.rules.FLoRIST()


def test_what_is_not_supported_is_named():
    with pytest.raises(TypeError, match=r"no argument 'server_momentum'.*FedAdam, FedAvgM"):
        LoraStrategy(server_momentum=0.9)
    with pytest.raises(TypeError, match=r"rule must be a rule or the name of one, found 0.5"):
        LoraStrategy(0.5)
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        LoraStrategy("best")
    with pytest.raises(TypeError, match="mixes LoraStrategy with FedAdam"):
        type("Mixed", (LoraStrategy, FedAdam), {})
    type("Mine", (LoraStrategy,), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_travel_bit_for_bit(dtype):
    bits = torch.randint(-128, 128, (7, 5, dtype.itemsize), dtype=torch.int8)
    tensors = {
        "any": bits.view(dtype).squeeze(-1),  # NaN among them
        "turned": torch.randn(6, 4).to(dtype).T,
        "scalar": torch.tensor(1 / 3, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    raw_too = ArrayRecord({name: raw(tensor) for name, tensor in tensors.items()})
    for record in (to_arrays(tensors), raw_too):
        for name, found in from_arrays(record).items():
            sent = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            assert (found.dtype, found.shape) == (dtype, tensors[name].shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), sent)


@pytest.mark.parametrize("dtype", flower.DTYPES.values(), ids=str)
def test_an_update_keeps_what_stands_beside_its_factors(dtype):
    """Masks and counters of modules_to_save, say."""
    client = draw().adapters[0]
    beside = {"base_model.model.score.mask": torch.tensor([[0, 1, 1], [1, 0, 2]]).to(dtype)}
    config = {**client.config, "modules_to_save": ["score"]}
    adapter = flk.Adapter.from_state_dict({**client.state_dict(), **beside}, config)
    records = RecordDict()
    flower.write_adapter(records, "merged/0", adapter)
    found = flower.read_adapter(records, "merged/0").state_dict()
    assert_same(found, adapter.state_dict())
    assert {found[key].dtype for key in beside} == {dtype}


def test_flowers_own_averaging_cannot_read_raw_arrays():
    with pytest.raises(TypeError):
        to_arrays({"b": torch.ones(2, dtype=torch.bfloat16)})["b"].numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat15"}, "b is bfloat15 in raw.le; expected raw.le and one of float64"),
        ({"stype": "numpy.ndarray"}, "b cannot be read from numpy.ndarray: "),
        ({"shape": (2, 3)}, r"b has 16 bytes; float32 of shape \[2, 3\] has 24"),
    ],
)
def test_records_that_hold_no_tensors_say_why(change, message):
    array = {"dtype": "float32", "shape": (2, 2), "stype": "raw.le", "data": bytes(16)} | change
    with pytest.raises(flk.AdapterError, match=message):
        from_arrays(ArrayRecord({"b": Array(**array)}))


@pytest.mark.parametrize("rule", ["florist", "flexlora", "flora_na"])
def test_the_order_of_the_nodes_changes_rounding_only(rule):
    """Also of the rows of A that a result of a smaller rank leaves to be trained."""
    round_ = draw(ranks=(6, 6, 6), alphas=(6, 6, 6))
    options = {"energy": 0.3} if rule == "florist" else {}
    starts = []
    for order in ((0, 1, 2), (2, 0, 1)):
        turned = draw(ranks=(6, 6, 6), alphas=(6, 6, 6))
        clients = [turned.adapters[k] for k in order]
        weights = [turned.weights[k] for k in order]

        def answer(message, clients=clients, weights=weights):
            k = NODES.index(message.metadata.dst_node_id)
            return content(clients[k], weights[k])

        _, result = run(
            strategy(rule, rule_options=options), answer, draw(seed=3, ranks=(6, 6, 6)).adapters[0]
        )
        starts.append(from_arrays(result.arrays))
    one, other = (flk.Adapter.from_state_dict(start, round_.adapters[0].config) for start in starts)
    for module in round_.modules:
        assert (one.delta(module) - other.delta(module)).norm() <= 1e-4 * one.delta(module).norm()
        spare = (one.factors[module].b == 0).all(dim=0)
        assert torch.equal(one.factors[module].a[spare], other.factors[module].a[spare])


# ---- VeRA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("configs", [True, False], ids=["config", "no config"])
def test_vera_shares_lambda_d(configs):
    """FedSA-VeRA: lambda_d is averaged, every node keeps its own lambda_b."""
    clients = vera_clients(projections=False)
    weights = (3, 1, 2)

    def answer(message):
        k = NODES.index(message.metadata.dst_node_id)
        said = {"adapter_config": json.dumps(clients[k].config)} if configs else {}
        return content(clients[k], weights[k], **said)

    made = strategy("fedsa")
    grid, result = run(made, answer, clients[0], rounds=2)
    assert not made.lost
    for message in grid.sent[3:]:
        k = NODES.index(message.metadata.dst_node_id)
        found = from_arrays(message.content.array_records["arrays"])
        own = clients[k].state_dict()
        assert found.keys() == own.keys()
        for key, tensor in found.items():
            if key.endswith("lambda_b"):
                assert torch.equal(tensor, own[key])
            else:
                terms = zip(weights, clients, strict=True)
                mean = sum(w * client.state_dict()[key].double() for w, client in terms) / 6
                torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)
    assert result.train_metrics_clientapp[2]["clients"] == 3


def test_vera_with_other_projections_is_lost():
    """The clients' frozen matrices come from projection_prng_key, which must be one."""
    clients = vera_clients(projections=False)

    def answer(message):
        k = NODES.index(message.metadata.dst_node_id)
        config = {**clients[k].config, "projection_prng_key": 4 if k == 1 else 3}
        return content(clients[k], 1, adapter_config=json.dumps(config))

    made = strategy("fedsa")
    run(made, answer, clients[0])
    assert list(made.lost) == [12]
    assert "projection_prng_key" in made.lost[12]


@pytest.mark.parametrize("rule", ["fedit", "florist", "flexlora"])
def test_other_rules_refuse_vera(rule):
    clients = vera_clients(projections=False)
    with pytest.raises(AggregationError, match="VeRA"):
        run(strategy(rule), lambda m: content(clients[0]), clients[0])
