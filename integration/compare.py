"""All rules through the same rounds, one after the other: same data, seeds and first start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

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
from integration import records
from integration.engine import Engine, LocalEngine
from integration.federation import Federation
from integration.partition import participants
from integration.records import Round
from integration.report import write_report
from integration.rounds import FirstRound, take_through
from integration.server import Server
from integration.settings import Settings, SettingsError
from integration.state import place
from integration.summary import write_summary
from integration.table import table
from integration.tracking import Tracker
from integration.trainer import LocalTrainer


def choose(settings: Settings, *, explicit: bool) -> tuple[list[flk.Rule], list[str]]:
    """The rules that the settings allow, and one line for each that is left out.

    Raises SettingsError for an unknown rule, and, where the rules were named by the user
    (`explicit`), for one that the ranks or `after` rule out.
    """
    known = flk.rules.names()
    if unknown := [name for name in settings.rules if name not in known]:
        raise SettingsError(f"unknown rule {unknown[0]!r}; known: {', '.join(known)}")
    chosen: list[flk.Rule] = []
    dropped: list[str] = []
    for name in dict.fromkeys(settings.rules):
        rule = flk.rules.find(name)
        reason = ""
        if settings.heterogeneous and not rule.heterogeneous:
            ranks = ",".join(map(str, settings.ranks))
            reason = f"{name} needs clients of one rank, found {ranks}; hetlora averages them"
        elif rule.personal and settings.after == "merge":
            reason = f"{name} cannot merge: every client keeps its own B"
        elif settings.method == "vera" and not rule.personal:
            reason = f"{name} cannot aggregate VeRA vectors; fedsa can"
        try:
            made = rule.with_options(settings.options.get(name, {}))
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from None
        if reason and explicit:
            raise SettingsError(reason)
        if reason:
            dropped.append(f"left out: {reason}")
        else:
            chosen.append(made)
    if not chosen:
        raise SettingsError("no rule is left to compare; " + "; ".join(dropped))
    return chosen, dropped


def compare(
    settings: Settings,
    rules: Sequence[flk.Rule],
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    engine: Callable[[Federation, LocalTrainer], Engine] = LocalEngine,
) -> list[dict[str, Any]]:
    """Run every rule, write the files of a run into `out`, print the table, return the summary.

    With `resume` the finished rounds of an earlier call with equal settings count as done. `engine`
    makes every rule's way to the clients.
    """
    begun = perf_counter()
    for warning in records.open_folder(out, settings, resume=resume):
        console.print(f"warning: {warning}")
    named = f"a random {settings.config}" if settings.init == "random" else settings.model
    console.print(f"making task {settings.task}, loading {named}")
    federation = Federation.build(settings)
    start = federation.judge()
    records.write_settings(out, settings, start)
    sizes = [len(client.positions) for client in federation.clients]
    dealt = ", ".join(map(str, sizes)) if len(sizes) <= 16 else f"{min(sizes)} to {max(sizes)} each"
    console.print(
        f"{len(federation.train)} training strings over {len(sizes)} clients ({dealt}), "
        f"{len(federation.test)} test strings, {len(federation.task.classes)} classes"
    )
    rounds = _rounds(federation, rules, out, console, engine)
    summary = write_summary(out, rounds, start)
    write_report(out)
    largest = federation.task.majority
    known = f" (largest class {largest:.3f})" if federation.task.kind == "classification" else ""
    console.print(f"\nstart: accuracy {start.accuracy:.3f}, loss {start.loss:.3f}{known}")
    console.print(table(summary, console.width))
    console.print(f"{out / 'report.html'}  ({perf_counter() - begun:.0f} s)")
    return summary


def _rounds(
    federation: Federation,
    rules: Sequence[flk.Rule],
    out: Path,
    console: Console,
    engine: Callable[[Federation, LocalTrainer], Engine],
) -> list[Round]:
    """Every seed's and rule's rounds, and the adapters that they end with."""
    settings = federation.settings
    done: list[Round] = []
    trainer = LocalTrainer(federation.model, settings)
    with _bars(console) as bars, Tracker(settings, out) as tracker:
        whole = bars.add_task("all rules", total=len(rules) * settings.rounds * settings.seeds)
        for seed in range(settings.seed, settings.seed + settings.seeds):
            dealt = federation.with_seed(seed)
            first: FirstRound = {}
            for rule in rules:
                server = Server(rule, dealt.model, dealt.clients, dealt.settings)
                bar = bars.add_task(rule.title, total=_steps(dealt, settings.rounds))
                told = partial(_tell, bars, whole, bar, tracker, dealt, out, tuple(done))
                done += take_through(
                    dealt,
                    server,
                    engine(dealt, trainer),
                    place(out, rule.name, seed),
                    first=first,
                    on_step=partial(bars.advance, bar),
                    on_round=told,
                    warn=lambda warning: console.print(f"warning: {warning}"),
                )
                folder = _folder(out, rule, rules, seed, settings)
                records.write_adapters(folder, server.final(), server.personal())
    federation.model.restore()
    return done


def _tell(
    bars: Progress,
    whole: TaskID,
    bar: TaskID,
    tracker: Tracker,
    federation: Federation,
    out: Path,
    done: Sequence[Round],
    rounds: Sequence[Round],
) -> None:
    """After a round: its line in metrics.jsonl, its followers, and the bars."""
    records.write_metrics(out, [*done, *rounds])
    tracker.round(rounds[-1])
    bars.update(whole, completed=len(done) + len(rounds))
    bars.update(bar, completed=_steps(federation, len(rounds)))
    last = rounds[-1]
    if last.accuracy is not None:
        title = flk.rules.find(last.rule).title
        bars.update(bar, description=f"{title} {last.accuracy:.3f}")


def _folder(
    out: Path, rule: flk.Rule, rules: Sequence[flk.Rule], seed: int, settings: Settings
) -> Path:
    """Where a rule's adapter goes: into `out` itself where it is the only one."""
    if len(rules) > 1:
        out = out / "adapters" / rule.name
    return out / f"seed-{seed}" if settings.seeds > 1 else out


def _steps(federation: Federation, rounds: int) -> int:
    """Optimiser steps of all clients in the first rounds."""
    settings = federation.settings
    return sum(
        federation.clients[k].steps(settings)
        for number in range(1, rounds + 1)
        for k in participants(settings, number)
    )


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
