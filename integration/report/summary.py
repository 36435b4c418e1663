"""summary.json: what every rule comes to, over its rounds and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import fedlora_kernels as flk
from integration import files
from integration.report.intervals import interval, within_noise
from integration.rounds.evaluate import Score
from integration.rounds.records import RoundRecord


class Measure(NamedTuple):
    """A score of the last round, one for every seed, and the keys that several seeds add."""

    name: str
    values: str
    """The scores by seed."""
    noise: str | None
    """Whether the rule cannot be told from the best one."""
    best: Callable[..., Any]

    @property
    def interval(self) -> str:
        """Half the width of the mean's 95 % interval."""
        return f"{self.name}_interval"


MEASURES = (
    Measure("accuracy", "accuracies", "within_noise", max),
    Measure("loss", "losses", "loss_within_noise", min),
    Measure("client_accuracy", "client_accuracies", "client_within_noise", max),
    Measure("global_accuracy", "global_accuracies", None, max),
)


def write_summary(
    out: Path,
    rounds: Sequence[RoundRecord],
    start: Score,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Write `out/summary.json`: one object per rule, in the order of the rounds; also returned.

    Accuracy and loss are the last round's. The errors, the rank and the bytes are means over the
    rounds, the milliseconds their median (the first call of a process pays for its warm-up).

    `rates` are the learning rates that were chosen for the rules, where they were.

    Where clients have tests of their own, `client_accuracy` is the mean over the clients of the
    last round, each with what it runs on its own examples; a personal rule then also has the
    `global_accuracy` of its clients' mean update.

    With several seeds all of them are means over the seeds, and each score has its values by seed
    (`accuracies`, `losses`, ...), half the width of its mean's 95 % interval (`accuracy_interval`,
    ...) and whether it cannot be told from the best rule's (`within_noise`, `loss_within_noise`,
    `client_within_noise`; not of a rule that has fewer seeds yet). The interval is that of the
    seeds: the test examples are the same for all of them. A mean over a value that is not finite is
    None.
    """
    by_rule: dict[str, dict[int, list[RoundRecord]]] = {}
    for entry in rounds:
        by_rule.setdefault(entry.rule, {}).setdefault(entry.seed, []).append(entry)
    summary: list[dict[str, Any]] = []
    for rule, seeds in by_rule.items():
        entries = [entry for of_seed in seeds.values() for entry in of_seed]
        scores = _scores(rule, [of_seed[-1] for of_seed in seeds.values()])
        means = {name: fmean(values) for name, values in scores.items()}
        item: dict[str, Any] = {
            "rule": rule,
            "accuracy": means.pop("accuracy"),
            "start_accuracy": start.accuracy,
            "loss": means.pop("loss"),
            "relative_error": fmean(entry.relative_error for entry in entries),
            "svd_floor": fmean(entry.svd_floor for entry in entries),
            "rank": fmean(entry.rank for entry in entries),
            "bytes_up": round(fmean(entry.bytes_up for entry in entries)),
            "bytes_down": round(fmean(entry.bytes_down for entry in entries)),
            "aggregation_ms": median(entry.aggregation_ms for entry in entries),
            **means,
        }
        if rates:
            item["learning_rate"] = rates[rule]
        for measure in MEASURES if len(seeds) > 1 else ():
            if values := scores.get(measure.name):
                item |= {measure.interval: interval(values), measure.values: values}
        summary.append(item)
    for measure in MEASURES:
        _mark(summary, measure)
    found: list[dict[str, Any]] = files.finite(summary)
    files.write(out / "summary.json", files.to_json(found, indent=2) + "\n")
    return found


def _scores(rule: str, last: Sequence[RoundRecord]) -> dict[str, list[float]]:
    """Score -> its values by seed, of the scores that the rule has."""
    scores = {
        "accuracy": [_number(entry.accuracy) for entry in last],
        "loss": [_number(entry.loss) for entry in last],
    }
    if all(entry.client_accuracy for entry in last):
        scores["client_accuracy"] = [fmean(entry.client_accuracy.values()) for entry in last]
        whole = [entry.global_accuracy for entry in last if entry.global_accuracy is not None]
        if flk.rules.find(rule).personal and len(whole) == len(last):
            scores["global_accuracy"] = whole
    return scores


def _mark(summary: Sequence[dict[str, Any]], measure: Measure) -> None:
    """Say of every rule with several seeds whether it cannot be told from the best one.

    A rule that diverged under a seed is neither the best nor within noise.
    """
    seeds = max((len(item.get(measure.values, ())) for item in summary), default=0)
    mine = [item for item in summary if seeds and len(item.get(measure.values, ())) == seeds]
    told = [item for item in mine if math.isfinite(item[measure.name])]
    if measure.noise is None or not mine:
        return
    best = measure.best(told, key=lambda item: item[measure.name], default=None)
    for item in mine:
        item[measure.noise] = item in told and within_noise(
            item[measure.values], best[measure.values]
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
