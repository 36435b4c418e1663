"""The aggregation rules: one file, one frozen dataclass each, whose fields are its options.

    flk.aggregate(clients, rule="florist", energy=0.9)
    flk.aggregate(clients, rule=flk.rules.FLoRIST(energy=0.9))

This package reads its own folder: ``rules/<name>.py`` is the rule of that name. torch is imported
when a rule computes, not before.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from fedlora_kernels.rules._rule import Option, Rule, option

_RULES: dict[str, type[Rule]] = {
    kind.name: kind
    for kind in sorted(
        (
            kind
            for found in iter_modules(__path__)
            if not found.name.startswith("_")
            for kind in vars(import_module(f"{__name__}.{found.name}")).values()
            if isinstance(kind, type) and issubclass(kind, Rule) and kind is not Rule
        ),
        key=lambda kind: kind.published or kind.paper,
    )
}

globals().update({kind.__name__: kind for kind in _RULES.values()})

__all__ = ["Option", "Rule", "find", "make", "names", "option", "preferred"]
__all__ += [kind.__name__ for kind in _RULES.values()]


if TYPE_CHECKING:  # what the folder holds is known when it is read

    def __getattr__(name: str) -> Any: ...


def names() -> tuple[str, ...]:
    """The rules' names, in the order in which they were published."""
    return tuple(_RULES)


def find(name: str) -> type[Rule]:
    """The rule of this name, as a class.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name not in _RULES:
        raise ValueError(f"unknown rule {name!r}; expected one of {', '.join(_RULES)}")
    return _RULES[name]


def preferred() -> str:
    """The rule that the command line takes where none is named."""
    return next(name for name, kind in _RULES.items() if kind.preferred)


def make(rule: "str | Rule", **options: object) -> Rule:
    """The rule itself, or the rule of this name with these options.

    Raises:
        ValueError: the rule is unknown, or an option is out of range.
        TypeError: the rule has no such option, or already has its options.
    """
    if isinstance(rule, Rule):
        if options:
            raise TypeError(
                f"options are fields of the rule: {type(rule).__name__}({', '.join(options)}=...), "
                "found a rule and options beside it"
            )
        return rule
    return find(rule).with_options(options)
