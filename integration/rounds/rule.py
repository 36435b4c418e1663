"""The rules of a run, by what they say about themselves: none is named here."""

from __future__ import annotations

import fedlora_kernels as flk
from integration.settings import Settings, SettingsError


def choose(settings: Settings, *, explicit: bool) -> tuple[list[flk.Rule], list[str]]:
    """The rules that the settings allow, and one line for each that is left out.

    Raises SettingsError for an unknown rule, and, where the rules were named by the user
    (`explicit`), for one that the ranks or `after` rule out.
    """
    chosen: list[flk.Rule] = []
    left_out: list[str] = []
    for rule in [make_rule(settings, name) for name in dict.fromkeys(settings.rules)]:
        reason = _impossible(rule, settings)
        if reason is None:
            chosen.append(rule)
        elif explicit:
            raise SettingsError(reason)
        else:
            left_out.append(f"left out: {reason}")
    if not chosen:
        raise SettingsError("no rule is left to compare; " + "; ".join(left_out))
    return chosen, left_out


def make_rule(settings: Settings, name: str) -> flk.Rule:
    """The rule of this name with the settings' options. Raises SettingsError where it has others,
    or there is no such rule.
    """
    known = flk.rules.names()
    if name not in known:
        raise SettingsError(f"unknown rule {name!r}; known: {', '.join(known)}")
    try:
        return flk.rules.make(name, **settings.options.get(name, {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from None


def trained(rule: flk.Rule, settings: Settings, number: int) -> str:
    """The factors that the clients of a rule train in round `number`: "both", "a" or "b"."""
    asked = settings.freeze if rule.trains == "both" else rule.trains
    if asked == "alternate":
        return "b" if number % 2 else "a"
    return rule.trains


def plain_average() -> flk.Rule:
    """The rule that averages both factors, each by itself: what the others are compared with."""
    return next(
        kind()
        for kind in _kinds()
        if kind.separable and kind.sends == "both" and kind.trains == "both"
    )


def _impossible(rule: flk.Rule, settings: Settings) -> str | None:
    """Why the rule cannot run with these settings."""
    if settings.heterogeneous and not rule.heterogeneous:
        able = [kind.name for kind in _kinds() if kind.heterogeneous]
        ranks = ",".join(map(str, settings.ranks))
        return (
            f"{rule.name} needs clients of one rank, found {ranks}; "
            f"{', '.join(able)} take different ones"
        )
    if rule.personal and settings.after == "merge":
        return f"{rule.name} cannot merge: every client keeps its own B"
    if settings.method == "vera" and "VERA" not in rule.aggregates:
        able = [kind.name for kind in _kinds() if "VERA" in kind.aggregates]
        return f"{rule.name} cannot aggregate VeRA vectors; {', '.join(able)} can"
    return None


def _kinds() -> list[type[flk.Rule]]:
    return [flk.rules.find(name) for name in flk.rules.names()]
