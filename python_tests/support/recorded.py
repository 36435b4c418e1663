"""Files of runs that never ran: what a report and a summary are made from."""

import json

from integration.report.summary import write_summary
from integration.rounds.evaluate import Score
from integration.rounds.records import Metrics, RoundRecord

SETTINGS = {
    "task": "a task",
    "model": "a <model>",
    "target_modules": ["q_proj"],
    "clients": 4,
    "rounds": 3,
    "steps": 2,
    "epochs": None,
    "batch_size": 8,
    "partition": "dirichlet",
    "alpha": 0.5,
    "participation": 0.5,
    "ranks": [8, 4],
    "seed": 0,
    "seeds": 1,
}


def a_round(rule, number, *, seed=0, **changes):
    """A round in which florist chooses rank 2 + layer and the others send 8."""
    modules = {
        f"model.layers.{layer}.self_attn.q_proj": {
            "rank": 2 + layer if rule == "florist" else 8,
            "relative_error": 0.2,
            "svd_floor": 0.2,
            "averaging_error": None,
            "spectrum": [1.0, 0.5, 0.25, 0.0],
        }
        for layer in range(3)
    }
    fields = {
        "clients": [0, 1],
        "relative_error": 0.2,
        "svd_floor": 0.2 if rule == "florist" else 0.1,
        "averaging_error": 0.3,
        "rank": 3.0,
        "bytes_up": 1_000_000,
        "bytes_down": 500_000,
        "train_loss": 1.0,
        "training_ms": 2000.0,
        "aggregation_ms": 20.0,
        "evaluation_ms": 100.0,
        "accuracy": 0.5 + 0.1 * number + 0.01 * seed,
        "loss": 1.0,
    }
    return RoundRecord(rule=rule, seed=seed, round=number, modules=modules, **(fields | changes))


def a_run(folder, rounds=None, **settings):
    """The files of a run."""
    rounds = rounds or [a_round(rule, n) for rule in ("fedit", "florist") for n in (1, 2, 3)]
    folder.mkdir(parents=True)
    content = {
        "settings": SETTINGS | settings,
        "start_accuracy": 0.5,
        "start_loss": 1.2,
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    (folder / "settings.json").write_text(json.dumps(content))
    metrics = Metrics(folder)
    for record in rounds:
        metrics.append(record)
    write_summary(folder, rounds, Score(0.5, 1.2))
    return folder
