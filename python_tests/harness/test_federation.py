"""Who trains what: partitions, participation, frozen factors, personal parts, moments, seeds."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from miniature import metrics, miniature, run, settings_like
from torch.utils._python_dispatch import TorchDispatchMode

import fedlora_kernels as flk
from integration.model.serialize import serialize_memory
from integration.model.total import total
from integration.model.trainer import LocalTrainer
from integration.plan import plan
from integration.report.intervals import interval, within_noise
from integration.report.table import columns
from integration.rounds.client import rate
from integration.rounds.engine import LocalEngine
from integration.rounds.federation import Federation
from integration.rounds.partition import own_tests, participants, partition
from integration.rounds.server import Server
from integration.rounds.state import read_state, write_state
from integration.settings import SettingsError

LABELS = [position % 8 for position in range(800)]

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A Llama of 40 thousand parameters: a step takes milliseconds."""
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return str(path)


@pytest.fixture
def small(shape):
    """Settings of word problems on the small Llama, with changes."""

    def make(**changes):
        fixed = {
            "task": "arithmetic",
            "config": shape,
            "target_modules": ("q_proj", "v_proj"),
            "max_tokens": 64,
            "test_size": 16,
            "max_new_tokens": 2,
            "shared_per_class": 0,
            "learning_rate": 0.02,
            "ranks": (4,),
        }
        return miniature(**(fixed | changes))

    return make


# ---- partitions and participation ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "by-label", "by-topic"])
def test_every_example_belongs_to_one_client(kind):
    parts = partition(LABELS, miniature(partition=kind, clients=5))
    assert sorted(position for part in parts for position in part) == list(range(800))
    assert all(part == sorted(part) and part for part in parts)
    assert parts == partition(LABELS, miniature(partition=kind, clients=5))


def test_iid_clients_hold_equal_shares_of_every_label():
    for part in partition(LABELS, miniature(partition="iid", clients=7)):
        counts = Counter(LABELS[position] for position in part)
        assert set(counts.values()) <= {14, 15}
        assert len(counts) == 8


def test_by_label_clients_hold_one_or_two_labels():
    parts = partition(LABELS, miniature(partition="by-label", clients=10))
    assert [len(part) for part in parts] == [80] * 10
    assert max(len({LABELS[position] for position in part}) for part in parts) == 2


def test_by_topic_gives_every_topic_to_one_client():
    parts = partition(LABELS, miniature(partition="by-topic", clients=3))
    assert [sorted({LABELS[x] for x in part}) for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(SettingsError, match="found 8 topics for 9 clients"):
        partition(LABELS, miniature(partition="by-topic", clients=9))


def test_too_few_examples_are_an_error():
    with pytest.raises(SettingsError, match="2 training examples do not give 3 clients 1 each"):
        partition([0, 1], miniature(partition="iid", clients=3))


def test_participants_are_decided_by_seed_and_round():
    settings = miniature(clients=100, participation=0.1)
    drawn = [participants(settings, number) for number in range(1, 41)]
    assert all(len(set(chosen)) == 10 and chosen == sorted(chosen) for chosen in drawn)
    assert drawn == [participants(settings, number) for number in range(1, 41)]
    assert len({tuple(chosen) for chosen in drawn}) == 40
    assert len({client for chosen in drawn for client in chosen}) > 90
    assert drawn[0] != participants(settings_like(settings, seed=1), 1)
    assert participants(miniature(participation=0.01), 1) in ([0], [1]), "never nobody"


def test_own_tests_follow_the_clients_labels():
    held = [0] * 30 + [1] * 10
    drawn = own_tests(held, LABELS, 60, miniature(), 0)
    assert len(set(drawn)) == 60
    counts = Counter(LABELS[position] for position in drawn)
    assert set(counts) == {0, 1}
    assert counts[0] > 1.5 * counts[1]
    assert len(own_tests(held, LABELS, 10_000, miniature(), 0)) == 200, "no more than there are"
    assert own_tests(held, LABELS, 0, miniature(), 0) == []
    assert own_tests([9], LABELS, 5, miniature(), 0) == [], "no test example of its label"


def test_the_learning_rate_over_the_rounds():
    def rates(schedule):
        settings = miniature(schedule=schedule, rounds=4, learning_rate=1.0)
        return [round(rate(number, settings), 6) for number in (1, 2, 3, 4)]

    assert rates("linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates("constant") == [1.0] * 4
    assert rates("cosine") == [1.0, 0.853553, 0.5, 0.146447]


# ---- rounds -------------------------------------------------------------------------------------


def go(settings, rule, rounds):
    """A server and an engine after some rounds, and what every round's clients gave."""
    made = Federation.build(settings)
    options = settings.options.get(rule, {})
    server = Server(flk.rules.make(rule, **options), made.model, made.clients, settings)
    engine = LocalEngine(made, LocalTrainer(made.model, settings))
    given = []
    for number in range(1, rounds + 1):
        starts = {client.number: server.start(client, number) for client in made.clients}
        updates = engine.train(server, number, lambda: None)
        given.append((starts, updates, server.finish(number, updates, made.evaluate)))
    return made, server, engine, given


def same(one, other, side):
    return all(
        torch.equal(getattr(factors, side), getattr(other.factors[module], side))
        for module, factors in one.factors.items()
    )


def test_alternating_freezes_one_factor_and_makes_averaging_exact(small):
    """RoLoRA: all clients share the frozen factor, so averaging the other one is exact."""
    _, _, _, given = go(small(freeze="alternate", clients=3, rounds=3), "fedit", 3)
    for (starts, updates, record), (frozen, moved) in zip(given, ("ab", "ba", "ab"), strict=True):
        for update in updates:
            assert update.trains == moved
            assert same(update.adapter, starts[update.client], frozen)
            assert not same(update.adapter, starts[update.client], moved)
        assert record.relative_error < 1e-5
        sizes = [getattr(x, moved).nbytes for x in starts[0].factors.values()]
        assert record.bytes_up == record.bytes_down == 3 * sum(sizes), "the frozen one stays"
    (expected,) = plan(small(freeze="alternate", clients=3, rounds=3, rules=("fedit",))).traffic
    assert expected.up == pytest.approx(sum(x.bytes_up for *_, x in given) / 3, abs=1)
    assert expected.down == expected.up
    _, _, _, both = go(small(clients=3, rounds=3), "fedit", 3)
    assert both[-1][2].relative_error > 100 * given[-1][2].relative_error


class Counted(TorchDispatchMode):
    """Counts the calls of this library's operators."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fedlora":
            self.calls[operator._opname] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", flk.rules.names())
@pytest.mark.parametrize("pattern", [{}, {"v_proj": 2}], ids=["one batch", "two batches"])
def test_a_round_computes_its_gram_matrices_once(small, rule, pattern):
    """The rule, the average beside it, the report and the spectra: one pass for each batch."""
    settings = small(rounds=1, rank_pattern=pattern)
    made = Federation.build(settings)
    server = Server(flk.rules.make(rule), made.model, made.clients, settings)
    updates = LocalEngine(made, LocalTrainer(made.model, settings)).train(server, 1, lambda: None)
    batches = len({factors.layout for factors in updates[0].adapter.factors.values()})
    assert batches == 1 + len(pattern)
    with Counted() as counted:
        record = server.finish(1, updates, made.evaluate)
    assert counted.calls["gram_list"] == 2 * batches, "B and A of every batch, once"
    assert counted.calls["gram"] == 0
    assert counted.calls["stacked_svd"] == counted.calls["flora_na"] == 0
    assert all(any(module["spectrum"]) for module in record.modules.values())
    assert record.averaging_error is not None


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_plan_moves_the_bytes_of_a_round(small, rule):
    """Exactly, also of FedEx: the averages of rank r and a residual of the stacked rank R."""
    settings = small(rounds=1, clients=3, rules=(rule,))
    *_, ((_, updates, record),) = go(settings, rule, 1)
    (planned,) = plan(settings).traffic
    assert planned.up == record.bytes_up
    if flk.rules.find(rule).bounded and rule != "fedex":  # whose whole residual has the rank R
        assert planned.bound
        assert record.bytes_down <= planned.down
    else:
        assert planned.down == record.bytes_down
    if rule == "fedex":
        factors = updates[0].adapter.factors.values()
        parameters = sum(pair.b.shape[0] + pair.a.shape[1] for pair in factors)
        assert planned.down == 3 * 4 * (4 + 12) * parameters


def test_a_residual_that_is_cut_is_planned_so(small):
    settings = small(rounds=1, rules=("fedex",), options={"fedex": {"residual_rank": 2}})
    *_, ((*_, record),) = go(settings, "fedex", 1)
    (planned,) = plan(settings).traffic
    assert planned.down == record.bytes_down


def test_a_client_that_sat_out_starts_from_what_was_sent_last(small):
    settings = small(clients=4, participation=0.5, rounds=4)
    _, _, _, given = go(settings, "florist", 4)
    for number, (starts, updates, record) in enumerate(given, 1):
        assert record.clients == [update.client for update in updates]
        assert record.clients == participants(settings, number)
        for start in starts.values():
            assert same(start, starts[0], "b")
            assert same(start, starts[0], "a")
    assert given[1][0][0].factors.keys() == given[0][0][0].factors.keys()
    assert any(factors.b.any() for factors in given[1][0][0].factors.values())


def test_personal_parts_outlive_the_rounds_that_a_client_sits_out(small):
    made, server, _, given = go(small(clients=4, participation=0.5, rounds=3), "fedsa", 3)
    last = {}
    for starts, updates, _ in given:
        for number, start in starts.items():
            if number in last:
                assert same(start, last[number], "b"), "its own B"
            else:
                assert not any(factors.b.any() for factors in start.factors.values())
        last |= {update.client: update.adapter for update in updates}
    assert set(server.personal()) == set(last)
    for number, adapter in server.personal().items():
        assert same(adapter, last[number], "b")
        assert same(adapter, server.final(), "a")
    assert len(made.clients) == 4


def test_a_personal_rule_is_evaluated_per_client_and_as_one_model(small):
    settings = small(rounds=1, client_test_size=6)
    made, _, _, given = go(settings, "fedsa", 1)
    _, updates, record = given[0]
    result = flk.aggregate(
        [update.adapter for update in updates],
        rule="fedsa",
        weights=[update.examples for update in updates],
    )
    losses = [made.evaluate(result.client_adapter(k)).loss for k in range(2)]
    assert record.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert record.global_accuracy is not None
    assert set(record.client_accuracy) == {"0", "1"}
    own = made.evaluate(result.client_adapter(1), client=made.clients[1])
    assert record.client_accuracy["1"] == own.accuracy
    assert len(made.clients[1].tests) == 6


def test_vera_clients_share_lambda_d(small):
    made, server, _, given = go(small(method="vera", ranks=(8,), rounds=2), "fedsa", 2)
    (_, first, record), (starts, second, _) = given
    assert record.loss > 0
    assert 0 < record.relative_error < 1
    for module in made.model.modules:
        shared = [starts[number].vera[module][1] for number in (0, 1)]
        assert torch.equal(*shared)
        weights = [update.examples for update in first]
        sent = [update.adapter.vera[module][1].double() for update in first]
        mean = (weights[0] * sent[0] + weights[1] * sent[1]) / sum(weights)
        torch.testing.assert_close(shared[0].double(), mean, rtol=1e-6, atol=0)
        for number in (0, 1):
            assert torch.equal(
                starts[number].vera[module][0], first[number].adapter.vera[module][0]
            )
    assert len(second) == 2
    assert set(server.personal()) == {0, 1}


def test_vera_needs_equal_ranks_and_a_rule_that_can():
    from integration.rounds.rule import choose

    with pytest.raises(SettingsError, match="vera needs clients of one rank"):
        miniature(method="vera", ranks=(8, 4))
    with pytest.raises(SettingsError, match="fedit cannot aggregate VeRA vectors; fedsa can"):
        choose(miniature(method="vera", rules=("fedit",)), explicit=True)


def test_kept_moments_change_the_second_round_and_are_the_clients_own(small):
    reset = go(small(), "florist", 2)[3]
    _, _, engine, kept = go(small(optimizer_state="keep"), "florist", 2)
    for one, other in zip(reset[0][1], kept[0][1], strict=True):
        assert same(one.adapter, other.adapter, "b"), "the first round knows no moments"
    for one, other in zip(reset[1][1], kept[1][1], strict=True):
        assert not same(one.adapter, other.adapter, "b")
    steps = [moment["step"] for _, _, m in engine.state()["moments"] for moment in m.values()]
    assert {float(step) for step in steps} == {4.0}, "two rounds of two steps"


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("florist", {"rank_pattern": {"v_proj": 2}}),
        ("flora", {"ranks": (4, 2)}),
        ("fedex", {"method": "rslora"}),
        ("hetlora", {"ranks": (4, 2)}),
        ("fedsa", {}),
        ("fedsa", {"method": "vera"}),
        ("eclora", {"ranks": (4, 2)}),
        ("fedrot", {}),
        ("florg", {}),
        ("lora_a2", {"options": {"lora_a2": {"budget": 2}}}),
        ("fedmomentum", {"options": {"fedmomentum": {"momentum": 0.5}}}),
        ("flora_na", {"options": {"flora_na": {"around": "last", "shared": True}}}),
    ],
)
def test_a_restored_server_sends_the_same_bits(small, tmp_path, rule, changes):
    settings = small(participation=0.5, clients=2, optimizer_state="keep", **changes)
    made, server, engine, _ = go(settings, rule, 2)
    expected = [server.start(client, 3) for client in made.clients]
    base = made.model.base()
    write_state(tmp_path / "state.pt", [], server.state(), engine.state())
    _, of_server, of_engine = read_state(tmp_path / "state.pt")
    options = settings.options.get(rule, {})
    again = Server(flk.rules.make(rule, **options), made.model, made.clients, settings)
    again.restore(of_server)
    assert_same_memory(again.state()["carried"], server.state()["carried"])
    fresh = LocalEngine(made, LocalTrainer(made.model, settings))
    fresh.restore(of_engine)
    for name, weight in made.model.base().items():
        assert torch.equal(weight, base[name])
    for client, start in zip(made.clients, expected, strict=True):
        found = again.start(client, 3).state_dict()
        assert found.keys() == start.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in start.state_dict().items())
    one, other = (x.train(y, 3, lambda: None) for x, y in ((fresh, again), (engine, server)))
    for mine, theirs in zip(one, other, strict=True):
        tensors = theirs.adapter.state_dict()
        assert all(torch.equal(x, tensors[key]) for key, x in mine.adapter.state_dict().items())


def assert_same_memory(one, other):
    """Two rules' memories, as a state file holds them."""
    assert (one is None) == (other is None)
    if isinstance(one, dict) and "parts" in one:
        assert one["parts"].keys() == other["parts"].keys()
        for name, part in one["parts"].items():
            assert_same_memory(part, other["parts"][name])
    elif not isinstance(one, dict):
        assert one == other
    else:
        found, expected = (each["adapter"]["tensors"] for each in (one, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


MEMORY = [
    ("eclora", {}),
    ("eclora", {"error_rank": 2}),
    ("fedmomentum", {"momentum": 0.5}),
    ("fedrot", {}),
    ("florg", {}),
    ("flora_na", {"around": "last"}),
    ("flora_na", {"around": "last", "shared": True}),
    ("lora_a2", {"budget": 2}),
]
"""Every rule with memory, with the options that give it one."""


def test_every_rule_with_memory_is_among_them():
    kinds = [flk.rules.find(name) for name in flk.rules.names()]
    assert {kind.name for kind in kinds if kind.carry is not flk.Rule.carry} == dict(MEMORY).keys()


@pytest.mark.parametrize(("rule", "options"), MEMORY, ids=str)
def test_memory_is_the_same_through_carried_as_through_the_harness(small, rule, options):
    """Bit for bit, over three rounds."""
    _, server, _, given = go(small(rounds=3, options={rule: options}), rule, 3)
    carried = None
    for number, (_, updates, record) in enumerate(given):
        assert (carried is None) == (number == 0)
        result = flk.aggregate(
            [update.adapter for update in updates],
            rule=rule,
            weights=[update.examples for update in updates],
            carried=carried,
            **options,
        )
        carried = result.carried
        assert result.report.relative_error == record.relative_error
    assert_same_memory(serialize_memory(carried), server.state()["carried"])


def test_per_module_ranks_reach_the_aggregate(small):
    _, _, _, given = go(small(ranks=(6, 4), rank_pattern={"v_proj": 2}, rounds=1), "flora", 1)
    ranks = {name: module["rank"] for name, module in given[0][2].modules.items()}
    for name, found in ranks.items():
        assert found == (10 if name.endswith("q_proj") else 4)


def test_rounds_that_are_not_evaluated_say_nothing_of_accuracy(small, tmp_path):
    summary, lines = run(tmp_path, small(rounds=3, evaluate_every=2, rules=("florist", "fedit")))
    assert [entry["accuracy"] is None for entry in lines["florist"]] == [True, False, False]
    assert summary[0]["accuracy"] == lines["florist"][-1]["accuracy"]
    assert (tmp_path / "report.html").is_file()


def test_the_sum_of_merged_updates_is_one_adapter(small):
    """Beyond min(m, n) the stack is written by its singular values, without loss."""
    made = Federation.build(small())
    adapters = [made.model.fresh(4, seed) for seed in range(12)]
    for adapter in adapters:
        for factors in adapter.factors.values():
            factors.b.normal_(generator=torch.Generator().manual_seed(1))
    whole = total(adapters)
    for module, factors in whole.factors.items():
        assert factors.rank == 32
        expected = sum(adapter.delta(module) for adapter in adapters)
        error = (whole.delta(module) - expected).norm() / expected.norm()
        assert error < 1e-6


# ---- several seeds ------------------------------------------------------------------------------


def test_several_seeds_give_means_and_intervals(small, tmp_path):
    rules = ("florist", "fedit")
    settings = small(rules=rules, seeds=3, rounds=1, client_test_size=6)
    summary, lines = run(tmp_path, settings)
    for entry in summary:
        mine = lines[entry["rule"]]
        assert [line["seed"] for line in mine] == [0, 1, 2]
        assert entry["accuracies"] == [line["accuracy"] for line in mine]
        assert entry["accuracy"] == pytest.approx(sum(entry["accuracies"]) / 3)
        assert entry["loss"] == pytest.approx(sum(line["loss"] for line in mine) / 3)
        assert entry["accuracy_interval"] == interval(entry["accuracies"])
        assert entry["losses"] == [line["loss"] for line in mine]
        assert entry["loss_interval"] == interval(entry["losses"])
        own = [line["client_accuracy"].values() for line in mine]
        assert entry["client_accuracies"] == [sum(values) / len(values) for values in own]
        assert "\u00b1" in columns(summary)[1].text(entry)
    assert len({line["loss"] for line in lines["florist"]}) == 3
    run(tmp_path / "one", settings_like(settings, seeds=1, seed=1))
    again = metrics(tmp_path / "one")["florist"][0]
    assert again["loss"] == lines["florist"][1]["loss"], "a seed alone gives the same bits"
    assert (tmp_path / "adapters" / "florist" / "seed-2" / "adapter_config.json").is_file()


def test_intervals_are_students():
    """t(2) = 4.3027 at 95 %: mean 2, s = 1, n = 3."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert within_noise([0.70, 0.71, 0.72], [0.71, 0.70, 0.73])
    assert not within_noise([0.60, 0.61, 0.62], [0.70, 0.71, 0.72]), "pairs cancel the seeds"


# ---- size ---------------------------------------------------------------------------------------


def test_a_hundred_clients_in_ten_gigabytes(tmp_path):
    """With a tenth of them in a round, on the quickstart's model; measured: 0.78 GB."""
    flags = "--clients 100 --participation 0.1 --rounds 2 --steps 1 --batch-size 4 --max-tokens 12"
    more = "--test-size 40 --train-size 800 --ranks 8 --alpha 1 --optimizer-state keep"
    command = [sys.executable, "-m", "integration", "run", "--rule", "fedsa", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*command, str(tmp_path), *flags.split(), *more.split()],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert usage.ru_maxrss * 1024 < 10e9
    lines = metrics(tmp_path)["fedsa"]
    assert [len(line["clients"]) for line in lines] == [10, 10]
    assert len(list((tmp_path / "clients").iterdir())) == len(
        {client for line in lines for client in line["clients"]}
    )
