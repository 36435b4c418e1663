"""One run's settings: a preset (TOML) with the command line's changes on top, checked once."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.tasks import TASKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"

AFTER = ("continue", "merge")


class SettingsError(ValueError):
    """A setting that cannot work; the message is one line and says what would."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; equal settings give equal results, bit for bit."""

    task: str
    model: str
    rules: tuple[str, ...]
    clients: int
    rounds: int
    steps: int
    """Optimiser steps of one client in one round."""
    batch_size: int
    learning_rate: float
    """Of the first round; it falls linearly over the rounds."""
    ranks: tuple[int, ...]
    """One LoRA rank per client."""
    lora_scaling: float
    """alpha / r, the same for every client."""
    target_modules: tuple[str, ...]
    max_tokens: int
    alpha: float
    """Concentration of the Dirichlet split over clients; small is uneven."""
    test_size: int
    shared_per_class: int
    """Examples per class in the shared split, from which the frozen head is made."""
    logit_scale: float
    seed: int = 0
    train_size: int | None = None
    after: str | None = None
    """How a round goes on: "continue", "merge", or None for each rule's own way."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rule -> options of its aggregation, such as {"florist": {"energy": 0.9}}."""

    @property
    def heterogeneous(self) -> bool:
        """Whether the clients' ranks differ."""
        return len(set(self.ranks)) > 1


def from_preset(preset: str, **changes: Any) -> Settings:
    """Read `presets/<preset>.toml` (or the file that `preset` names) and apply what is not None.

    `ranks` of one number is every client's rank. More numbers than one set the number of clients,
    unless `clients` is given as well. `energy` is florist's option.
    Raises SettingsError for whatever cannot work.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in PRESETS.glob("*.toml")))
        raise SettingsError(f"unknown preset {preset!r}; known: {known}, or a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"preset {path}: {error}") from None
    changes = {name: value for name, value in changes.items() if value is not None}
    energy = changes.pop("energy", None)
    if len(changes.get("ranks", ())) > 1:
        changes.setdefault("clients", len(changes["ranks"]))
    values |= changes
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(f"preset {path}: unknown settings {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory}
    if missing := sorted(required - set(values)):
        raise SettingsError(f"preset {path}: missing settings {', '.join(missing)}")
    if energy is not None:
        options = values.get("options", {})
        values["options"] = options | {"florist": options.get("florist", {}) | {"energy": energy}}
    for name in ("rules", "ranks", "target_modules"):
        values[name] = tuple(values[name])
    if len(values["ranks"]) == 1:
        values["ranks"] *= values["clients"]
    return _checked(Settings(**values))


def _checked(settings: Settings) -> Settings:
    for name in ("clients", "rounds", "steps", "batch_size", "max_tokens", "test_size"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name} must be at least 1, found {getattr(settings, name)}")
    for name in ("alpha", "learning_rate", "lora_scaling", "logit_scale"):
        if not getattr(settings, name) > 0:
            raise SettingsError(f"{name} must be above 0, found {getattr(settings, name)}")
    if settings.task not in TASKS:
        raise SettingsError(f"unknown task {settings.task!r}; known: {', '.join(TASKS)}")
    energy = settings.options.get("florist", {}).get("energy", 1.0)
    if not 0 < energy <= 1:
        raise SettingsError(f"energy must be above 0 and at most 1, found {energy}")
    if settings.seed < 0:
        raise SettingsError(f"seed must be 0 or more, found {settings.seed}")
    if settings.after not in (None, *AFTER):
        raise SettingsError(f"after must be {' or '.join(AFTER)}, found {settings.after!r}")
    if len(settings.ranks) != settings.clients:
        raise SettingsError(
            f"ranks names {len(settings.ranks)} ranks for {settings.clients} clients; "
            "give one rank for all or one per client"
        )
    if min(settings.ranks) < 1:
        raise SettingsError(f"ranks must be at least 1, found {min(settings.ranks)}")
    return settings
