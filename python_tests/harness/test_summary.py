"""summary.json and the table: scores of seeds and of clients, what is marked, what gives way."""

import json
import math
import re

import pytest
from recorded import a_round, a_run
from rich.console import Console

from integration.report.html import write_report
from integration.report.intervals import interval
from integration.report.summary import write_summary
from integration.report.table import MISSING, SPARE, columns, table
from integration.rounds.evaluate import Score

START = Score(0.5, 1.2)
ACCURACIES = {"fedit": (0.70, 0.72, 0.71), "florist": (0.71, 0.70, 0.72), "ffa": (0.5, 0.52, 0.51)}
LOSSES = {"fedit": (1.0, 1.2, 1.1), "florist": (0.5, 0.7, 0.6), "ffa": (0.51, 0.69, 0.61)}


def over_seeds(**changes):
    """One round of three rules under three seeds."""
    return [
        a_round(rule, 1, seed=seed, accuracy=accuracy, loss=LOSSES[rule][seed], **changes)
        for rule, accuracies in ACCURACIES.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def on_own(rule, seed=0, **own):
    """A last round in which clients were tested on examples of their own."""
    return a_round(rule, 3, seed=seed, client_accuracy=own, global_accuracy=0.6)


def shown(summary, width):
    """The table as a terminal of this width shows it."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(summary, width))
    return captured.get()


def titles(summary):
    return [column.title for column in columns(summary)]


def test_the_loss_has_its_interval_and_its_own_best(tmp_path):
    summary = write_summary(tmp_path, over_seeds(), START)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for entry in summary:
        losses = LOSSES[entry["rule"]]
        assert entry["losses"] == list(losses)
        assert entry["loss"] == pytest.approx(sum(losses) / 3)
        assert entry["loss_interval"] == interval(losses)
    assert [entry["within_noise"] for entry in summary] == [True, True, False]
    assert [entry["loss_within_noise"] for entry in summary] == [False, True, True]


def test_a_rule_with_fewer_seeds_yet_is_not_compared(tmp_path):
    """A run in the middle: the rules with all seeds are told apart, the others wait."""
    rounds = [x for x in over_seeds() if (x.rule, x.seed) != ("florist", 2)]
    summary = write_summary(tmp_path, rounds, START)
    assert ["within_noise" in entry for entry in summary] == [True, False, True]
    assert [len(entry["accuracies"]) for entry in summary] == [3, 2, 3]


def test_the_learning_rates_that_were_chosen(tmp_path):
    rates = {"fedit": 0.01, "florist": 0.002, "ffa": 0.01}
    summary = write_summary(tmp_path, over_seeds(), START, rates)
    assert {entry["rule"]: entry["learning_rate"] for entry in summary} == rates
    assert "rate" in titles(summary)
    assert "rate" not in titles(write_summary(tmp_path, over_seeds(), START))


def test_one_seed_has_no_interval(tmp_path):
    (entry,) = write_summary(tmp_path, [a_round("fedit", 1)], START)
    assert not [key for key in entry if "interval" in key or "noise" in key or key == "losses"]


def test_client_tests_are_averaged_over_the_clients_then_over_the_seeds(tmp_path):
    """Only the last round's clients count."""
    rounds = [on_own("fedit", a=0.0), on_own("fedit", a=0.5, b=0.7), on_own("fedit", 1, a=0.9)]
    (entry,) = write_summary(tmp_path, rounds, START)
    assert entry["client_accuracies"] == pytest.approx([0.6, 0.9])
    assert entry["client_accuracy"] == pytest.approx(0.75)
    assert entry["client_accuracy_interval"] == interval(entry["client_accuracies"])
    assert entry["client_within_noise"] is True
    assert "global_accuracy" not in entry, "its clients run the global model"
    assert titles([entry])[:4] == ["rule", "accuracy", "clients", "loss"]


def test_runs_without_client_tests_have_none_in_their_summary(tmp_path):
    (entry,) = write_summary(tmp_path, [a_round("fedsa", 1, global_accuracy=0.6)], START)
    assert not [key for key in entry if "client" in key or "global" in key]
    assert titles([entry])[:3] == ["rule", "accuracy", "loss"]


def test_a_personal_rule_has_the_accuracy_of_the_one_global_model(tmp_path):
    rounds = [on_own("fedit", a=0.5, b=0.7), on_own("fedsa", a=0.8, b=1.0)]
    averaged, personal = write_summary(tmp_path, rounds, START)
    assert personal["client_accuracy"] == pytest.approx(0.9)
    assert personal["global_accuracy"] == 0.6
    assert "global_accuracy" not in averaged
    clients, whole = columns([averaged, personal])[2:4]
    assert (clients.text(averaged), whole.text(averaged)) == ("0.600", MISSING)
    assert (clients.text(personal), whole.text(personal)) == ("0.900", "0.600")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_seed_that_diverged_has_no_interval_and_is_not_the_best(tmp_path, value):
    rounds = over_seeds()
    rounds[3] = a_round("florist", 1, seed=0, accuracy=0.71, loss=value)
    fedit, florist, ffa = write_summary(tmp_path, rounds, START)
    assert (florist["loss"], florist["loss_interval"], florist["losses"][0]) == (None, None, None)
    assert florist["loss_within_noise"] is False
    assert ffa["loss_within_noise"] is True
    assert fedit["loss_within_noise"] is False
    assert florist["within_noise"] is True, "of the accuracy nothing is missing"
    assert MISSING in shown([fedit, florist, ffa], 120)


def test_the_report_explains_and_marks_the_clients_column(tmp_path):
    rounds = [
        on_own(rule, seed, a=a + seed / 100)
        for rule, a in (("fedit", 0.5), ("fedsa", 0.8))
        for seed in (0, 1)
    ]
    page = write_report(a_run(tmp_path / "run", rounds, seeds=2)).read_text()
    assert "<th>clients</th>" in page
    assert '<td class="best">0.805 \u00b1 0.064 ~</td>' in page
    assert "Clients: accuracy of what a client runs on its own test examples" in page
    assert "Global: accuracy of the clients&#x27; mean update" in page
    assert "~: within noise of the best rule" in page
    plain = write_report(a_run(tmp_path / "plain")).read_text()
    assert "<th>clients</th>" not in plain
    assert "within noise" not in plain


def test_a_summary_of_an_earlier_version_is_drawn_and_shown(tmp_path):
    """Several seeds, and none of the keys that came later."""
    folder = a_run(tmp_path / "run", over_seeds(), seeds=3)
    later = ("losses", "loss_interval", "loss_within_noise")
    summary = json.loads((folder / "summary.json").read_text())
    earlier = [{k: v for k, v in entry.items() if k not in later} for entry in summary]
    (folder / "summary.json").write_text(json.dumps(earlier))
    assert re.search(
        r"0\.710 \u00b1 0\.025 ~</td><td>1\.100</td>", write_report(folder).read_text()
    )
    assert "0.710 \u00b1 0.025 ~" in shown(earlier, 80)


def test_what_is_spare_gives_way_in_a_narrow_terminal(tmp_path):
    """Nothing that stays is cut off."""
    rounds = [
        on_own(rule, seed, a=0.5 + seed / 100, b=0.7)
        for rule in ("flora_na", "fedsa")
        for seed in (0, 1)
    ]
    summary = write_summary(tmp_path, rounds, START)
    wide = shown(summary, 140)
    assert wide.count("1.000 \u00b1 0.000 ~") == 2
    for text in ("clients", "global", "agg. ms", "SVD floor"):
        assert text in wide.splitlines()[0]
    narrow = shown(summary, 80)
    assert "\u2026" not in narrow
    assert " 1.000 " in narrow
    assert "1.000 \u00b1" not in narrow
    assert narrow.splitlines()[0].split()[:3] == ["rule", "accuracy", "clients"]
    assert len(SPARE) == 5, "the order is part of what the table promises"
