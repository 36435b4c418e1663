"""--tiny: a preset end to end in seconds, on a tiny random model and synthetic examples.

The architecture, the task's format, the rules, the partition and the order of the clients' ranks
stay the preset's; widths, ranks, counts and texts become small. It shows that a preset runs, not
what it reaches. The files (a config.json, the data) lie beside the run's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from integration.files import write
from integration.model import loading
from integration.settings import Settings
from integration.tasks import find_task

CLIENTS = 8
"""At most; of more, as many are taken in even steps through the list of ranks."""

LARGEST_RANK = 8

ROWS = 96
"""Sample rows of a data set."""


@dataclass(frozen=True)
class Miniature:
    """The settings of a run in miniature, and the files that it reads."""

    settings: Settings
    files: Mapping[Path, str]
    """Path -> content; nothing is written before `write` is called."""

    def write(self) -> None:
        """Write the files."""
        for path, content in self.files.items():
            write(path, content)


def miniature(settings: Settings, folder: Path) -> Miniature:
    """The same run in miniature, with its files in `folder`.

    Raises SettingsError and TaskError for a model or a task that is unknown.
    """
    task = find_task(settings.task)
    ranks, clients = _ranks(settings)
    batch, micro = min(settings.batch_size, 4), settings.micro_batch_size
    shape = folder / "config.json"
    files = {shape: _shape(settings)}
    options = {**settings.task_options, **task.tiny_options}
    if task.row is not None:
        draw = Random(0)
        rows = [task.row(draw, place, settings.task_options) for place in range(ROWS)]
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        files[folder / "data" / "train.jsonl"] = "".join(lines)
        options["source"] = str(folder / "data")
    small = replace(
        settings,
        config=str(shape),
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
        answers=None if settings.answers is None else min(settings.answers, 6),
        test_size=12,
        train_size=64,
        learning_rates=settings.learning_rates[:2],
        validation_size=min(settings.validation_size, 8),
        data=None,
        client_test_size=min(settings.client_test_size, 2),
        shared_per_class=min(settings.shared_per_class, 2),
        evaluate_every=min(settings.evaluate_every, 2),
        seeds=1,
        task_options=options,
    )
    return Miniature(small, files)


def _ranks(settings: Settings) -> tuple[tuple[int, ...], int]:
    """Small ranks in the order and the proportions of the preset's, for at most CLIENTS clients."""
    count = min(settings.clients, CLIENTS)
    chosen = [settings.ranks[k * settings.clients // count] for k in range(count)]
    most = max(chosen)
    if most > LARGEST_RANK:
        chosen = [max(1, rank * LARGEST_RANK // most) for rank in chosen]
    return tuple(chosen), count


def _shape(settings: Settings) -> str:
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
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
