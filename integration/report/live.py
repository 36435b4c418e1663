"""Where the rounds of a running comparison go: metrics.jsonl, a tracker, and the screen.

A terminal shows bars. Other output (a file, a pipe) gets one line for each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

import fedlora_kernels as flk
from integration.report.tracking import Tracker
from integration.rounds.federation import Federation
from integration.rounds.loop import Observer
from integration.rounds.partition import participants
from integration.rounds.records import Metrics, RoundRecord
from integration.settings import Settings


class Live(AbstractContextManager["Live"]):
    """Writes metrics.jsonl, feeds the tracker and shows the progress of a comparison."""

    def __init__(
        self, settings: Settings, rules: Sequence[flk.Rule], out: Path, console: Console
    ) -> None:
        """Raises SettingsError where the package of a tracker is not installed."""
        self.console = console
        self.metrics = Metrics(out)
        self.tracker = Tracker(settings, out)
        self.bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.whole = self.bars.add_task(
            "all rules",
            total=len(rules)
            * settings.rounds
            * (settings.seeds + len(settings.learning_rates) * settings.tuning_seeds),
        )
        self._stack = ExitStack()

    def __enter__(self) -> Live:
        self._stack.enter_context(self.bars)
        self._stack.enter_context(self.tracker)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rule(self, rule: flk.Rule, federation: Federation) -> Observer:
        """An observer of one rule's rounds under one seed."""
        return _OneRule(self, rule, federation, rule.title)

    def trial(self, rule: flk.Rule, federation: Federation) -> Observer:
        """An observer of one rule's rounds at one learning rate; only the screen is told."""
        return _Shown(self, rule, federation, f"{rule.title} {federation.settings.learning_rate:g}")


class _Shown(Observer):
    """Shows one rule's rounds on the screen."""

    def __init__(self, live: Live, rule: flk.Rule, federation: Federation, title: str) -> None:
        self._live = live
        self._title = title
        self._federation = federation
        steps = _steps(federation, federation.settings.rounds)
        self._bar: TaskID = live.bars.add_task(title, total=steps)

    def restored(self, records: list[RoundRecord]) -> None:
        self._show(records[-1], len(records))
        if not self._live.console.is_terminal:
            self._live.console.print(f"{self._name()} had finished {len(records)} rounds before")

    def step(self) -> None:
        self._live.bars.advance(self._bar)

    def finished(self, record: RoundRecord) -> None:
        self._show(record, 1)
        if not self._live.console.is_terminal:
            scores = {"accuracy": record.accuracy, "loss": record.loss}
            told = [f"{name} {score:.3f}" for name, score in scores.items() if score is not None]
            done = f"round {record.round} of {self._federation.settings.rounds}"
            self._live.console.print(", ".join([f"{self._name()} {done}", *told]))

    def warn(self, warning: str) -> None:
        self._live.console.print(f"warning: {warning}")

    def _show(self, record: RoundRecord, rounds: int) -> None:
        bars = self._live.bars
        bars.advance(self._live.whole, rounds)
        bars.update(self._bar, completed=_steps(self._federation, record.round))
        if record.accuracy is not None:
            bars.update(self._bar, description=f"{self._title} {record.accuracy:.3f}")

    def _name(self) -> str:
        settings = self._federation.settings
        return f"{self._title}, seed {settings.seed}:"


class _OneRule(_Shown):
    """Passes one rule's rounds on to the files and the tracker too."""

    def restored(self, records: list[RoundRecord]) -> None:
        for record in records:
            self._live.metrics.append(record)
        # The tracker may have missed the last one: the state is on the disk before it is told.
        self._live.tracker.round(records[-1])
        super().restored(records)

    def finished(self, record: RoundRecord) -> None:
        self._live.metrics.append(record)
        self._live.tracker.round(record)
        super().finished(record)


def _steps(federation: Federation, rounds: int) -> int:
    """Optimizer steps of all clients in the first rounds."""
    settings = federation.settings
    return sum(
        federation.clients[k].steps(settings)
        for number in range(1, rounds + 1)
        for k in participants(settings, number)
    )
