"""One run's settings: a preset (TOML) with the command line's changes on top, checked once.

Every field that is a number, a word or a list of them is also a flag of the command line (its
`help` is the flag's); tables can be set in a preset only.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"


class SettingsError(ValueError):
    """A setting that cannot work; the message is one line and says what would."""


def setting(text: str, default: Any = dataclasses.MISSING, words: tuple[str, ...] = ()) -> Any:
    """A field with its help text, and the words that it may be."""
    return field(default=default, metadata=about(text, words))


def about(text: str, words: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a field's metadata hold: the help of its flag, and the words that it may be."""
    return {"help": text + (f": {', '.join(words)}." if words else "."), "words": words}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; equal settings give equal results, bit for bit."""

    # ---- task and model
    task: str = setting("Name of the task")
    model: str = setting("A model's name, hub id or folder")
    max_tokens: int = setting("Tokens of one text, the rest is cut off")
    test_size: int = setting("Examples in the test split")
    # ---- federation
    rules: tuple[str, ...] = setting("Rules, separated by commas")
    clients: int = setting("Number of clients")
    rounds: int = setting("Rounds of every rule")
    batch_size: int = setting("Examples in one optimiser step")
    learning_rate: float = setting("Learning rate of the first round")
    ranks: tuple[int, ...] = setting("One LoRA rank for all, or one per client: 8,8,4,4")
    lora_scaling: float = setting("alpha / r, the same for every client")
    target_modules: tuple[str, ...] = setting("Modules that get an adapter")

    steps: int | None = setting("Optimiser steps per client and round", None)
    epochs: int | None = setting("Passes over a client's data per round, instead of steps", None)
    micro_batch_size: int | None = setting(
        "Examples of a step that are in memory at once, to save it; all of them without this", None
    )
    schedule: str = setting(
        "Learning rate over the rounds", "linear", ("linear", "cosine", "constant")
    )
    optimizer_state: str = setting(
        "A client's AdamW moments from round to round", "reset", ("reset", "keep")
    )
    weight_decay: float = setting("AdamW's weight decay", 0.0)
    max_grad_norm: float = setting("Gradients are clipped to this norm; 0 leaves them", 0.0)

    partition: str = setting(
        "How the examples are dealt to the clients",
        "dirichlet",
        ("dirichlet", "iid", "by-label", "by-topic"),
    )
    alpha: float = setting("Dirichlet concentration; small is uneven", 0.5)
    participation: float = setting("Share of the clients that take part in a round", 1.0)

    method: str = setting("What the clients train", "lora", ("lora", "rslora", "vera"))
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata=about("Module -> its rank in every client")
    )
    freeze: str = setting(
        "Which factor stays fixed on the clients: what the rule says, or A and B in turn (RoLoRA)",
        "rule",
        ("rule", "alternate"),
    )
    after: str | None = setting(
        "How a round goes on: continue or merge; without it, each rule's own way", None
    )
    options: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata=about("Rule -> options of its aggregation")
    )

    # ---- the task's and the model's details
    task_options: dict[str, Any] = field(
        default_factory=dict, metadata=about("Options of the task")
    )
    train_size: int | None = setting("At most so many training examples", None)
    head: str = setting(
        "Classification head: means of the shared split, frozen, or trained by the clients",
        "means",
        ("means", "trained"),
    )
    shared_per_class: int = setting("Examples per class in the shared split", 50)
    logit_scale: float = setting("Scale of the cosines of the head of means", 20.0)
    loss: str = setting(
        "Loss of classification; balanced adds the log of the client's class shares to the logits",
        "balanced",
        ("balanced", "plain"),
    )
    max_new_tokens: int = setting("Tokens that a generated answer may have", 64)
    init: str = setting("Where the base weights come from", "pretrained", ("pretrained", "random"))
    config: str | None = setting("Shape of a random model: a name, or a config.json", None)
    device: str = setting("Where to train", "auto", ("auto", "cpu", "cuda"))
    dtype: str = setting(
        "Of the base weights; auto is bfloat16 on a GPU", "auto", ("auto", "float32", "bfloat16")
    )
    gradient_checkpointing: bool = setting("Compute activations twice to save memory", False)

    # ---- evaluation
    evaluate_every: int = setting("Evaluate after every so many rounds, and after the last", 1)
    client_test_size: int = setting("Test examples drawn in each client's own proportions", 0)
    track: str = setting(
        "Where rounds go beside metrics.jsonl", "nothing", ("nothing", "tensorboard", "wandb")
    )
    seed: int = setting("Decides all randomness", 0)
    seeds: int = setting("Repeat with so many seeds: seed, seed + 1, ...", 1)

    @property
    def heterogeneous(self) -> bool:
        """Whether the clients' ranks differ."""
        return len(set(self.ranks)) > 1


def from_preset(preset: str, **changes: Any) -> Settings:
    """Read `presets/<preset>.toml` (or the file that `preset` names) and apply what is not None.

    `ranks` of one number is every client's rank. More numbers than one set the number of clients,
    unless `clients` is given as well. `energy` is florist's option. Of `steps` and `epochs` the one
    that is given replaces the other. Raises SettingsError for whatever cannot work.
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
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in changes and other not in changes:
            values.pop(other, None)
    if "config" in changes:
        changes.setdefault("init", "random")
    values |= changes
    if energy is not None:
        options = values.get("options", {})
        values["options"] = options | {"florist": options.get("florist", {}) | {"energy": energy}}
    return from_values(values, f"preset {path}")


def from_values(values: dict[str, Any], where: str) -> Settings:
    """Settings from a TOML or JSON table; `where` is what errors call it."""
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    if unknown := sorted(set(values) - set(fields)):
        raise SettingsError(f"{where}: unknown settings {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory}
    if missing := sorted(required - set(values)):
        raise SettingsError(f"{where}: missing settings {', '.join(missing)}")
    values = dict(values)
    for name in ("rules", "ranks", "target_modules"):
        values[name] = tuple(values[name])
    if len(values["ranks"]) == 1:
        values["ranks"] *= values["clients"]
    settings = Settings(**values)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    counts = ("clients", "rounds", "batch_size", "max_tokens", "test_size", "evaluate_every")
    given = ("seeds", "max_new_tokens", "steps", "epochs", "train_size", "micro_batch_size")
    for name in (*counts, *given):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SettingsError(f"{name} must be at least 1, found {value}")
    for name in ("alpha", "learning_rate", "lora_scaling", "logit_scale", "participation"):
        if not getattr(settings, name) > 0:
            raise SettingsError(f"{name} must be above 0, found {getattr(settings, name)}")
    for name in ("seed", "weight_decay", "max_grad_norm", "client_test_size", "shared_per_class"):
        if not getattr(settings, name) >= 0:
            raise SettingsError(f"{name} must be 0 or more, found {getattr(settings, name)}")
    for f in dataclasses.fields(Settings):
        words, value = f.metadata["words"], getattr(settings, f.name)
        if words and value not in words:
            raise SettingsError(f"{f.name} must be {' or '.join(words)}, found {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{f.name} must be finite, found {value}")
    energy = settings.options.get("florist", {}).get("energy", 1.0)
    if not 0 < energy <= 1:
        raise SettingsError(f"energy must be above 0 and at most 1, found {energy}")
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
