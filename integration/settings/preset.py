"""Settings from a preset (TOML) with the command line's changes on top, checked once."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from integration.settings.fields import ENERGY_RULES, Settings, SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parents[1] / "presets"


def from_preset(preset: str, **changes: Any) -> Settings:
    """Read `presets/<preset>.toml` (or the file that `preset` names) and apply what is not None.

    `ranks` of one number is every client's rank. More numbers than one set the number of clients,
    unless `clients` is given as well. `energy` is given to every rule that has an option of this
    name. Of `steps` and `epochs` the one that is given replaces the other, and so do
    `learning_rate` and `learning_rates`. Raises SettingsError for whatever cannot work.
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
    pairs = [("steps", "epochs"), ("learning_rate", "learning_rates")]
    for one, other in [*pairs, *(pair[::-1] for pair in pairs)]:
        if one in changes and other not in changes:
            values.pop(other, None)
    if "config" in changes:
        changes.setdefault("init", "random")
    values |= changes
    if energy is not None:
        options = dict(values.get("options", {}))
        for rule in ENERGY_RULES:
            options[rule.name] = options.get(rule.name, {}) | {"energy": energy}
        values["options"] = options
    return from_values(values, f"preset {path}")


def from_values(values: dict[str, Any], where: str) -> Settings:
    """Settings from a TOML or JSON table; `where` is what errors call it."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(f"{where}: unknown settings {', '.join(unknown)}")
    if rates := values.get("learning_rates"):
        values = {"learning_rate": rates[0]} | values
    required = {n for n, f in fields.items() if f.default is f.default_factory}
    if missing := sorted(required - set(values)):
        raise SettingsError(f"{where}: missing settings {', '.join(missing)}")
    values = dict(values)
    for name in ("rules", "ranks", "target_modules", "learning_rates"):
        values[name] = tuple(values.get(name, ()))
    if len(values["ranks"]) == 1:
        values["ranks"] *= values["clients"]
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    counts = ("clients", "rounds", "batch_size", "max_tokens", "test_size", "evaluate_every")
    given = (
        "seeds",
        "tuning_seeds",
        "max_new_tokens",
        "steps",
        "epochs",
        "train_size",
        "micro_batch_size",
        "answers",
    )
    for name in (*counts, *given):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"{name} must be at least 1, found {value}")
    for name in ("alpha", "learning_rate", "lora_scaling", "logit_scale", "participation"):
        if not getattr(settings, name) > 0:
            raise SettingsError(f"{name} must be above 0, found {getattr(settings, name)}")
    if not all(0 < rate < math.inf for rate in settings.learning_rates):
        raise SettingsError(f"learning_rates must be above 0, found {settings.learning_rates}")
    if settings.learning_rates and settings.validation_size < 1:
        raise SettingsError("learning_rates needs validation_size: the examples that decide")
    sizes = ("client_test_size", "shared_per_class", "validation_size")
    for name in ("seed", "weight_decay", "max_grad_norm", *sizes):
        if not getattr(settings, name) >= 0:
            raise SettingsError(f"{name} must be 0 or more, found {getattr(settings, name)}")
    for f in dataclasses.fields(Settings):
        words, value = f.metadata["words"], getattr(settings, f.name)
        if words and value not in words:
            raise SettingsError(f"{f.name} must be {' or '.join(words)}, found {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{f.name} must be finite, found {value}")
    for options in settings.options.values():
        if not 0 < options.get("energy", 1.0) <= 1:
            raise SettingsError(f"energy must be above 0 and at most 1, found {options['energy']}")
    if settings.participation > 1:
        raise SettingsError(f"participation must be at most 1, found {settings.participation}")
    if (settings.steps is None) == (settings.epochs is None):
        raise SettingsError("give steps or epochs, one of the two")
    if settings.after not in (None, "continue", "merge"):
        raise SettingsError(f"after must be continue or merge, found {settings.after!r}")
    if len(settings.ranks) != settings.clients:
        raise SettingsError(
            f"ranks names {len(settings.ranks)} ranks for {settings.clients} clients; "
            "give one rank for all or one per client"
        )
    if min(settings.ranks) < 1:
        raise SettingsError(f"ranks must be at least 1, found {min(settings.ranks)}")
    if min(settings.rank_pattern.values(), default=1) < 1:
        raise SettingsError(f"ranks of rank_pattern must be at least 1: {settings.rank_pattern}")
    if settings.init == "random" and settings.config is None:
        raise SettingsError("init random needs config: the shape of the model")
    if settings.method == "vera" and settings.heterogeneous:
        raise SettingsError("vera needs clients of one rank: they share one pair of projections")
