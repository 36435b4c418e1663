"""TensorBoard's event files say what metrics.jsonl says; W&B gets the same through its calls."""

import sys
from types import SimpleNamespace

import pytest

from integration.report.tracking import Tracker, scalars
from integration.rounds.records import RoundRecord
from integration.settings import SettingsError, from_preset


def a_round(rule, number, seed=0, **changes):
    fields = {
        "clients": [0],
        "relative_error": 0.25,
        "svd_floor": 0.125,
        "averaging_error": None,
        "rank": 3.5,
        "bytes_up": 1000,
        "bytes_down": 500,
        "train_loss": 1.5,
        "training_ms": 20.0,
        "aggregation_ms": 2.0,
        "evaluation_ms": 1.0,
        "modules": {},
        "accuracy": 0.5 + 0.125 * number,
    }
    return RoundRecord(rule=rule, seed=seed, round=number, **(fields | changes))


def send(settings, out):
    """Two rules of two rounds, the second rule with two seeds."""
    sent = [a_round("fedit", 1), a_round("fedit", 2, accuracy=None, lost={"1": "late"})]
    sent += [a_round("florist", number, seed) for seed in (0, 1) for number in (1, 2)]
    with Tracker(settings, out) as tracker:
        for entry in sent:
            tracker.round(entry)


def test_event_files_hold_every_number(tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs TensorBoard: pip install tensorboard",
    )
    send(from_preset("quickstart", track="tensorboard"), tmp_path)
    folders = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert folders == ["fedit-seed-0", "florist-seed-0", "florist-seed-1"]
    events = reader.EventAccumulator(str(tmp_path / "tensorboard" / "fedit-seed-0"))
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert found["score/accuracy"] == [(1, 0.625)], "round 2 was not evaluated"
    assert found["score/lost_clients"] == [(1, 0.0), (2, 1.0)]
    assert found["error/svd_floor"] == [(1, 0.125), (2, 0.125)]
    assert found["traffic/bytes_up"] == [(1, 1000.0), (2, 1000.0)]
    assert "error/averaging_error" not in found


def test_every_rule_and_seed_is_a_run_of_wandb(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(("init", options["name"], options["config"]["rule"]))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)),
            finish=lambda: calls.append(("finish",)),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    send(from_preset("quickstart", track="wandb"), tmp_path)
    kinds = [call[0] for call in calls]
    assert kinds == ["init", "log", "log", "finish"] * 3
    assert [call[1] for call in calls if call[0] == "init"] == [
        *("fedit seed 0", "florist seed 0", "florist seed 1")
    ]
    assert calls[1][2] == scalars(a_round("fedit", 1))


def test_nothing_is_written_without_the_setting(tmp_path):
    send(from_preset("quickstart"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_an_error_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="track wandb needs it: pip install wandb"):
        Tracker(from_preset("quickstart", track="wandb"), tmp_path)
