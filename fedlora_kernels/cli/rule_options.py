"""The rules' options as flags: each field of a rule that is an option is one.

A new rule's options appear here without a change: `max_rank: int | None` becomes
`--max-rank INTEGER`, a bool `--name/--no-name`, a sequence of numbers `0.8,0.9`. The help is the
option's own. Those of the robust rules begin with `--robust-`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from fedlora_kernels import robust, rules
from fedlora_kernels._options import Option, Registry
from fedlora_kernels.cli.program import BadInput

NUMBERS = "NUMBER,NUMBER,..."
_GIVEN = "fedlora_kernels.rule_options"


@dataclass(frozen=True)
class Flags:
    """The options of all objects of a registry, as flags that share a prefix."""

    title: str
    registry: Registry[Any]
    prefix: str = ""

    @cached_property
    def owners(self) -> dict[str, dict[str, Option]]:
        """Option name -> rule name -> the option, over all rules."""
        owners: dict[str, dict[str, Option]] = {}
        for rule, kind in self.registry.kinds.items():
            for name, item in kind.options().items():
                owners.setdefault(name, {})[rule] = item
        return owners

    @cached_property
    def options(self) -> tuple[click.Option, ...]:
        """One flag per option name over all rules.

        Raises:
            TypeError: two rules give one name to options of different types.
        """
        return tuple(_option(self.prefix + name, owners) for name, owners in self.owners.items())

    def given(self, context: click.Context, rule: str) -> dict[str, Any]:
        """The rule's options as the user gave them.

        Raises:
            BadInput: there is no such rule, or it lacks one of the options.
        """
        try:
            kind = self.registry.find(rule)
        except ValueError as error:
            raise BadInput(str(error)) from None
        found, own = self.all_given(context), kind.options()
        for name in found:
            if name not in own:
                owners = ", ".join(self.owners[name])
                known = ", ".join(flag(self.prefix + other) for other in own) or "none"
                raise BadInput(
                    f"{kind.noun} {rule!r} has no option {flag(self.prefix + name)} (it belongs "
                    f"to {owners}); its options: {known}"
                )
        return found

    def all_given(self, context: click.Context) -> dict[str, Any]:
        """The options that the user gave, whosever they are."""
        values = context.meta[_GIVEN]
        names = ((name, self.prefix + name) for name in self.owners)
        return {name: values[flagged] for name, flagged in names if values[flagged] is not None}


RULES = Flags("Options of the rules", rules.registry)
ROBUST = Flags("Options of the robust rules", robust.registry, "robust_")


class RuleCommand(click.Command):
    """A command that takes the options of all rules beside its own; see :meth:`Flags.given`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the rules' options."""
        return [*super().get_params(ctx), *RULES.options, *ROBUST.options]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the rules'."""
        sections: dict[str, Sequence[click.Parameter]] = {"Options": super().get_params(ctx)}
        sections |= {flags.title: flags.options for flags in (RULES, ROBUST)}
        for title, parameters in sections.items():
            options = [item for item in parameters if isinstance(item, click.Option)]
            records = [option.get_help_record(ctx) for option in options]
            if rows := [record for record in records if record is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Hand the rules' options over beside the command's parameters."""
        names = [str(option.name) for option in (*RULES.options, *ROBUST.options)]
        ctx.meta[_GIVEN] = {name: ctx.params.pop(name) for name in names}
        return super().invoke(ctx)


def numbers(text: str, kind: Callable[[str], float] = float) -> tuple[float, ...]:
    """Comma-separated numbers as a tuple.

    Raises:
        click.BadParameter: a part is not a number; click adds the option's name.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(kind(part))
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise click.BadParameter(f"{part.strip()!r} in {text!r} is not {what}") from None
    return tuple(found)


def integers(text: str) -> tuple[float, ...]:
    """Comma-separated integers as a tuple."""
    return numbers(text, int)


def flag(name: str) -> str:
    """`max_rank` -> `--max-rank`."""
    return "--" + name.replace("_", "-")


def _option(name: str, owners: dict[str, Option]) -> click.Option:
    kinds = [_without_none(item.kind) for item in owners.values()]
    if any(kind != kinds[0] for kind in kinds):
        raise TypeError(f"option {name!r} has different types in {', '.join(owners)}: {kinds}")
    texts: dict[str, list[str]] = {}
    defaults: dict[str, list[str]] = {}
    for owner, item in owners.items():
        texts.setdefault(item.help, []).append(owner)
        defaults.setdefault(_default(name, item.default), []).append(owner)
    text = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
    for value, names in defaults.items():
        if value:
            text += (
                f"  [default: {value}]"
                if len(defaults) == 1
                else f"  [default of {', '.join(names)}: {value}]"
            )
    declared = flag(name)
    is_bool = kinds[0] is bool
    kind = _click_type(kinds[0])
    return click.Option(
        param_decls=[name, f"{declared}/--no-{declared[2:]}" if is_bool else declared],
        type=kind,
        metavar=NUMBERS if kind in (numbers, integers) else None,
        is_flag=is_bool or None,
        default=None,  # "not given", which leaves the rule its own default
        help=text,
        show_default=False,
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        left = [item for item in get_args(annotation) if item is not NoneType]
        return left[0] if len(left) == 1 else str
    return annotation


def _click_type(kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return click.Choice([str(argument) for argument in arguments])
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return integers if arguments[0] is int else numbers
    return {bool: click.BOOL, int: click.INT, float: click.FLOAT}.get(kind, click.STRING)


def _default(name: str, value: object) -> str:
    """The default as one types it; nothing where the help text says it."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return "" if value is None or value == () else str(value)
