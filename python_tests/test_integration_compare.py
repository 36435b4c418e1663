"""A comparison end to end, in miniature: files, errors, ways of going on, reproducibility."""

import dataclasses
import json
import re

import pytest
import torch
from rich.console import Console

import fedlora_kernels as flk
from integration.client import Client
from integration.compare import choose, compare
from integration.model import Model
from integration.records import write
from integration.server import Server
from integration.settings import SettingsError, from_preset
from integration.tasks import TASKS, stdlib_chapters
from integration.tokens import Tokens

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


@pytest.fixture(scope="module", autouse=True)
def parse_the_library_once():
    """The strings are the same for every run of this process."""
    found = stdlib_chapters.strings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_chapters, "strings", lambda: found)
        yield


def tiny(**changes):
    """Two clients, two steps of four (after one, A has not moved: B was 0), a few strings."""
    small = {"clients": 2, "rounds": 2, "steps": 2, "test_size": 40, "train_size": 60}
    settings = from_preset("quickstart", **(small | changes))
    return dataclasses.replace(settings, batch_size=4, max_tokens=12, shared_per_class=2)


def run(out, settings, rules=None):
    """The summary, and the lines of metrics.jsonl by rule."""
    chosen, _ = choose(settings, explicit=False)
    chosen = [flk.rules()[name] for name in rules] if rules else chosen
    summary = compare(settings, chosen, out, Console(quiet=True))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, {name: [x for x in lines if x["rule"] == name] for name in RULES}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, *run(out, tiny())


def test_the_summary_has_one_object_per_rule(done):
    out, summary, _ = done
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [entry["rule"] for entry in summary] == list(RULES)
    for entry in summary:
        assert list(entry) == KEYS
        assert 0 <= entry["accuracy"] <= 1
        assert entry["start_accuracy"] == summary[0]["start_accuracy"]
        assert entry["bytes_up"] > 0
        assert entry["bytes_down"] > 0
        assert entry["aggregation_ms"] > 0


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
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "refers to another file"
    assert "<script" not in page
    for name in RULES:
        assert f"<td>{name}</td>" in page


def test_no_temporary_file_is_left(done):
    names = sorted(path.name for path in done[0].iterdir())
    assert names == ["metrics.jsonl", "report.html", "settings.json", "summary.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write(path, "old")

    def refuse(*_):
        raise OSError("disk")

    monkeypatch.setattr("integration.records.os.replace", refuse)
    with pytest.raises(OSError, match="disk"):
        write(path, "new")
    assert path.read_text() == "old"


def test_two_runs_are_equal_bit_for_bit(done, tmp_path):
    """Everything but the clock."""
    _, _, expected = done
    _, again = run(tmp_path, tiny(), ["fedit", "florist", "flora"])
    for name in ("fedit", "florist", "flora"):
        for first, second in zip(expected[name], again[name], strict=True):
            assert {**first, "aggregation_ms": 0} == {**second, "aggregation_ms": 0}


def test_the_seed_changes_the_run(done, tmp_path):
    _, other = run(tmp_path, tiny(seed=1), ["fedit"])
    assert other["fedit"][0]["loss"] != done[2]["fedit"][0]["loss"]


def test_unequal_ranks_leave_out_the_rules_that_need_equal_ones(tmp_path):
    settings = tiny(ranks=(4, 2))
    chosen, left_out = choose(settings, explicit=False)
    assert [rule.name for rule in chosen] == ["flora", "flexlora", "florist"]
    assert len(left_out) == 4
    assert all("needs clients of one rank, found 4,2; hetlora" in line for line in left_out)
    summary, lines = run(tmp_path, settings)
    assert [entry["rule"] for entry in summary] == ["flora", "flexlora", "florist"]
    assert lines["flora"][0]["rank"] == 6
    assert lines["flexlora"][0]["averaging_error"] is None


def test_merging_leaves_out_the_personal_rule():
    chosen, left_out = choose(tiny(after="merge"), explicit=False)
    assert [rule.name for rule in chosen] == [name for name in RULES if name != "fedsa"]
    assert left_out == ["left out: fedsa cannot merge: every client keeps its own B"]


def test_named_rules_that_cannot_run_are_errors():
    with pytest.raises(SettingsError, match=r"fedit needs clients of one rank.*hetlora"):
        choose(tiny(rules=("fedit",), ranks=(4, 2)), explicit=True)
    with pytest.raises(SettingsError, match="fedsa cannot merge"):
        choose(tiny(rules=("fedsa",), after="merge"), explicit=True)
    with pytest.raises(SettingsError, match="unknown rule 'fedavg'; known: fedit, ffa"):
        choose(tiny(rules=("fedavg",)), explicit=True)


# ---- what the clients start from next -----------------------------------------------------------


@pytest.fixture(scope="module")
def federation():
    """Model, clients, training and test tokens of a miniature federation."""
    settings = tiny()
    task = TASKS["stdlib_chapters"](test_size=40, shared_per_class=2, train_size=60)
    model = Model("all-MiniLM-L6-v2", [8], 2.0, settings.target_modules, 20.0)
    train, shared, test = (
        Tokens(part, model.tokenizer, 12) for part in (task.train, task.shared, task.test)
    )
    model.make_head(shared, 8)
    return model, [Client(0, 8, list(range(20))), Client(1, 8, list(range(20, 60)))], train, test


def one_round(federation, name, after):
    """A server after its first round, and the adapters that it aggregated."""
    model, clients, train, test = federation
    settings = tiny(after=after)
    server = Server(flk.rules()[name], model, clients, settings)
    adapters = [
        client.train(model, train, start, 1, settings, server.rule.trains)
        for client, start in zip(clients, server.starts, strict=True)
    ]
    server.finish(1, adapters, test)
    return server, adapters


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
    model = federation[0]
    model.restore()
    before = model.base()
    server, adapters = one_round(federation, name, after)
    changed = model.base()
    for module in model.modules:
        ideal = (20 * adapters[0].delta(module) + 40 * adapters[1].delta(module)) / 60
        in_base = (changed[module] - before[module]).double()
        start = server.starts[0].delta(module)
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
    for start, adapter in zip(server.starts, adapters, strict=True):
        for module, factors in adapter.factors.items():
            assert torch.equal(start.factors[module].b, factors.b)
    first, second = (start.factors for start in server.starts)
    assert all(torch.equal(first[module].a, second[module].a) for module in first)


def test_ffa_clients_do_not_move_a(federation):
    server, adapters = one_round(federation, "ffa", None)
    fresh = federation[0].fresh(8, 0, 1)
    for adapter in [*adapters, *server.starts]:
        for module, factors in adapter.factors.items():
            torch.testing.assert_close(factors.a, fresh.factors[module].a, rtol=1e-6, atol=0)
            assert factors.b.any()


def test_training_does_not_depend_on_who_trained_before(federation):
    model, clients, train, _ = federation
    settings = tiny()
    model.restore()
    start = model.fresh(8, 0, 1)
    alone = clients[1].train(model, train, start, 1, settings)
    clients[0].train(model, train, start, 1, settings)
    after_another = clients[1].train(model, train, start, 1, settings)
    for module, factors in alone.factors.items():
        assert torch.equal(factors.b, after_another.factors[module].b)
        assert torch.equal(factors.a, after_another.factors[module].a)


def test_batches_are_passes_over_the_clients_own_examples(federation):
    _, clients, train, _ = federation
    settings = dataclasses.replace(tiny(), steps=15)
    batches = clients[0].batches(train, 1, settings)
    drawn = [position for batch in batches for position in batch]
    assert [len(batch) for batch in batches] == [4] * 15
    assert all(drawn.count(position) == 3 for position in range(20))
    assert batches == clients[0].batches(train, 1, settings)
    assert batches != clients[0].batches(train, 2, settings)


def test_training_starts_from_the_clients_own_class_frequencies(federation):
    """log((n_c + 1) / (n + 8)): the frequencies of all classes, held or not, sum to 1."""
    _, clients, train, _ = federation
    labels = [int(train.labels[position]) for position in clients[0].positions]
    found = clients[0].log_frequencies(train, 8).exp()
    expected = torch.tensor([(labels.count(label) + 1) / 28 for label in range(8)])
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
