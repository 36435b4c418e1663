"""The flags of `compare` and `run`: how a run is started, and every setting that is a number, a
word or a list.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from integration.settings.fields import Settings, SettingsError, about, setting

LISTS = {"rules": str, "ranks": int, "target_modules": str}
"""Settings that are lists, and what is in them."""


@dataclass(frozen=True)
class Start:
    """How a run is started: what is no setting of it and has no part in its results."""

    preset: str = setting("A name in integration/presets, or a .toml file", "quickstart")
    out: Path = field(default=Path("runs"), metadata=about("Folder for the run's files"))
    resume: bool = setting("Go on after the last finished round of this folder", False)
    engine: str = setting("Where the clients train: local, or flower (its nodes)", "local")
    superlink: str | None = setting(
        "With flower: HOST:PORT of one that is up; else nodes are simulated", None
    )
    dry_run: bool = setting("Only print what the run would hold, move and take", False)
    tiny: bool = setting("In miniature: a random model, synthetic examples, seconds", False)

    def __post_init__(self) -> None:
        """Raises SettingsError for what cannot be started."""
        if self.engine not in ("local", "flower"):
            raise SettingsError(f"engine must be local or flower, found {self.engine!r}")
        if self.superlink is not None and self.engine != "flower":
            raise SettingsError("superlink needs --engine flower")
        if self.out.exists() and not self.out.is_dir():
            raise SettingsError(f"out must be a folder, found the file {self.out}")


def starting(out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command(start, changes, its own flags...) with a flag for everything in Start and Settings.

    `out` is the default of --out. `changes` has the settings' flags, None where one is not given,
    and `energy` (florist's option). A flag of the command's own replaces a setting of its name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        _, _, *own = signature.parameters.values()
        flags = {x.name: x.replace(kind=x.KEYWORD_ONLY) for x in own} | _start_flags(Path(out))
        flags = flags | _setting_flags() | flags

        def started(**given: Any) -> None:
            start = {f.name: given.pop(f.name) for f in dataclasses.fields(Start)}
            mine = {x.name: given.pop(x.name) for x in own}
            command(Start(**start), lists(given), **mine)

        started.__doc__, started.__name__ = command.__doc__, command.__name__
        made: Any = started
        made.__signature__ = inspect.Signature(list(flags.values()))
        made.__annotations__ = {name: flag.annotation for name, flag in flags.items()}
        return started

    return decorate


def lists(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with lists in place of comma-separated texts; SettingsError where one is none."""
    parsed = dict(flags)
    for name, kind in LISTS.items():
        text = flags.get(name)
        if isinstance(text, str):
            try:
                parsed[name] = tuple(kind(part.strip()) for part in text.split(","))
            except ValueError:
                raise SettingsError(
                    f"{name} must be numbers such as 8,8,4,4, found {text!r}"
                ) from None
    return parsed


def _plain(hint: Any) -> type | None:
    """int, float, str or bool, also where the setting may be None; None for tables."""
    for kind in (bool, int, float, str):
        if hint in (kind, kind | None):
            return kind
    return None


def _start_flags(out: Path) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(Start)
    made = {}
    for f in dataclasses.fields(Start):
        names = [f"--{f.name.replace('_', '-')}"] if hints[f.name] is bool else []  # no --no-resume
        option = typer.Option(*names, help=f.metadata["help"])
        default = out if f.name == "out" else f.default
        made[f.name] = _flag(f.name, Annotated[hints[f.name], option], default)
    return made


def _setting_flags() -> dict[str, inspect.Parameter]:
    hints = get_type_hints(Settings)
    made = {}
    for f in dataclasses.fields(Settings):
        kind = str if f.name in LISTS else _plain(hints[f.name])
        if kind is not None:
            option = typer.Option(help=f.metadata["help"])
            made[f.name] = _flag(f.name, Annotated[kind | None, option], None)
    energy = Annotated[float | None, typer.Option(help="Energy that FLoRIST keeps, in (0, 1].")]
    return made | {"energy": _flag("energy", energy, None)}


def _flag(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )
