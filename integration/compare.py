"""All rules through the same rounds, one after the other: same data, seeds and first start."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fedlora_kernels as flk
from integration import records
from integration.client import Client
from integration.model import Model
from integration.partition import dirichlet
from integration.report import write_report
from integration.server import Round, Server
from integration.settings import Settings, SettingsError
from integration.table import table
from integration.tasks import TASKS
from integration.tokens import Tokens


def choose(settings: Settings, *, explicit: bool) -> tuple[list[flk.Rule], list[str]]:
    """The rules that the settings allow, and one line for each that is left out.

    Raises SettingsError for an unknown rule, and, where the rules were named by the user
    (`explicit`), for one that the ranks or `after` rule out.
    """
    known = flk.rules()
    if unknown := [name for name in settings.rules if name not in known]:
        raise SettingsError(f"unknown rule {unknown[0]!r}; known: {', '.join(known)}")
    chosen: list[flk.Rule] = []
    dropped: list[str] = []
    for name in dict.fromkeys(settings.rules):
        rule = known[name]
        reason = ""
        if settings.heterogeneous and not rule.heterogeneous:
            ranks = ",".join(map(str, settings.ranks))
            reason = f"{name} needs clients of one rank, found {ranks}; hetlora averages them"
        elif rule.personal and settings.after == "merge":
            reason = f"{name} cannot merge: every client keeps its own B"
        try:
            rule.check_options(settings.options.get(name, {}))
        except TypeError as error:
            raise SettingsError(str(error)) from None
        if reason and explicit:
            raise SettingsError(reason)
        if reason:
            dropped.append(f"left out: {reason}")
        else:
            chosen.append(rule)
    if not chosen:
        raise SettingsError("no rule is left to compare; " + "; ".join(dropped))
    return chosen, dropped


def compare(
    settings: Settings, rules: Sequence[flk.Rule], out: Path, console: Console
) -> list[dict[str, Any]]:
    """Run every rule, write the files of a run into `out`, print the table, return the summary."""
    begun = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"making task {settings.task}, loading {settings.model}")
    task = TASKS[settings.task](
        test_size=settings.test_size,
        shared_per_class=settings.shared_per_class,
        train_size=settings.train_size,
    )
    model = Model(
        settings.model,
        settings.ranks,
        settings.lora_scaling,
        settings.target_modules,
        settings.logit_scale,
    )
    train, shared, test = (
        Tokens(examples, model.tokenizer, settings.max_tokens)
        for examples in (task.train, task.shared, task.test)
    )
    parts = dirichlet(train.labels.tolist(), settings.clients, settings.alpha, settings.seed)
    clients = [
        Client(number, rank, positions)
        for number, (rank, positions) in enumerate(zip(settings.ranks, parts, strict=True))
    ]
    model.make_head(shared, len(task.classes))
    start = model.judge(test)
    records.write_settings(out, settings, start)
    console.print(
        f"{len(train)} training strings over {len(clients)} clients "
        f"({', '.join(str(len(client.positions)) for client in clients)}), {len(test)} test "
        f"strings, {len(task.classes)} classes"
    )
    rounds = _rounds(settings, rules, model, clients, train, test, out, console)
    summary = records.write_summary(out, rounds, start[0])
    write_report(out)
    console.print(
        f"\nstart: accuracy {start[0]:.3f}, loss {start[1]:.3f} (largest class {task.majority:.3f})"
    )
    console.print(table(summary))
    console.print(f"{out / 'report.html'}  ({perf_counter() - begun:.0f} s)")
    return summary


def _rounds(
    settings: Settings,
    rules: Sequence[flk.Rule],
    model: Model,
    clients: Sequence[Client],
    train: Tokens,
    test: Tokens,
    out: Path,
    console: Console,
) -> list[Round]:
    """Every rule's rounds. Rules that train the same factors share the first round's training."""
    done: list[Round] = []
    first: dict[str, list[flk.Adapter]] = {}
    with _bars(console) as bars:
        total = bars.add_task("all rules", total=len(rules) * settings.rounds)
        for rule in rules:
            server = Server(rule, model, clients, settings)
            steps = len(clients) * settings.steps
            bar = bars.add_task(rule.title, total=settings.rounds * steps)
            for number in range(1, settings.rounds + 1):
                if number == 1 and rule.trains in first:
                    adapters = first[rule.trains]
                    bars.advance(bar, steps)
                else:
                    adapters = [
                        client.train(
                            model,
                            train,
                            start,
                            number,
                            settings,
                            rule.trains,
                            partial(bars.advance, bar),
                        )
                        for client, start in zip(clients, server.starts, strict=True)
                    ]
                if number == 1:
                    first.setdefault(rule.trains, adapters)
                done.append(server.finish(number, adapters, test))
                records.write_metrics(out, done)
                bars.advance(total)
                bars.update(bar, description=f"{rule.title} {done[-1].accuracy:.3f}")
    model.restore()
    return done


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
