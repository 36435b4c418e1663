"""--dry-run: what a run would hold, move and take, without weights, data or a network.

The partition is the real one, of the data where they are generated or on the disk, else of
published sizes and label shares. The model is built on torch's meta device from its shape, and PEFT
puts its adapters there, so the modules and their sizes are the real ones too. Bytes follow from
both; memory is an estimate, with its formula beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table

import fedlora_kernels as flk
from integration.model import loading
from integration.model.model import PREFIX, peft_config
from integration.rounds.client import Client
from integration.rounds.partition import participants, partition
from integration.rounds.rule import make_rule, trained
from integration.rounds.traffic import traffic
from integration.settings import Settings, SettingsError
from integration.tasks import TASKS, LoadedTask, find_task, load_task

ADAPTERS = torch.float32
"""PEFT keeps adapters in float32, whatever the base is in."""

FLOAT = ADAPTERS.itemsize
"""Bytes of an adapter's number."""

ACTIVATIONS = 17
"""Numbers that training keeps per token, layer and unit of width: 34 bytes at 2 bytes each (arXiv
2205.05198, equation 1, without the attention scores, which fused attention does not store)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round under one rule, all participants, at most."""

    rule: str
    up: int
    down: int
    bound: bool
    """Whether the real number depends on the data and is at most this."""


@dataclass(frozen=True)
class Plan:
    """One run, before it is run."""

    settings: Settings
    data: str
    """Where the partition's sizes come from."""
    examples: tuple[int, ...]
    """Training examples of every client."""
    tests: int
    parameters: int
    """Of the base model."""
    modules: dict[str, tuple[int, int]]
    """Module with an adapter -> (m, n)."""
    ranks: dict[int, dict[str, int]]
    """Client rank -> module -> its rank."""
    head: int
    """Parameters of a head that the clients train."""
    steps: tuple[int, ...]
    """Optimizer steps of every client in one round."""
    traffic: tuple[Traffic, ...]
    memory: dict[str, int]
    """Bytes on the training device, by what they are for."""

    def adapter(self, rank: int) -> int:
        """Parameters that a client of this rank trains."""
        tensors = self.shapes(self.ranks[rank]).state_dict().values()
        return sum(tensor.numel() for tensor in tensors)

    def shapes(self, ranks: Mapping[str, int]) -> flk.Adapter:
        """An adapter of these ranks (module -> rank) whose tensors have shapes and no numbers."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=ADAPTERS, device="meta")

        extras = {"head": empty(self.head)} if self.head else {}
        sizes = {module: (ranks[module], *size) for module, size in self.modules.items()}
        if self.settings.method == "vera":
            vera = {module: (empty(m), empty(r)) for module, (r, m, _) in sizes.items()}
            return flk.Adapter({}, {}, vera=vera, extras=extras)
        factors = {
            module: flk.Factors(empty(m, r), empty(r, n), 1.0)
            for module, (r, m, n) in sizes.items()
        }
        return flk.Adapter(factors, {}, extras=extras)


def plan(settings: Settings) -> Plan:
    """Plan the run. Raises SettingsError and TaskError for whatever could not run either."""
    data, labels, tests, task = _data(settings)
    held = partition(labels, settings)
    config, parameters, modules, ranks, head = _shape(settings, task)
    clients = [Client(k, r, p) for k, (r, p) in enumerate(zip(settings.ranks, held, strict=True))]
    planned = Plan(
        settings=settings,
        data=data,
        examples=tuple(map(len, held)),
        tests=tests,
        parameters=parameters,
        modules=modules,
        ranks=ranks,
        head=head,
        steps=tuple(client.steps(settings) for client in clients),
        traffic=(),
        memory={},
    )
    return replace(
        planned,
        traffic=tuple(_traffic(planned, make_rule(settings, name)) for name in settings.rules),
        memory=_memory(planned, config, task),
    )


def show(planned: Plan, console: Console) -> None:
    """Print the plan."""
    settings = planned.settings
    asked = len(participants(settings, 1))
    examples, steps = planned.examples, planned.steps
    rows = {
        "task": f"{settings.task}: {sum(examples)} training and {planned.tests} test examples",
        "": planned.data,
        "partition": f"{settings.partition} over {settings.clients} clients, {asked} a round: "
        f"{_span(examples)} examples each",
        "model": f"{settings.model}, {planned.parameters:,} parameters",
        "adapters": f"{len(planned.modules)} modules; "
        + ", ".join(f"rank {r}: {planned.adapter(r):,} parameters" for r in planned.ranks),
        "work": f"{_counted(len(settings.rules), 'rule')} x {_counted(settings.seeds, 'seed')} x "
        f"{_counted(settings.rounds, 'round')} of {_span(steps)} steps of {settings.batch_size} "
        "examples",
    }
    if rates := settings.learning_rates:
        with_seeds = "one seed" if settings.tuning_seeds == 1 else f"{settings.tuning_seeds} seeds"
        rows["before"] = (
            f"as many rounds of every rule at {len(rates)} learning rates, {with_seeds}"
        )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    console.print()
    traffic = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    for column in ("rule", "up MB", "down MB", "whole run GB"):
        traffic.add_column(column, justify="left" if column == "rule" else "right")
    for item in planned.traffic:
        most = "<= " if item.bound else ""
        runs = settings.seeds + len(settings.learning_rates) * settings.tuning_seeds
        whole = (item.up + item.down) * settings.rounds * runs
        traffic.add_row(
            item.rule, f"{item.up / 1e6:.2f}", f"{most}{item.down / 1e6:.2f}", f"{whole / 1e9:.3f}"
        )
    console.print(traffic)
    console.print()
    memory = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1))
    memory.add_column("memory where it trains (an estimate)")
    memory.add_column("GB", justify="right")
    for name, size in planned.memory.items():
        memory.add_row(name, f"{size / 1e9:.2f}")
    memory.add_row("together", f"{sum(planned.memory.values()) / 1e9:.2f}")
    console.print(memory)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _data(settings: Settings) -> tuple[str, list[int], int, LoadedTask]:
    """Where the sizes come from, the training labels, the number of tests, the task; without its
    examples where the sizes are published ones.
    """
    task = find_task(settings.task)
    source = task.local(settings.data, settings.task_options).get("source")
    if task.row is None or (source and Path(source).exists()):
        loaded = load_task(settings)
        labels = [example.label for example in loaded.train]
        return "counted here", labels, len(loaded.test), loaded
    which = task.which(settings.task_options)
    found = task.published.get(which)
    if found is None:
        known = [f"{x.name} {name}".strip() for x in TASKS.values() for name in x.published]
        raise SettingsError(
            f"no size of {f'{task.name} {which}'.strip()!r} is known here; known: "
            f"{', '.join(known)}; other data are planned from files (task_options.source)"
        )
    tests = min(settings.test_size, found.test or settings.test_size)
    labels = [label for label, count in enumerate(found.train) for _ in range(count)]
    spent = settings.shared_per_class * len(found.train) if task.kind == "classification" else 0
    spent += settings.validation_size + (0 if found.test else tests)
    kept = min(len(labels) - spent, settings.train_size or len(labels))
    if kept < 1:
        raise SettingsError(f"{len(labels)} examples leave none for training; lower test_size")
    places = [place * len(labels) // kept for place in range(kept)]  # the labels' own shares
    classes = tuple(map(str, range(len(found.train))))
    empty = LoadedTask(task.name, classes, (), (), (), task.kind)
    return f"sizes: {found.source}", [labels[place] for place in places], tests, empty


def _shape(
    settings: Settings, task: LoadedTask
) -> tuple[Any, int, dict[str, tuple[int, int]], dict[int, dict[str, int]], int]:
    """The model's config, its parameters, the modules with adapters, their ranks by client rank,
    and the parameters of a head that is trained.
    """
    config = loading.shape(settings.config or str(loading.folder(settings.model)))
    config.num_labels = max(2, len(task.classes))
    kind, options = loading.auto_class(config, settings, task)
    modules: dict[str, tuple[int, int]] = {}
    ranks: dict[int, dict[str, int]] = {}
    with loading.quiet(), torch.device("meta"):
        base = kind.from_config(config, **options)
        parameters = base.num_parameters()
        for rank in sorted(set(settings.ranks)):
            name = f"rank{rank}"
            try:
                if not ranks:
                    model = get_peft_model(base, peft_config(settings, task, rank), name)
                else:
                    model.add_adapter(name, peft_config(settings, task, rank))
            except ValueError as error:
                raise SettingsError(f"{settings.model}: {str(error).splitlines()[0]}") from None
            ranks[rank] = {}
            for path, layer in model.named_modules():
                if hasattr(layer, "base_layer") and name in layer.r:
                    module = path.removeprefix(PREFIX)
                    modules[module] = tuple(layer.base_layer.weight.shape)
                    ranks[rank][module] = layer.r[name]
        own = [p for name, p in model.named_parameters() if f"modules_to_save.rank{rank}" in name]
    return config, parameters, modules, ranks, sum(p.numel() for p in own)


def _traffic(planned: Plan, rule: flk.Rule) -> Traffic:
    """What the participants of a round send and receive; a mean where they differ by round.

    The library's own delivery counts the bytes, of adapters of the real shapes without numbers.
    """
    settings = planned.settings
    clients = {rank: planned.shapes(ranks) for rank, ranks in planned.ranks.items()}
    up, down = [], []
    for number in range(1, min(settings.rounds, 20) + 1):
        asked = [settings.ranks[k] for k in participants(settings, number)]
        widest = {
            module: rule.widest([planned.ranks[rank][module] for rank in asked], size)
            for module, size in planned.modules.items()
        }
        delivery = flk.Delivery(rule, planned.shapes(widest), heads=rule.heads)
        sent, received = traffic(
            delivery, [clients[rank] for rank in asked], trained(rule, settings, number)
        )
        up.append(sent)
        down.append(received)
    return Traffic(rule.name, round(fmean(up)), round(fmean(down)), rule.bounded)


def _memory(planned: Plan, config: Any, task: LoadedTask) -> dict[str, int]:
    """Bytes of the base, the adapters, one client's training and one aggregation."""
    settings = planned.settings
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    dtype = loading.fastest(settings).dtype
    half = dtype == "bfloat16" or (dtype == "auto" and gpu)
    number = 2 if half else 4
    together = min(settings.batch_size, settings.micro_batch_size or settings.batch_size)
    tokens = together * settings.max_tokens
    width, layers = config.hidden_size, config.num_hidden_layers
    kept = ACTIVATIONS * layers
    if settings.gradient_checkpointing:
        kept = layers + ACTIVATIONS  # the layers' inputs, and one layer at a time
    asked = participants(settings, 1)
    largest = max(planned.adapter(rank) for rank in planned.ranks)
    stacked = sum(planned.adapter(settings.ranks[k]) for k in asked)
    widest = max(
        sum(planned.ranks[settings.ranks[k]][module] for k in asked) for module in planned.modules
    )
    grams = 8 * 4 * len(planned.modules) * widest**2
    return {
        f"base weights in {'bfloat16' if half else 'float32'}": number * planned.parameters,
        "adapters of every rank, in place": FLOAT
        * sum(planned.adapter(rank) for rank in planned.ranks),
        "gradients and AdamW's moments of the largest": 3 * FLOAT * largest,
        f"activations of {tokens} tokens": math.ceil(kept * tokens * width * number),
        "logits and their gradient in float32": 2 * FLOAT * tokens * config.vocab_size
        if task.kind == "language"
        else 0,
        f"the adapters of {len(asked)} clients, aggregated": FLOAT * stacked + grams,
    }


def _span(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
