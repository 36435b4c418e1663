"""Federations small enough for a test: the quickstart with two clients, two steps and few texts."""

import dataclasses
import json

from rich.console import Console

import fedlora_kernels as flk
from integration.compare import compare
from integration.rounds.rule import choose
from integration.settings import from_preset

MESSAGES = [
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Blue."},
]
"""A conversation in the form of TRL's data sets."""


def miniature(**changes):
    """Two clients, two steps of four (after one, A has not moved: B was 0), a few strings."""
    small = {"clients": 2, "rounds": 2, "test_size": 40, "train_size": 60, "batch_size": 4}
    small |= {"max_tokens": 12, "shared_per_class": 2}
    if "epochs" not in changes:
        small |= {"steps": 2}
    return from_preset("quickstart", **(small | changes))


def language(**changes):
    """A federation of a language task on a random model of 3 million parameters."""
    tiny = {
        "task": "arithmetic",
        "config": "llama-tiny",
        "target_modules": ("q_proj", "v_proj"),
        "max_tokens": 64,
        "test_size": 8,
        "max_new_tokens": 4,
        "shared_per_class": 0,
    }
    return miniature(**(tiny | changes))


def run(out, settings, rules=None, console=None, **options):
    """The summary, and the lines of metrics.jsonl by rule."""
    chosen, _ = choose(settings, explicit=False)
    chosen = [flk.rules.make(name) for name in rules] if rules else chosen
    summary = compare(settings, chosen, out, console or Console(quiet=True), **options)
    return summary, metrics(out)


def metrics(out):
    """The lines of metrics.jsonl by rule."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {name: [x for x in lines if x["rule"] == name] for name in flk.rules.names()}


def timeless(lines):
    """What two runs of equal settings have in common."""
    times = ("training_ms", "aggregation_ms", "evaluation_ms")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def settings_like(settings, **changes):
    """The same settings, unchecked, with changes."""
    return dataclasses.replace(settings, **changes)


def written(folder, rows, name="train"):
    """A folder with the rows of one split of a data set, as JSON lines."""
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)
    return str(folder)
