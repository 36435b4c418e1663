"""The files of a run: settings.json, metrics.jsonl, the adapters. tuning.py has tuning.json,
summary.py summary.json.

A number that is not finite is null in them: the error relative to an ideal update of zero, the loss
of a client that diverged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fedlora_kernels as flk
from integration import files
from integration.rounds.evaluate import Score
from integration.settings import Settings, SettingsError

PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class RoundRecord:
    """One rule, one round. Bytes are summed over the clients, errors are means over the modules,
    times are summed over the clients.
    """

    rule: str
    seed: int
    round: int
    clients: list[int]
    """Who took part."""
    relative_error: float
    svd_floor: float
    averaging_error: float | None
    """What averaging the factors (FedIT) of the same adapters would lose; None at unequal ranks."""
    rank: float
    bytes_up: int
    bytes_down: int
    train_loss: float
    training_ms: float
    aggregation_ms: float
    evaluation_ms: float
    modules: dict[str, dict[str, Any]]
    """Module -> rank, relative_error, svd_floor, averaging_error, the ideal update's spectrum."""
    accuracy: float | None = None
    """On the test split; of a personal rule the mean over the round's clients. None in a round
    that was not evaluated."""
    loss: float | None = None
    global_accuracy: float | None = None
    """Of the one global model; of a personal rule, that of the clients' mean update."""
    client_accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    """Client -> accuracy on its own test examples of the model that it runs."""
    texts: list[str] = dataclasses.field(default_factory=list)
    """What the model wrote for the first test examples, of a personal rule its first client's."""
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    """Client -> why it is not in the round, of the participants that are not."""
    transfer_ms: float = 0.0
    """What the round's messages took beyond its longest training; 0 in one process."""


NUMBERS = ("relative_error", "svd_floor", "train_loss")
"""Always there, and null in a file where they are not finite."""

TIMES = ("training_ms", "aggregation_ms", "evaluation_ms", "transfer_ms")
"""What two runs of equal settings do not have in common."""


def check_folder(out: Path, settings: Settings, *, resume: bool) -> None:
    """Raise SettingsError where a run with these settings cannot go on from what is in `out`."""
    path = out / "settings.json"
    if not resume or not path.is_file():
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(files.to_json(_settings(settings)))
    for name, value in wanted.items():
        if begun["settings"].get(name) != value:
            raise SettingsError(
                f"{out} was begun with {name} {begun['settings'].get(name)!r}, found {value!r}; "
                "resume with the same flags, or start without --resume"
            )


def open_folder(out: Path, settings: Settings, *, resume: bool) -> list[str]:
    """Make the run's folder, empty of earlier results unless the run goes on from them.

    Returns warnings: what keeps a resumed run from the bits of one that was never stopped.
    Raises SettingsError where the folder was begun with other settings.
    """
    check_folder(out, settings, resume=resume)
    path = out / "settings.json"
    if not resume or not path.is_file():
        path.unlink(missing_ok=True)  # first: without it nothing that is left can be resumed
        for state in [*out.glob("state/seed-*/*.pt"), *out.glob("tuning/*/state/seed-*/*.pt")]:
            state.unlink()
        for name in ("tuning.json", "metrics.jsonl", "summary.json", "report.html"):
            (out / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        return []
    begun = json.loads(path.read_text(encoding="utf-8"))
    found = {"threads": torch.get_num_threads(), **_versions()}
    recorded = {"threads": begun.get("threads"), **begun["versions"]}
    return [
        f"begun with {name} {recorded.get(name)}, resumed with {value}: what follows is right, but "
        "not bit for bit what an unbroken run would have given"
        for name, value in found.items()
        if recorded.get(name) != value
    ]


def write_settings(
    out: Path,
    settings: Settings,
    start: Score,
    *,
    questions: Sequence[Mapping[str, str]] = (),
    rates: Mapping[str, float] | None = None,
) -> None:
    """settings.json: the settings, the start's score, the versions and the number of threads, a few
    questions with their answers, and the rules' learning rates where they were chosen.
    """
    content = {
        "settings": _settings(settings),
        "start_accuracy": start.accuracy,
        "start_loss": start.loss,
        **({"learning_rates": dict(rates)} if rates else {}),
        **({"questions": questions} if questions else {}),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    files.write(out / "settings.json", files.to_json(content, indent=2) + "\n")


def finished(out: Path, settings: Settings) -> dict[tuple[str, int], list[RoundRecord]]:
    """(rule, seed) -> its rounds, of those that metrics.jsonl has all of.

    They need no state to go on from, so a run whose files were kept without its states is taken up.
    """
    path = out / "metrics.jsonl"
    text = path.read_bytes().decode("utf-8") if path.is_file() else ""
    found: dict[tuple[str, int], list[RoundRecord]] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # a line that was cut off is not
            values = json.loads(line)
            values |= {name: math.nan for name in NUMBERS if values[name] is None}
            record = RoundRecord(**values)
            found.setdefault((record.rule, record.seed), []).append(record)
    numbers = list(range(1, settings.rounds + 1))
    return {key: rounds for key, rounds in found.items() if [x.round for x in rounds] == numbers}


class Metrics:
    """metrics.jsonl: one line per seed, rule and round, appended when the round is finished.

    A resumed run appends the finished rounds again, in the same order. A line that is in the file
    already is not written again. The first line that differs, or that was cut off when an earlier
    run was killed, is removed with everything after it.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.jsonl"
        self._end = 0
        """Bytes of the rounds told so far."""

    def append(self, record: RoundRecord) -> None:
        """Add the round's line, with every module's rank and errors; it is on the disk then."""
        line = f"{files.to_json(dataclasses.asdict(record))}\n".encode()
        self._path.touch()
        with self._path.open("r+b") as file:
            file.seek(self._end)
            if file.read(len(line)) != line:
                file.seek(self._end)
                file.truncate()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._end += len(line)


def write_adapters(out: Path, adapter: flk.Adapter, own: Mapping[int, flk.Adapter]) -> None:
    """The global adapter as a PEFT folder in `out`, the clients' own ones in `out/clients/K`."""
    made = out / ".adapter"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    adapter.write(made)
    for path in sorted(made.iterdir(), reverse=True):  # the config last: with it, it is an adapter
        os.replace(path, out / path.name)
    made.rmdir()
    for number, personal in own.items():
        personal.save(out / "clients" / str(number))


def _settings(settings: Settings) -> dict[str, Any]:
    """What a run's results depend on: not where the data lie."""
    return {name: x for name, x in dataclasses.asdict(settings).items() if name != "data"}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
