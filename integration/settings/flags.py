"""The command line's flags: how a run is started, and every setting that is a number, a word or a
list. A flag's name, type and help come from the field of the dataclass that it sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import click

from integration.settings.fields import ENERGY_RULES, Settings, SettingsError, about, setting

LISTS = {"rules": str, "ranks": int, "target_modules": str, "learning_rates": float}
"""Settings that are lists, and the type of their entries."""

ENGINES = ("local", "flower")

TYPES: dict[Any, click.ParamType[Any]] = {
    bool: click.BOOL,
    int: click.INT,
    float: click.FLOAT,
    str: click.STRING,
    Path: click.Path(path_type=Path),
}


@dataclass(frozen=True)
class Start:
    """How a run is started: these fields are no settings and do not change its results."""

    preset: str = setting("A name in integration/presets, or a .toml file", "quickstart")
    out: Path = field(default=Path("runs"), metadata=about("Folder for the run's files"))
    resume: bool = setting("Continue after the last finished round in the folder --out", False)
    engine: str = setting(
        "Where the clients train: in this process, or on Flower's nodes", "local", ENGINES
    )
    superlink: str | None = setting(
        "With --engine flower: HOST:PORT of a running SuperLink without TLS; by default one is "
        "started here, with simulated nodes",
        None,
    )
    dry_run: bool = setting(
        "Only print the work, the traffic and an estimate of the memory of the run", False
    )
    tiny: bool = setting(
        "A miniature of the run, which takes seconds: random model, synthetic examples", False
    )

    def __post_init__(self) -> None:
        """Raises SettingsError for what cannot be started."""
        if self.engine not in ENGINES:
            raise SettingsError(f"engine must be {' or '.join(ENGINES)}, found {self.engine!r}")
        if self.superlink is not None and self.engine != "flower":
            raise SettingsError("superlink needs --engine flower")
        if self.out.exists() and not self.out.is_dir():
            raise SettingsError(f"out must be a folder, found the file {self.out}")


def run_flags(out: str, *, hidden: str = "") -> Callable[[click.Command], click.Command]:
    """Give a command f(start, changes, its own flags...) the flags of a run.

    The command gets a flag for every field of Start, every setting that is no table, and `energy`
    (an option of rules). `out` is the default of --out. `changes` has the settings' flags, None for
    those that were not given. The flag of the setting `hidden` is not in the help.
    """

    def decorate(command: click.Command) -> click.Command:
        function, own = command.callback, [str(option.name) for option in command.params]
        assert function is not None
        settings = [*flags_of(Settings), _energy()]
        for option in settings:
            option.hidden = option.name == hidden
        command.params += [*flags_of(Start, defaults={"out": Path(out)}), *settings]

        def callback(**given: Any) -> None:
            start = Start(**{f.name: given.pop(f.name) for f in dataclasses.fields(Start)})
            mine = {name: given.pop(name) for name in own}
            function(start, lists(given), **mine)

        command.callback = callback
        return command

    return decorate


def lists(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with lists in place of comma-separated texts.

    Raises SettingsError for a text that is not a list of the setting's type.
    """
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


def flags_of(kind: type, *, defaults: dict[str, Any] | None = None) -> Iterator[click.Option]:
    """An option for every field of a dataclass that has a help text and is no table.

    Without `defaults` every option is None where it is not given. With them it has the field's
    default, or the one in `defaults`.
    """
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        plain = str if f.name in LISTS else _plain(hints[f.name])
        if plain is None or "help" not in f.metadata:
            continue
        flag = f"--{f.name.replace('_', '-')}"
        default = None if defaults is None else defaults.get(f.name, f.default)
        if plain is bool and default is None:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        yield click.Option(
            [flag],
            type=TYPES[plain],
            metavar=f"[{'|'.join(words)}]" if (words := f.metadata["words"]) else None,
            is_flag=plain is bool,
            default=default,
            show_default=default is not None,
            help=f.metadata["help"],
        )


def _energy() -> click.Option:
    told = [f"{kind.title}: {kind.options()['energy'].help}." for kind in ENERGY_RULES]
    return click.Option(["--energy"], type=float, help=" ".join(told))


def _plain(hint: Any) -> type | None:
    """bool, int, float, str or Path, also where the field may be None; None for tables."""
    for kind in TYPES:
        if hint in (kind, kind | None):
            return kind  # type: ignore[no-any-return]
    return None
