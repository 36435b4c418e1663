"""Rounds for people who watch them elsewhere: TensorBoard's event files, or Weights & Biases.

Both packages are optional and loaded when the setting `track` names them. Every rule and seed is a
run of its own; its steps are the rounds. metrics.jsonl stays the record.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from integration.rounds.records import RoundRecord
from integration.settings import Settings, SettingsError

SCALARS = ("accuracy", "loss", "global_accuracy", "train_loss", "rank")
ERRORS = ("relative_error", "svd_floor", "averaging_error")
BYTES = ("bytes_up", "bytes_down")
TIMES = ("training_ms", "transfer_ms", "aggregation_ms", "evaluation_ms")


class Sink(Protocol):
    """Where one rule's rounds of one seed go."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the values of a round."""

    def finish(self) -> None:
        """Nothing more comes."""


class Tracker(AbstractContextManager["Tracker"]):
    """Sends rounds to the sink that the settings name; does nothing where they name none."""

    def __init__(self, settings: Settings, out: Path) -> None:
        """Raises SettingsError where the package is not installed."""
        self._settings = settings
        self._out = out
        kinds: dict[str, type[TensorBoard | WeightsAndBiases]] = {
            "tensorboard": TensorBoard,
            "wandb": WeightsAndBiases,
        }
        self._kind = kinds.get(settings.track)
        self._series: tuple[str, int] | None = None
        self._sink: Sink | None = None
        if self._kind is not None:
            self._kind.check()

    def round(self, entry: RoundRecord) -> None:
        """Send one round."""
        if self._kind is None:
            return
        if self._series != (entry.rule, entry.seed):
            self._close()
            self._series = (entry.rule, entry.seed)
            self._sink = self._kind(self._settings, self._out, entry.rule, entry.seed)
        assert self._sink is not None
        self._sink.log(scalars(entry), entry.round)

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.finish()
        self._sink = None


def scalars(entry: RoundRecord) -> dict[str, float]:
    """Group/name -> number, without what the round does not have."""
    groups = {"score": SCALARS, "error": ERRORS, "traffic": BYTES, "time": TIMES}
    values = {
        f"{group}/{name}": getattr(entry, name) for group, names in groups.items() for name in names
    }
    values["score/lost_clients"] = len(entry.lost)
    return {name: float(value) for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files in OUT/tensorboard/RULE-seed-N: `tensorboard --logdir OUT/tensorboard`."""

    def __init__(self, settings: Settings, out: Path, rule: str, seed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard" / f"{rule}-seed-{seed}"))

    @staticmethod
    def check() -> None:
        """Raise SettingsError where the package is missing."""
        _require("tensorboard")

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the values of a round; they are on the disk afterwards."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project "fedlora", in a group named after OUT; its mode is the user's own."""

    def __init__(self, settings: Settings, out: Path, rule: str, seed: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="fedlora",
            group=out.resolve().name,
            name=f"{rule} seed {seed}",
            config=dataclasses.asdict(settings) | {"rule": rule, "seed": seed},
            dir=str(out),
            reinit="finish_previous",
        )

    @staticmethod
    def check() -> None:
        """Raise SettingsError where the package is missing."""
        _require("wandb")

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the values of a round."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise SettingsError(f"track {package} needs it: pip install {package}") from None
