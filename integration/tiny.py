"""--tiny: a preset end to end in seconds, on a tiny random model and synthetic examples.

The architecture, the task's format, the rules, the partition and the order of the clients' ranks
stay the preset's; widths, ranks, counts and texts become small. It shows that a preset runs, not
what it reaches. The files (a config.json, the data) lie beside the run's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from integration.files import write
from integration.model import loading
from integration.settings import Settings

CLIENTS = 8
"""At most; of more, as many are taken in even steps through the list of ranks."""

LARGEST_RANK = 8

WORDS = ("river", "stone", "apple", "green", "seven", "window", "market", "letter", "carry")


def tiny(settings: Settings, folder: Path) -> Settings:
    """The same run in miniature; writes what it needs into `folder`."""
    ranks, clients = _ranks(settings)
    batch, micro = min(settings.batch_size, 4), settings.micro_batch_size
    options, test_size = dict(settings.task_options), 12
    if settings.task in ROWS:
        _write_data(settings, folder / "data")
        options["source"] = str(folder / "data")
    elif settings.task == "arithmetic":
        options |= {"level": 1, "examples": 120}
    return replace(
        settings,
        config=str(_write_shape(settings, folder)),
        init="random",
        clients=clients,
        ranks=ranks,
        rank_pattern={name: min(rank, 4) for name, rank in settings.rank_pattern.items()},
        participation=max(settings.participation, 2 / clients),
        rounds=min(settings.rounds, 2),
        steps=None if settings.steps is None else min(settings.steps, 2),
        epochs=None if settings.epochs is None else 1,
        batch_size=batch,
        micro_batch_size=None if micro is None else max(1, min(micro, batch // 2)),
        max_tokens=min(settings.max_tokens, 48),
        max_new_tokens=4,
        test_size=test_size,
        train_size=64,
        client_test_size=min(settings.client_test_size, 2),
        shared_per_class=min(settings.shared_per_class, 2),
        evaluate_every=min(settings.evaluate_every, 2),
        seeds=1,
        task_options=options,
    )


def _ranks(settings: Settings) -> tuple[tuple[int, ...], int]:
    """Small ranks in the order and the proportions of the preset's, for at most CLIENTS clients."""
    count = min(settings.clients, CLIENTS)
    chosen = [settings.ranks[k * settings.clients // count] for k in range(count)]
    most = max(chosen)
    if most > LARGEST_RANK:
        chosen = [max(1, rank * LARGEST_RANK // most) for rank in chosen]
    return tuple(chosen), count


def _write_shape(settings: Settings, folder: Path) -> Path:
    """A config.json of the preset's architecture: 2 layers, 4 heads, 32 wide."""
    values = loading.shape_values(settings.config or str(loading.folder(settings.model)))
    heads = int(values["num_attention_heads"])
    values |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 256,
    }
    if "num_key_value_heads" in values:
        values["num_key_value_heads"] = max(1, 4 * int(values["num_key_value_heads"]) // heads)
    if "head_dim" in values:
        values["head_dim"] = 8
    values.pop("rope_scaling", None)  # its lengths are those of the large model
    path = folder / "config.json"
    write(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
    return path


def _write_data(settings: Settings, folder: Path) -> None:
    """96 rows in the task's own columns, the same ones every time."""
    draw = random.Random(0)
    rows = [ROWS[settings.task](draw, place, settings.task_options) for place in range(96)]
    write(folder / "train.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _sentence(draw: random.Random, length: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def _glue(draw: random.Random, place: int, options: dict[str, Any]) -> dict[str, Any]:
    from integration.tasks.glue import SUBSETS

    texts, classes = SUBSETS[options.get("subset", "sst2")]
    return {**{text: _sentence(draw, 6) for text in texts}, "label": place % len(classes)}


def _gsm8k(draw: random.Random, place: int, _: dict[str, Any]) -> dict[str, Any]:
    return {"question": _sentence(draw, 8), "answer": f"{_sentence(draw, 3)}\n#### {place}"}


def _math(draw: random.Random, place: int, _: dict[str, Any]) -> dict[str, Any]:
    solution = rf"{_sentence(draw, 3)} \boxed{{{place}}}"
    return {"problem": _sentence(draw, 8), "solution": solution, "type": f"subject {place % 7}"}


def _mbpp(draw: random.Random, place: int, _: dict[str, Any]) -> dict[str, Any]:
    code = f"def f{place}():\n    return {place}"
    return {
        "text": _sentence(draw, 8),
        "code": code,
        "test_list": [f"assert f{place}() == {place}"],
    }


def _instructions(draw: random.Random, place: int, options: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"instruction": _sentence(draw, 8), "output": _sentence(draw, 6)}
    return row | ({options["topic"]: f"topic {place % 8}"} if options.get("topic") else {})


def _dolly(draw: random.Random, place: int, _: dict[str, Any]) -> dict[str, Any]:
    return {
        "instruction": _sentence(draw, 8),
        "context": _sentence(draw, 4) if place % 2 else "",
        "response": _sentence(draw, 6),
        "category": f"category {place % 8}",
    }


ROWS: dict[str, Callable[[random.Random, int, dict[str, Any]], dict[str, Any]]] = {
    "glue": _glue,
    "gsm8k": _gsm8k,
    "math": _math,
    "programs": _mbpp,
    "instructions": _instructions,
    "alpaca_gpt4": _instructions,
    "dolly": _dolly,
}
"""Task that reads a data set -> a row in its columns."""
