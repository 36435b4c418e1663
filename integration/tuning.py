"""Each rule's learning rate, chosen before its runs.

Every rule goes through all rounds at each of the run's `learning_rates`, once under each of its
first `tuning_seeds` seeds. The rate whose worst loss on the validation split is lowest is the
rule's in all its runs: a rate that collapses under one seed is not chosen for its mean. Those
examples come from the training split and no client holds them; the test split is not looked at.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import fedlora_kernels as flk
from integration import files
from integration.model.trainer import LocalTrainer
from integration.report.live import Live
from integration.rounds.engine import EngineOf
from integration.rounds.federation import Federation
from integration.rounds.loop import FirstRound, run_rounds
from integration.rounds.server import Server
from integration.rounds.state import place
from integration.settings import SettingsError


@dataclass(frozen=True)
class Trial:
    """One rule after all rounds at one learning rate, on the validation split."""

    rule: str
    learning_rate: float
    accuracy: float | None
    loss: float | None
    """None where the rule diverged."""
    seed: int = 0


def tune(
    federation: Federation,
    rules: Sequence[flk.Rule],
    trainer: LocalTrainer,
    engine: EngineOf,
    live: Live,
    out: Path,
) -> dict[str, float]:
    """Rule -> its learning rate; without `learning_rates` in the settings, theirs for all.

    Writes `out/tuning.json`, all trials so far, after each of them, and goes on from it.
    Raises SettingsError where a rule diverges at every rate.
    """
    settings = federation.settings
    if not settings.learning_rates:
        return {rule.name: settings.learning_rate for rule in rules}
    trials = _read(out)
    tried = {(trial.rule, trial.learning_rate, trial.seed) for trial in trials}
    seeds = range(settings.seed, settings.seed + settings.tuning_seeds)
    for rate, seed in product(settings.learning_rates, seeds):
        at_rate, first = federation.with_seed(seed).trial(rate), FirstRound()
        for rule in rules:
            if (rule.name, rate, seed) in tried:
                continue
            path = place(out / "tuning" / f"{rate:g}", rule.name, seed)
            server = Server(rule, at_rate.model, at_rate.clients, at_rate.settings)
            observer = live.trial(rule, at_rate)
            accuracy = loss = None
            try:
                way = engine(at_rate, trainer)
                last = run_rounds(at_rate, server, way, path, first=first, observer=observer)[-1]
                accuracy, loss = last.accuracy, last.loss
            except flk.AdapterError as error:
                observer.warn(f"{rule.name} at learning rate {rate:g}: {error}")
            trials.append(Trial(rule.name, rate, accuracy, loss, seed))
            _write(out, trials)
            path.unlink(missing_ok=True)
    return {rule.name: best(trials, rule.name) for rule in rules}


def best(trials: Sequence[Trial], rule: str) -> float:
    """The rule's learning rate of the lowest worst loss over the seeds; a loss that is not finite
    is the worst. Raises SettingsError where no rate has finite losses only.
    """
    worst: dict[float, float] = {}
    for trial in trials:
        if trial.rule == rule:
            loss = math.inf if trial.loss is None or math.isnan(trial.loss) else trial.loss
            worst[trial.learning_rate] = max(worst.get(trial.learning_rate, -math.inf), loss)
    rate = min(worst, key=lambda rate: (worst[rate], rate))
    if worst[rate] == math.inf:
        rates = ", ".join(f"{rate:g}" for rate in worst)
        raise SettingsError(f"{rule} diverges at every learning rate of {rates}; add a lower one")
    return rate


def _read(out: Path) -> list[Trial]:
    path = out / "tuning.json"
    return [Trial(**x) for x in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def _write(out: Path, trials: Sequence[Trial]) -> None:
    content = [dataclasses.asdict(trial) for trial in trials]
    files.write(out / "tuning.json", files.to_json(content, indent=2) + "\n")
