"""All rules through the same rounds, one after the other: same data, seeds and first start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

import fedlora_kernels as flk
from integration.model.trainer import LocalTrainer
from integration.report.html import write_report
from integration.report.live import Live
from integration.report.summary import write_summary
from integration.report.table import table
from integration.rounds import records
from integration.rounds.engine import EngineOf, LocalEngine
from integration.rounds.federation import Federation
from integration.rounds.loop import FirstRound, run_rounds
from integration.rounds.records import RoundRecord
from integration.rounds.server import Server
from integration.rounds.state import place
from integration.settings import Settings
from integration.tuning import tune


def compare(
    settings: Settings,
    rules: Sequence[flk.Rule],
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    engine: EngineOf = LocalEngine,
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
    start = federation.evaluate()
    write_settings = partial(
        records.write_settings, out, settings, start, questions=federation.questions(start)
    )
    write_settings()  # from here on the run can be resumed
    sizes = [len(client.positions) for client in federation.clients]
    dealt = ", ".join(map(str, sizes)) if len(sizes) <= 16 else f"{min(sizes)} to {max(sizes)} each"
    console.print(
        f"{len(federation.train)} training strings over {len(sizes)} clients ({dealt}), "
        f"{len(federation.test)} test strings, {len(federation.task.classes)} classes"
    )
    trainer = LocalTrainer(federation.model, settings)
    with Live(settings, rules, out, console) as live:
        rates = tune(federation, rules, trainer, engine, live, out)
        chosen = rates if settings.learning_rates else None
        write_settings(rates=chosen)
        if chosen:
            pairs = ", ".join(f"{rule} {rate:g}" for rule, rate in chosen.items())
            console.print(f"learning rates: {pairs}")
        rounds: list[RoundRecord] = []
        for more in _runs(federation, rules, rates, trainer, engine, live, out, resume=resume):
            rounds += more
            summary = write_summary(out, rounds, start, chosen)
    federation.model.restore()
    write_report(out)
    largest = federation.task.majority
    known = f" (largest class {largest:.3f})" if federation.task.kind == "classification" else ""
    console.print(f"\nstart: accuracy {start.accuracy:.3f}, loss {start.loss:.3f}{known}")
    console.print(table(summary, console.width))
    console.print(f"{out / 'report.html'}  ({perf_counter() - begun:.0f} s)")
    return summary


def _runs(
    federation: Federation,
    rules: Sequence[flk.Rule],
    rates: Mapping[str, float],
    trainer: LocalTrainer,
    engine: EngineOf,
    live: Live,
    out: Path,
    *,
    resume: bool,
) -> Iterator[list[RoundRecord]]:
    """Every seed's and rule's rounds; the adapters that they end with are on the disk then.

    What metrics.jsonl has all rounds of is done, also where its state was not kept.
    """
    settings = federation.settings
    kept = records.finished(out, settings) if resume else {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        first: dict[float, FirstRound] = defaultdict(dict)
        for rule in rules:
            dealt = federation.with_seed(seed).at(rates[rule.name])
            path, observer = place(out, rule.name, seed), live.rule(rule, dealt)
            if (rule.name, seed) in kept and not path.is_file():
                observer.restored(kept[rule.name, seed])
                yield kept[rule.name, seed]
                continue
            server = Server(rule, dealt.model, dealt.clients, dealt.settings)
            way = engine(dealt, trainer)
            share = first[dealt.settings.learning_rate]
            done = run_rounds(dealt, server, way, path, first=share, observer=observer)
            folder = _folder(out, rule, rules, seed, settings)
            records.write_adapters(folder, server.final(), server.personal())
            yield done


def _folder(
    out: Path, rule: flk.Rule, rules: Sequence[flk.Rule], seed: int, settings: Settings
) -> Path:
    """Where a rule's adapter goes: into `out` itself where it is the only one."""
    if len(rules) > 1:
        out = out / "adapters" / rule.name
    return out / f"seed-{seed}" if settings.seeds > 1 else out
