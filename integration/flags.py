"""The flags of `compare` and `run`: one for every setting that is a number, a word or a list."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from integration.settings import Settings, SettingsError

LISTS = {"rules": str, "ranks": int, "target_modules": str}
"""Settings that are lists, and what is in them."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command, in place of its `**flags`, a flag for every setting; None where not given.

    `energy` (florist's option) is one flag more.
    """
    hints = get_type_hints(Settings)
    signature = inspect.signature(command, eval_str=True)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    names = {item.name for item in own}
    made = []
    for f in dataclasses.fields(Settings):
        kind = str if f.name in LISTS else _plain(hints[f.name])
        if kind is not None and f.name not in names:
            made.append(_flag(f.name, kind, f.metadata["help"]))
    made.append(_flag("energy", float, "Energy that FLoRIST keeps, in (0, 1]."))
    parameters = [item.replace(kind=item.KEYWORD_ONLY) for item in [*own, *made]]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


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


def _flag(name: str, kind: type, text: str) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(help=text)],
    )
