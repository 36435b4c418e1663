"""--dry-run: what a run would hold, move and take, without weights, data or a network.

The partition is the real one, of the data where they are generated or on the disk, else of
published sizes and label shares. The model is built on torch's meta device from its shape, and PEFT
puts its adapters there, so the modules and their sizes are the real ones too. Bytes follow from
both; memory is an estimate, with its formula beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from peft import get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table

import fedlora_kernels as flk
from integration import loading
from integration.client import Client
from integration.model import PREFIX, peft_config
from integration.partition import participants, partition
from integration.published import published
from integration.server import AVERAGES, trained
from integration.settings import Settings, SettingsError
from integration.tasks import TASKS, Task, load_task

GENERATED = ("stdlib_chapters", "stdlib_code", "arithmetic")
"""Tasks that make their own data."""

FLOAT = 4
"""Bytes of an adapter's number: PEFT keeps adapters in float32, whatever the base is in."""

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
    """Optimiser steps of every client in one round."""
    traffic: tuple[Traffic, ...]
    memory: dict[str, int]
    """Bytes on the training device, by what they are for."""

    def adapter(self, rank: int) -> int:
        """Parameters that a client of this rank trains."""
        modules = self.ranks[rank]
        return self.head + sum(self.size(name, r, "both") for name, r in modules.items())

    def size(self, module: str, rank: int, factors: str) -> int:
        """Parameters of "both" factors of a module, of "a" or of "b" (VeRA: of its vectors)."""
        m, n = self.modules[module]
        a, b = (rank, m) if self.settings.method == "vera" else (rank * n, rank * m)
        return {"both": a + b, "a": a, "b": b}[factors]


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
        traffic=tuple(_traffic(planned, flk.rules.find(name)) for name in settings.rules),
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
        "work": f"{len(settings.rules)} rules x {settings.seeds} seeds x {settings.rounds} rounds "
        f"of {_span(steps)} steps of {settings.batch_size} examples",
    }
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
        whole = (item.up + item.down) * settings.rounds * settings.seeds
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


def _data(settings: Settings) -> tuple[str, list[int], int, Task]:
    """Where the sizes come from, the training labels, the number of tests, the task's kind."""
    if settings.task not in TASKS:
        raise SettingsError(f"unknown task {settings.task!r}; known: {', '.join(TASKS)}")
    source = settings.task_options.get("source")
    if settings.task in GENERATED or (source and Path(source).exists()):
        task = load_task(settings)
        labels = [example.label for example in task.train]
        return "counted here", labels, len(task.test), task
    found = published(settings)
    tests = min(settings.test_size, found.test or settings.test_size)
    labels = [label for label, count in enumerate(found.train) for _ in range(count)]
    spent = (
        settings.shared_per_class * len(found.train) if _kind(settings) == "classification" else 0
    )
    spent += 0 if found.test else tests
    kept = min(len(labels) - spent, settings.train_size or len(labels))
    if kept < 1:
        raise SettingsError(f"{len(labels)} examples leave none for training; lower test_size")
    places = [place * len(labels) // kept for place in range(kept)]  # the labels' own shares
    classes = tuple(map(str, range(len(found.train))))
    task = Task(settings.task, classes, (), (), (), _kind(settings))
    return f"sizes: {found.source}", [labels[place] for place in places], tests, task


def _kind(settings: Settings) -> Literal["classification", "language"]:
    return "classification" if settings.task == "glue" else "language"


def _shape(
    settings: Settings, task: Task
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


def _traffic(planned: Plan, rule: type[flk.Rule]) -> Traffic:
    """What the participants of a round send and receive; a mean where they differ by round."""
    settings, modules, ranks = planned.settings, planned.modules, planned.ranks
    numbers = range(1, min(settings.rounds, 20) + 1)
    head = 0 if rule.personal else FLOAT * planned.head

    def moving(number: int) -> str:
        """The factors that change: a fixed one stays where it is (RoLoRA)."""
        return trained(rule, settings, number) if rule.sends == "both" else rule.sends

    def size(rank: int, module: str, factors: str) -> int:
        return FLOAT * planned.size(module, rank, factors)

    def received(asked: list[int], module: str, factors: str) -> int:
        own = [ranks[settings.ranks[k]][module] for k in asked]
        stacked = sum(own)
        if rule.receives in ("leading", "own"):
            return sum(size(rank, module, rule.sends) for rank in own)
        wide = {"flora": stacked, "florist": min(stacked, *modules[module])}
        if rule.name == "fedex":  # the averages, and their residual of the stacked rank at most
            wide["fedex"] = 2 * max(own) + stacked
        factors = factors if rule.name in AVERAGES else rule.sends
        return len(asked) * size(wide.get(rule.name, max(own)), module, factors)

    up, down = [], []
    for number in numbers:
        asked, factors = participants(settings, number), moving(number)
        heads = len(asked) * head
        own = [(ranks[settings.ranks[k]][module], module) for k in asked for module in modules]
        up.append(heads + sum(size(rank, module, factors) for rank, module in own))
        down.append(heads + sum(received(asked, module, factors) for module in modules))
    bound = rule.name in ("florist", "fedex")
    return Traffic(rule.name, round(fmean(up)), round(fmean(down)), bound)


def _memory(planned: Plan, config: Any, task: Task) -> dict[str, int]:
    """Bytes of the base, the adapters, one client's training and one aggregation."""
    settings = planned.settings
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and gpu)
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
