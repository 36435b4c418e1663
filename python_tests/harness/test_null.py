"""Rounds whose error has nothing to be relative to: null in the files, a gap in the report."""

import json
import math
import re
from dataclasses import replace

import pytest
from miniature import metrics, miniature, run

import fedlora_kernels as flk
from integration import files
from integration.report import figures
from integration.report.html import write_report
from integration.report.series import read_run
from integration.report.table import MISSING
from integration.rounds.engine import LocalEngine
from integration.rounds.state import place, read_state
from integration.settings import SettingsError


class Cancelling(LocalEngine):
    """Two clients whose updates cancel, while their averaged factors do not: B A - (B/2) (2 A)."""

    def train(self, server, number, on_step):
        one, other = super().train(server, number, on_step)
        factors = {
            module: replace(pair, a=2 * pair.a, b=-pair.b / 2)
            for module, pair in one.adapter.factors.items()
        }
        opposite = flk.Adapter(factors, one.adapter.config)
        return [one, replace(other, adapter=opposite, examples=one.examples)]


def strictly(folder):
    """Every JSON file of a run as a parser reads it that knows only what the standard has."""

    def unknown(word):
        raise AssertionError(f"{word} is not JSON")

    texts = [path.read_text() for path in sorted(folder.rglob("*.json"))]
    texts += (folder / "metrics.jsonl").read_text().splitlines()
    assert len(texts) > 3
    return [json.loads(text, parse_constant=unknown) for text in texts]


def test_a_round_without_an_update_is_written_and_drawn(tmp_path):
    """A learning rate so small that no B leaves zero."""
    settings = miniature(learning_rate=1e-60, rules=flk.rules.names(), rounds=1)
    summary, lines = run(tmp_path, settings)
    strictly(tmp_path)
    assert [entry["relative_error"] for entry in summary] == [0] * len(flk.rules.names())
    assert all(not any(module["spectrum"]) for module in lines["fedit"][0]["modules"].values())
    assert "Error of the aggregation" in (tmp_path / "report.html").read_text()


def test_an_error_beside_updates_that_cancel_is_null(tmp_path):
    settings = miniature(rules=("fedit", "florist"), rounds=2, partition="iid")
    summary, lines = run(tmp_path, settings, engine=Cancelling)
    strictly(tmp_path)
    by_rule = {entry["rule"]: entry for entry in summary}
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert by_rule["fedit"]["relative_error"] is None
    assert by_rule["florist"]["relative_error"] == 0
    for entry in lines["fedit"]:
        assert entry["relative_error"] is None
        assert {module["relative_error"] for module in entry["modules"].values()} == {None}
    drawn = re.findall(r"<!-- (.*?) -->", figures.errors(read_run(tmp_path).rules))
    assert MISSING in drawn
    assert "0" in drawn
    page = write_report(tmp_path).read_text()
    assert f"<td>{MISSING}</td>" in page


def test_a_run_with_nulls_is_resumed(tmp_path):
    """The state keeps the number itself; what is written from it is the same as before."""
    settings = miniature(rules=("fedit",), rounds=1, partition="iid")
    run(tmp_path, settings, engine=Cancelling)
    before = metrics(tmp_path)
    rounds, _, _ = read_state(place(tmp_path, "fedit", settings.seed))
    assert rounds[0].relative_error == math.inf
    summary, after = run(tmp_path, settings, engine=Cancelling, resume=True)
    assert after == before
    assert summary[0]["relative_error"] is None
    strictly(tmp_path)


def test_json_has_null_for_what_is_not_finite():
    content = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": None, "d": "NaN", "e": 2}
    expected = {"a": [1.5, None, [None, {"b": None}]], "c": None, "d": "NaN", "e": 2}
    assert json.loads(files.to_json(content)) == expected
    assert files.finite(content) == expected


@pytest.mark.parametrize("name", ["learning_rate", "alpha", "max_grad_norm", "logit_scale"])
def test_settings_are_finite(name):
    with pytest.raises(SettingsError, match=f"{name} must be finite, found inf"):
        miniature(**{name: math.inf})
