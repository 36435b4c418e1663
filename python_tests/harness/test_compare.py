"""A comparison end to end, in miniature: files, errors, ways of going on, reproducibility."""

import dataclasses
import io
import json
import re

import pytest
import torch
from miniature import miniature, run, settings_like, timeless
from rich.console import Console

import fedlora_kernels as flk
from integration import files
from integration.model.trainer import LocalTrainer
from integration.rounds.client import Client
from integration.rounds.federation import Federation
from integration.rounds.rule import choose
from integration.rounds.server import Server
from integration.settings import SettingsError

RULES = ("fedit", "ffa", "fedsa", "flora", "flexlora", "florist", "flora_na")
KEYS = [
    "rule",
    "accuracy",
    "start_accuracy",
    "loss",
    "relative_error",
    "svd_floor",
    "rank",
    "bytes_up",
    "bytes_down",
    "aggregation_ms",
]
ROUNDING = 1e-5
"""Relative error that float32 factors may leave; measured 4e-9 (ffa, quickstart)."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, *run(out, miniature())


def test_the_summary_has_one_object_per_rule(done):
    out, summary, lines = done
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [entry["rule"] for entry in summary] == list(RULES)
    start = Federation.build(miniature()).evaluate()
    for entry in summary:
        assert list(entry) == KEYS
        rounds = lines[entry["rule"]]
        right = 40 * entry["accuracy"]
        assert right == pytest.approx(round(right)), "of 40 test examples"
        assert entry["accuracy"] == rounds[-1]["accuracy"]
        assert entry["loss"] == rounds[-1]["loss"]
        assert entry["start_accuracy"] == start.accuracy
        for name in ("relative_error", "svd_floor", "rank", "bytes_up", "bytes_down"):
            mean = (rounds[0][name] + rounds[1][name]) / 2
            assert entry[name] == pytest.approx(mean, abs=1e-12), name
        assert entry["bytes_up"] > 0
        assert entry["bytes_down"] > 0
        assert entry["aggregation_ms"] > 0
        assert entry["loss"] != start.loss


def test_the_metrics_have_one_line_per_rule_and_round(done):
    _, _, lines = done
    for name in RULES:
        assert [entry["round"] for entry in lines[name]] == [1, 2]
        assert all(len(entry["modules"]) == 12 for entry in lines[name])


@pytest.mark.parametrize("rule", ["flora", "ffa"])
def test_exact_rules_have_no_error(done, rule):
    for entry in done[2][rule]:
        assert max(m["relative_error"] for m in entry["modules"].values()) < ROUNDING


@pytest.mark.parametrize("rule", ["flexlora", "florist"])
def test_svd_rules_are_at_their_floor(done, rule):
    for entry in done[2][rule]:
        for module in entry["modules"].values():
            assert abs(module["relative_error"] - module["svd_floor"]) < ROUNDING


def test_florist_keeps_its_energy(done):
    """Error^2 is the energy left out: at most 1 - 0.9 in every module."""
    for entry in done[2]["florist"]:
        for module in entry["modules"].values():
            assert module["relative_error"] ** 2 <= 0.1 + ROUNDING


def test_flora_na_lies_between_the_floor_and_averaging(done):
    for entry in done[2]["flora_na"]:
        for module in entry["modules"].values():
            assert module["svd_floor"] - ROUNDING <= module["relative_error"]
            assert module["relative_error"] <= module["averaging_error"] + ROUNDING


def test_the_first_round_is_the_same_for_rules_that_train_the_same(done):
    """FedIT's own error in round 1 is what the others' adapters would lose by averaging."""
    lines = done[2]
    expected = lines["fedit"][0]["relative_error"]
    for name in ("fedsa", "flora", "flexlora", "florist", "flora_na"):
        assert lines[name][0]["averaging_error"] == pytest.approx(expected, abs=1e-12)


def test_traffic_is_what_the_rules_send(done):
    """12 modules of 384 x 384, rank 8, float32: 4 * 8 * 384 bytes a factor."""
    factor = 12 * 4 * 8 * 384 * 2  # two clients
    by_rule = {entry["rule"]: entry for entry in done[1]}
    assert by_rule["fedit"]["bytes_up"] == by_rule["fedit"]["bytes_down"] == 2 * factor
    assert by_rule["ffa"]["bytes_up"] == by_rule["fedsa"]["bytes_up"] == factor
    assert by_rule["flora"]["bytes_down"] == 2 * 2 * factor  # rank 16 = 2 * 8
    assert by_rule["flora"]["rank"] == 16


def test_the_report_is_one_file_that_names_every_rule(done):
    page = (done[0] / "report.html").read_text()
    assert page.count("<svg") == 6
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "refers to another file"
    assert "<script" not in page
    for name in RULES:
        assert f"<td>{name}</td>" in page


def test_no_temporary_file_is_left(done):
    names = sorted(path.name for path in done[0].iterdir())
    assert names == [
        "adapters",
        "metrics.jsonl",
        "report.html",
        "settings.json",
        "state",
        "summary.json",
    ]
    assert not list(done[0].rglob(".*")), "a temporary file"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write(path, "old")

    def refuse(*_):
        raise OSError("disk")

    monkeypatch.setattr("integration.files.os.replace", refuse)
    with pytest.raises(OSError, match="disk"):
        files.write(path, "new")
    assert path.read_text() == "old"


def test_two_runs_are_equal_bit_for_bit(done, tmp_path):
    """Everything but the clock."""
    _, _, expected = done
    _, again = run(tmp_path, miniature(), ["fedit", "florist", "flora"])
    for name in ("fedit", "florist", "flora"):
        assert timeless(expected[name]) == timeless(again[name])


@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_is_no_terminal_gets_a_line_a_round(tmp_path, terminal):
    """A terminal has bars instead."""
    settings = miniature(rules=("fedit", "flora"), evaluate_every=2)
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
    run(tmp_path, settings, console=console)
    _, lines = run(tmp_path, settings, console=console, resume=True)
    said = [line for line in console.file.getvalue().splitlines() if "seed 0:" in line]
    if terminal:
        assert not said
        return
    expected = []
    for title, name in (("FedIT", "fedit"), ("FLoRA", "flora")):
        last = lines[name][-1]
        expected += [
            f"{title}, seed 0: round 1 of 2",
            f"{title}, seed 0: round 2 of 2, accuracy {last['accuracy']:.3f}, "
            f"loss {last['loss']:.3f}",
        ]
    expected += [f"{title}, seed 0: had finished 2 rounds before" for title in ("FedIT", "FLoRA")]
    assert said == expected


def test_the_seed_changes_the_run(done, tmp_path):
    _, other = run(tmp_path, miniature(seed=1), ["fedit"])
    assert other["fedit"][0]["loss"] != done[2]["fedit"][0]["loss"]


def test_unequal_ranks_leave_out_the_rules_that_need_equal_ones(tmp_path):
    settings = miniature(ranks=(4, 2))
    chosen, left_out = choose(settings, explicit=False)
    assert [rule.name for rule in chosen] == ["flora", "flexlora", "florist"]
    assert len(left_out) == 4
    assert all("needs clients of one rank, found 4,2; hetlora" in line for line in left_out)
    summary, lines = run(tmp_path, settings)
    assert [entry["rule"] for entry in summary] == ["flora", "flexlora", "florist"]
    assert lines["flora"][0]["rank"] == 6
    assert lines["flexlora"][0]["averaging_error"] is None


def test_merging_leaves_out_the_personal_rule():
    chosen, left_out = choose(miniature(after="merge"), explicit=False)
    assert [rule.name for rule in chosen] == [name for name in RULES if name != "fedsa"]
    assert left_out == ["left out: fedsa cannot merge: every client keeps its own B"]


def test_named_rules_that_cannot_run_are_errors():
    with pytest.raises(SettingsError, match=r"fedit needs clients of one rank.*hetlora"):
        choose(miniature(rules=("fedit",), ranks=(4, 2)), explicit=True)
    with pytest.raises(SettingsError, match="fedsa cannot merge"):
        choose(miniature(rules=("fedsa",), after="merge"), explicit=True)
    with pytest.raises(SettingsError, match=r"unknown rule 'fedavg'; known: fedit, .*ffa"):
        choose(miniature(rules=("fedavg",)), explicit=True)


# ---- what the clients start from next -----------------------------------------------------------


@pytest.fixture(scope="module")
def federation():
    """A miniature federation of two clients with 20 and 40 examples, and its trainer."""
    settings = miniature(ranks=(8, 8))
    made = Federation.build(settings)
    clients = (Client(0, 8, list(range(20))), Client(1, 8, list(range(20, 60))))
    made = dataclasses.replace(made, clients=clients)
    return made, LocalTrainer(made.model, settings)


def train(federation, number, start, **changes):
    """One client's update from a start."""
    made, trainer = federation
    settings = settings_like(made.settings, **changes)
    return made.clients[number].train(made.model, trainer, made.train, start, 1, settings)


def one_round(federation, name, after):
    """A server after its first round, and the adapters that it aggregated."""
    made, trainer = federation
    settings = settings_like(made.settings, after=after)
    server = Server(flk.rules.make(name), made.model, made.clients, settings)
    updates = [
        client.train(
            made.model,
            trainer,
            made.train,
            server.start(client, 1),
            1,
            settings,
            server.trains(1),
        )
        for client in made.clients
    ]
    server.finish(1, updates, made.evaluate)
    return server, [update.adapter for update in updates]


def starts(server, federation):
    """What both clients start round 2 from."""
    return [server.start(client, 2) for client in federation[0].clients]


@pytest.mark.parametrize(
    ("name", "after", "merges", "fresh"),
    [
        ("flora", None, True, True),
        ("flora", "continue", False, False),
        ("florist", None, False, False),
        ("florist", "merge", True, True),
        ("fedex", None, True, False),
        ("fedex", "merge", True, True),
    ],
)
def test_base_and_starts_carry_the_whole_update(federation, name, after, merges, fresh):
    """Base change + start = ideal update, up to the truncation that fitting into rank 8 costs."""
    model = federation[0].model
    model.restore()
    before = model.base()
    server, adapters = one_round(federation, name, after)
    changed = model.base()
    for module in model.modules:
        ideal = (20 * adapters[0].delta(module) + 40 * adapters[1].delta(module)) / 60
        in_base = (changed[module] - before[module]).double()
        start = starts(server, federation)[0].delta(module)
        assert bool(in_base.any()) == merges
        assert bool(start.any()) != fresh
        sigma = torch.linalg.svdvals(ideal)
        lost = 0.0 if name in ("fedex",) or fresh else float(sigma[8:].norm())
        energy_left_out = 0.1**0.5 * float(ideal.norm()) if name == "florist" else 0.0
        missing = float((in_base + start - ideal).norm())
        assert missing <= lost + energy_left_out + 1e-4 * float(ideal.norm())
    model.restore()


def test_fedsa_clients_keep_their_own_b(federation):
    server, adapters = one_round(federation, "fedsa", None)
    for start, adapter in zip(starts(server, federation), adapters, strict=True):
        for module, factors in adapter.factors.items():
            assert torch.equal(start.factors[module].b, factors.b)
    first, second = (start.factors for start in starts(server, federation))
    assert all(torch.equal(first[module].a, second[module].a) for module in first)


def test_ffa_clients_do_not_move_a(federation):
    server, adapters = one_round(federation, "ffa", None)
    fresh = federation[0].model.fresh(8, 0, 1)
    for adapter in [*adapters, *starts(server, federation)]:
        for module, factors in adapter.factors.items():
            torch.testing.assert_close(factors.a, fresh.factors[module].a, rtol=1e-6, atol=0)
            assert factors.b.any()


def test_training_does_not_depend_on_who_trained_before(federation):
    model = federation[0].model
    model.restore()
    start = model.fresh(8, 0, 1)
    alone = train(federation, 1, start).adapter
    train(federation, 0, start)
    after_another = train(federation, 1, start).adapter
    for module, factors in alone.factors.items():
        assert torch.equal(factors.b, after_another.factors[module].b)
        assert torch.equal(factors.a, after_another.factors[module].a)


def test_batches_are_passes_over_the_clients_own_examples(federation):
    made = federation[0]
    client, settings = made.clients[0], settings_like(made.settings, steps=15)
    batches = client.batches(made.train, 1, settings)
    drawn = [position for batch in batches for position in batch]
    assert [len(batch) for batch in batches] == [4] * 15
    assert all(drawn.count(position) == 3 for position in range(20))
    assert batches == client.batches(made.train, 1, settings)
    assert batches != client.batches(made.train, 2, settings)


def test_epochs_are_whole_passes(federation):
    made = federation[0]
    settings = settings_like(made.settings, steps=None, epochs=2, batch_size=16)
    batches = made.clients[0].batches(made.train, 1, settings)
    assert sorted(len(batch) for batch in batches) == [8, 16, 16]
    assert len(batches) == 3
    drawn = [position for batch in batches for position in batch]
    assert all(drawn.count(position) == 2 for position in range(20))


def test_training_starts_from_the_clients_own_class_frequencies(federation):
    """log((n_c + 1) / (n + 8)): the frequencies of all classes, held or not, sum to 1."""
    made = federation[0]
    labels = [int(made.train.labels[position]) for position in made.clients[0].positions]
    found = made.clients[0].log_frequencies(made.train, 8).exp()
    expected = torch.tensor([(labels.count(label) + 1) / 28 for label in range(8)])
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
