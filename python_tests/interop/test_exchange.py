"""Exchange: who is lost, what is sent and what is kept, whatever the framework."""

import json
import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
from federation import SIZES, draw

import fedlora_kernels as flk
from fedlora_kernels.interop.exchange import Exchange, Reply, read_config

FIXED = [name for name, kind in flk.rules.registry.kinds.items() if kind.trains != "both"]
CLIENTS = (11, 12, 13)
FIVE = (11, 12, 13, 14, 15)
MODULE = "layers.0.down"


def prefixed(front, tensors):
    return {front + key: x for key, x in tensors.items()}


def trained(tensors, sides, seed):
    """The tensors after steps on these factors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if any(f"lora_{side.upper()}" in key for side in sides)
        else x.clone()
        for key, x in tensors.items()
    }


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("wrong", CLIENTS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_client_that_trains_the_fixed_factor_is_lost_alone(rule, wrong, rounds):
    """Also where it is the first: no other client is measured by it."""
    initial = draw(common_a=True).adapters[0]
    exchange = Exchange(rule, adapter_config=initial.config)
    exchange.give(initial.state_dict())
    for number in range(1, rounds + 1):
        exchange.begin()
        replies = {}
        for client in CLIENTS:
            start = exchange.start(client)
            sides = "ab" if number == rounds and client == wrong else start.trains
            replies[client] = trained(start.tensors, sides, seed=10 * number + client)
            exchange.receive(client, Reply(replies[client], weight=client))
        result = exchange.finish()
    assert list(exchange.lost) == [wrong]
    only = start.trains.upper()
    assert f"differs from what it was sent; only {only} is trained" in exchange.lost[wrong]
    rest = [client for client in CLIENTS if client != wrong]
    expected = flk.aggregate(
        [flk.Adapter.from_state_dict(replies[client], initial.config) for client in rest],
        rule=rule,
        weights=rest,
    )
    for name, factors in expected.adapter.factors.items():
        found = result.adapter.factors[name]
        assert torch.equal(found.b, factors.b)
        assert torch.equal(found.a, factors.a)


def alike(clients=FIVE, **more):
    """Client -> its adapter, of one rank and one A."""
    equal = {"ranks": (4,), "alphas": (8,), "weights": (1,)}
    sizes = {name: value * len(clients) for name, value in equal.items()}
    return dict(zip(clients, draw(common_a=True, **sizes, **more).adapters, strict=True))


def reply(adapter, **changes):
    return Reply(adapter.state_dict(), 1.0, {**adapter.config, **changes}, merges=True)


def taken(exchange, replies):
    """A round of these replies."""
    exchange.begin()
    for client, sent in replies.items():
        exchange.start(client)
        exchange.receive(client, sent)
    return exchange.finish()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


# ---- who is lost -------------------------------------------------------------------------------

ODD_CONFIGS = {
    "base_model_name_or_path": "another/base",
    "task_type": "SEQ_CLS",
    "target_parameters": ["experts"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [5],
    "use_dora": True,
}


@pytest.mark.parametrize("field", ODD_CONFIGS)
@pytest.mark.parametrize("odd", [(11,), (13,), (15,), (11, 12), (11, 15)], ids=str)
def test_clients_whose_config_most_do_not_share_are_lost_alone(field, odd):
    clients = alike()
    replies = {
        client: reply(adapter, **({field: ODD_CONFIGS[field]} if client in odd else {}))
        for client, adapter in clients.items()
    }
    exchange = Exchange("florist")
    result = taken(exchange, replies)
    assert sorted(exchange.lost) == list(odd)
    rest = [adapter for client, adapter in clients.items() if client not in odd]
    assert_same(
        result.adapter.state_dict(), flk.aggregate(rest, rule="florist").adapter.state_dict()
    )


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("telling", [(11,), (14,), (11, 13), (12, 13, 14), (11, 12, 13)], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["no config", "the server's config"])
def test_the_fewer_are_lost_where_some_send_a_config(count, telling, known):
    clients = alike(FIVE[:count])
    exchange = Exchange("florist", adapter_config=clients[11].config if known else None)
    taken(
        exchange,
        {
            client: reply(x) if client in telling else Reply(x.state_dict(), 1.0)
            for client, x in clients.items()
        },
    )
    few = 2 * len(telling) < count
    lost = [] if known else [client for client in clients if (client in telling) == few]
    assert sorted(exchange.lost) == lost
    said = "it sends adapter_config, and most" if few else "it sends no adapter_config, and node 1"
    assert all(why.startswith(said) for why in exchange.lost.values())


FIELDS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_parameters"),
    *("target_modules", "modules_to_save", "task_type", "layer_replication", "peft_version"),
)
ODD = (5, -1, True, math.inf, math.nan, "x", "(", [1], ["a", 1], [None], [["a"]], {"a": 1})


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("odd", [11, 12])
@pytest.mark.parametrize("rule", ["florist", "flora"])
def test_no_value_of_a_config_ends_a_run(rule, odd, field):
    """Also not the next round, whose messages hold a client's config."""
    clients = alike(CLIENTS)
    for value in ODD:
        exchange = Exchange(rule)
        for client, x in clients.items():
            config = {**x.config, **({field: value} if client == odd else {})}
            try:
                said = read_config(json.dumps(config))
            except flk.AdapterError as error:
                exchange.lose(client, str(error))
            else:
                exchange.receive(client, Reply(x.state_dict(), 1.0, said, merges=True))
        result = exchange.finish()
        assert set(exchange.lost) <= {odd}, (value, exchange.lost)
        for client in (*CLIENTS, 99):
            updates = exchange.start(client).updates.values()
            json.dumps([x.config for x in (result.adapter, *updates)], allow_nan=False)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("where", ['{"any": %s}', '{"alpha_pattern": {"q": %s}}', '{"x": [1, %s]}'])
def test_numbers_that_are_not_json_are_refused(number, where):
    text = where % number
    for said in (text, text.encode(), json.loads(text)):
        with pytest.raises(flk.AdapterError, match="its adapter_config is not valid JSON: "):
            read_config(said)


@pytest.mark.parametrize("odd", CLIENTS)
@pytest.mark.parametrize("rule", ["florist", "fedit", "fedsa", "flora"])
@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 0}, {"lora_alpha": -0.0}, {"alpha_pattern": {MODULE: 0}}], ids=str
)
def test_a_client_to_which_no_update_can_be_sent_is_lost(changes, rule, odd):
    exchange = Exchange(rule)
    clients = alike(CLIENTS)
    taken(exchange, {k: reply(x, **(changes if k == odd else {})) for k, x in clients.items()})
    assert list(exchange.lost) == [odd]
    assert exchange.lost[odd].endswith(": scaling 0, with which no update reaches it")
    assert all(exchange.start(client).tensors.keys() for client in CLIENTS if client != odd)


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("before", [None, "its node reports: out of memory"])
def test_a_client_that_is_lost_stays_lost_however_often_it_replies(times, before):
    exchange = Exchange("fedit")
    clients = alike(CLIENTS)
    exchange.begin()
    if before:
        exchange.lose(12, before)
    for client in (11, 12, 13, *[12] * (times - 1)):
        exchange.receive(client, reply(clients[client]))
    assert len(exchange.finish().clients) == 2
    assert exchange.lost == {12: before or "it replied twice"}


BESIDE = ("lora_B.bias", "lora_magnitude_vector")
TRAVELS = {"ffa": ("lora_B.weight",), "fedsvd": ("lora_B.weight",), "fedsa": ("lora_A.weight",)}
"""What must be in a reply, beside what stands beside B."""


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("omitted", ["lora_A.weight", "lora_B.weight", "beside"])
@pytest.mark.parametrize("rule", TRAVELS)
def test_only_what_does_not_travel_may_be_left_out(rule, omitted, beside):
    """What stands beside B travels with it."""
    extras = {
        f"base_model.model.{module}.{beside}": torch.ones(m) for module, (m, _) in SIZES.items()
    }
    whole = {k: {**x.state_dict(), **extras} for k, x in alike(CLIENTS).items()}
    config = {**alike()[11].config, "lora_bias": "bias" in beside, "use_dora": "bias" not in beside}
    left_out = f"base_model.model.{MODULE}.{beside if omitted == 'beside' else omitted}"
    exchange = Exchange(rule, adapter_config=config, magnitudes="average")
    exchange.give(whole[11])
    replies = {k: Reply(x, 1.0) for k, x in whole.items()}
    replies[12] = Reply({key: x for key, x in whole[12].items() if key != left_out}, 1.0)
    taken(exchange, replies)
    travels = omitted in TRAVELS[rule] or (omitted == "beside" and rule != "fedsa")
    assert exchange.lost == ({12: f"its update lacks {left_out}"} if travels else {})


# ---- keys --------------------------------------------------------------------------------------


def moved(start, seed):
    """What a client sends that trained from this start."""
    return Reply(trained(start.tensors, start.trains, seed), 1.0, merges=True)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("rule", ["florist", "ffa", "fedsa", "flora"])
def test_what_wrappers_add_to_keys_changes_nothing_in_any_round(rule, wrapper):
    """Of the server's tensors, or of some clients' in some rounds."""
    initial = alike()[11]
    plain, other = (Exchange(rule, adapter_config=initial.config) for _ in range(2))
    plain.give(initial.state_dict())
    other.give(prefixed(wrapper, initial.state_dict()))
    for number in range(3):
        plain.begin()
        other.begin()
        for client in CLIENTS:
            sent = moved(plain.start(client), seed=10 * number + client)
            plain.receive(client, sent)
            other.start(client)
            front = wrapper if (client + number) % 2 else ""
            other.receive(client, replace(sent, tensors=prefixed(front, sent.tensors)))
        results = [exchange.finish().adapter.state_dict() for exchange in (other, plain)]
        assert not other.lost
        assert_same(*results)
    assert_same(other.arrays, plain.arrays)


@pytest.mark.parametrize("odd", CLIENTS)
def test_keys_that_are_not_pefts_are_their_clients_fault(odd):
    clients = alike(CLIENTS)
    key = next(iter(clients[odd].state_dict()))
    for more, said in (("policy.", "found 'policy' before PEFT's"), ("module.", "have one name")):
        exchange = Exchange("fedit")
        replies = {client: reply(x) for client, x in clients.items()}
        tensors = {**clients[odd].state_dict(), more + key: torch.ones(2)}
        taken(exchange, {**replies, odd: replace(replies[odd], tensors=tensors)})
        assert list(exchange.lost) == [odd]
        assert said in exchange.lost[odd]


# ---- what is sent and kept ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", flk.rules.names())
@pytest.mark.parametrize("odd", CLIENTS)
@pytest.mark.parametrize("alpha", [8, 2.0**-12, 2.0**-40])
def test_no_client_is_sent_what_its_dtype_cannot_hold(rule, alpha, odd):
    """Clients in float16, one of a scaling that is too small for the others' update."""
    exchange = Exchange(rule)
    clients = alike(CLIENTS, dtype=torch.float16)
    taken(
        exchange, {k: reply(x, lora_alpha=alpha if k == odd else 800) for k, x in clients.items()}
    )
    refused = {}
    for client in CLIENTS:
        try:
            sent = exchange.start(client).tensors
        except flk.AdapterError as error:
            refused[client] = str(error)
        else:
            assert all(bool(x.isfinite().all()) for x in sent.values())
    whole = alpha == 8 or rule in ("flora", "fedsa")  # clients of these start from their own or 0
    assert list(refused) == ([] if whole else [odd])
    said = rf"node {odd}, module \S+: the update overflows torch.float16"
    assert all(re.match(said, found) for found in refused.values())


def full_disk(content, file):
    """torch.save where no space is left."""
    file.write(b"x" * 10)
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_round_whose_state_cannot_be_written_can_be_finished_again(
    rule, rounds, tmp_path, monkeypatch
):
    file = tmp_path / "state.pt"
    initial = alike()[11]
    whole, made = (Exchange(rule, adapter_config=initial.config, state=x) for x in (None, file))
    for exchange in (whole, made):
        exchange.give(initial.state_dict())
        for number in range(rounds + 1):
            exchange.begin()
            for client in CLIENTS:
                exchange.receive(client, moved(exchange.start(client), 10 * number + client))
            if exchange is made and number == rounds:
                kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
                with monkeypatch.context() as patched:
                    patched.setattr(torch, "save", full_disk)
                    with pytest.raises(OSError, match="No space left"):
                        exchange.finish()
                assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
                assert (exchange.round, exchange.result is None) == (rounds, rounds == 0)
            exchange.finish()
    for client in (*CLIENTS, 99):
        assert_same(made.start(client).tensors, whole.start(client).tensors)


def test_a_result_that_the_servers_own_tensors_cannot_hold_leaves_the_state_as_it_was():
    exchange = Exchange("flexlora")
    drawn = draw(ranks=(4, 2, 2), alphas=(2.0**-12, 800, 800), dtype=torch.float16)
    clients = dict(zip(CLIENTS, drawn.adapters, strict=True))
    exchange.give(clients[11].state_dict())
    replies = {k: reply(x) for k, x in clients.items()}
    with pytest.raises(flk.AdapterError, match=r"^the server, module .*: the update overflows"):
        taken(exchange, replies)
    assert (exchange.round, exchange.result, exchange.lost) == (0, None, {})
    assert_same(exchange.start(11).tensors, clients[11].state_dict())


FOREIGN = {
    "empty": b"",
    "text": b"101\nlines",
    "a page": b"<html>\x80...",
    "a pickle": pickle.dumps({"format": 2, "rule": "florist"}),
    "zeros": bytes(200),
    "a saved tensor": torch.ones(2, 2),
    "a saved list": ["format", "rule"],
    "other keys": {"format": 2},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_that_is_no_state_is_said_to_be_none(content, tmp_path):
    file = tmp_path / "state.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(
        flk.AdapterError, match=r"state.pt is not a state file \(\w+: .*begin anew$"
    ):
        Exchange("florist", state=file)
    assert file.read_bytes() == before
