"""What a report draws: every rule of every run as one series of rounds, means over its seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from integration.settings import SettingsError

FILES = ("settings.json", "metrics.jsonl", "summary.json")

TIMES = ("training_ms", "transfer_ms", "aggregation_ms", "evaluation_ms")

MEANS = (
    "accuracy",
    "relative_error",
    "svd_floor",
    "averaging_error",
    "rank",
    "bytes_up",
    "bytes_down",
    *TIMES,
)
"""Fields of a round that are averaged over the seeds. A field that a seed lacks, or that is null
because it is not finite, stays None."""

Rounds = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """The files of one run."""

    name: str
    """Its folder's name."""
    settings: Mapping[str, Any]
    """settings.json as a whole."""
    summary: Sequence[Mapping[str, Any]]
    rules: Mapping[str, Rounds]
    """Rule -> its rounds, ascending; `lowest` and `highest` are the accuracies of the worst and the
    best seed, `modules` and `texts` those of the first one, `missing` how many clients were
    lost."""

    @property
    def start(self) -> float:
        """Accuracy before the first round."""
        return float(self.settings["start_accuracy"])


def read_run(folder: Path) -> Run:
    """Read a run's three files. Raises SettingsError where one is missing."""
    for name in reversed(FILES):
        if not (folder / name).is_file():
            raise SettingsError(f"{folder} has no {name}; expected the folder of an earlier run")
    settings, metrics, summary = (folder / name for name in FILES)
    lines: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for line in map(_parsed, metrics.read_text(encoding="utf-8").splitlines()):
        lines.setdefault(line["rule"], {}).setdefault(line["round"], []).append(line)
    return Run(
        folder.resolve().name,
        _parsed(settings.read_text(encoding="utf-8")),
        _parsed(summary.read_text(encoding="utf-8")),
        {rule: [_mean(rounds[n]) for n in sorted(rounds)] for rule, rounds in lines.items()},
    )


def together(runs: Sequence[Run]) -> dict[str, Rounds]:
    """Label -> rounds of all runs; the label is the rule, of several runs with the run's name."""
    return {label(run, rule, runs): run.rules[rule] for run in runs for rule in run.rules}


def label(run: Run, rule: str, runs: Sequence[Run]) -> str:
    """What a series is called."""
    if len(runs) == 1:
        return rule
    names = [other.name for other in runs]
    name = run.name if names.count(run.name) == 1 else f"{run.name} {runs.index(run) + 1}"
    return f"{rule}, {name}"


def _parsed(text: str) -> Any:
    """JSON; the NaN and Infinity that earlier versions wrote are read as null."""
    return json.loads(text, parse_constant=lambda _: None)


def _mean(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One round of all seeds."""
    first = seeds[0]
    entry: dict[str, Any] = {"round": first["round"], "modules": first.get("modules", {})}
    entry["texts"] = first.get("texts", [])
    for name in MEANS:
        values = [seed.get(name) for seed in seeds]
        there = [float(value) for value in values if value is not None]
        entry[name] = fmean(there) if len(there) == len(values) else None
    accuracies = [seed["accuracy"] for seed in seeds if seed.get("accuracy") is not None]
    entry["lowest"], entry["highest"] = min(accuracies, default=None), max(accuracies, default=None)
    entry["missing"] = sum(len(seed.get("lost", {})) for seed in seeds)
    return entry
