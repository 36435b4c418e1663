"""The rules' options as flags: each keyword argument of a rule's `solve` is one.

A new rule's options appear here without a change: `max_rank: int | None = None` becomes
`--max-rank INTEGER`, a bool `--name/--no-name`, a sequence of numbers `0.8,0.9`. The help comes
from the Args section of solve's docstring.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from fedlora_kernels.cli.program import BadInput, require_torch

NUMBERS = "NUMBER,NUMBER,..."
_GIVEN = "fedlora_kernels.rule_options"


class RuleCommand(click.Command):
    """A command that takes the options of all rules beside its own; see :func:`given`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the rules' options."""
        return [*super().get_params(ctx), *rule_options()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the rules'."""
        sections = {"Options": super().get_params(ctx), "Options of the rules": rule_options()}
        for title, parameters in sections.items():
            options = [item for item in parameters if isinstance(item, click.Option)]
            records = [option.get_help_record(ctx) for option in options]
            if rows := [record for record in records if record is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without torch no rule's option is known, which is then the thing to say."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption:
            require_torch()
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Hand the rules' options over beside the command's parameters."""
        values = {str(option.name): ctx.params.pop(str(option.name)) for option in rule_options()}
        ctx.meta[_GIVEN] = {name: value for name, value in values.items() if value is not None}
        return super().invoke(ctx)


def given(context: click.Context, rule: str) -> dict[str, Any]:
    """The rule's options as the user gave them.

    Raises:
        BadInput: there is no such rule, or it lacks one of the options.
    """
    from fedlora_kernels.rules import rules

    known = rules()
    if rule not in known:
        raise BadInput(f"unknown rule {rule!r}; expected one of {', '.join(known)}")
    options: dict[str, Any] = context.meta[_GIVEN]
    for name in options:
        if name not in known[rule].options:
            owners = ", ".join(other for other in known if name in known[other].options)
            own = ", ".join(map(flag, known[rule].options)) or "none"
            raise BadInput(
                f"rule {rule!r} has no option {flag(name)} (it belongs to {owners}); its options: "
                f"{own}"
            )
    return options


def numbers(text: str, kind: Callable[[str], float] = float) -> tuple[float, ...]:
    """Comma-separated numbers as a tuple.

    Raises:
        click.BadParameter: a part is no number; click adds the option's name.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(kind(part))
        except ValueError:
            what = "integer" if kind is int else "number"
            raise click.BadParameter(f"{part.strip()!r} in {text!r} is no {what}") from None
    return tuple(found)


def integers(text: str) -> tuple[float, ...]:
    """Comma-separated integers as a tuple."""
    return numbers(text, int)


def flag(name: str) -> str:
    """`max_rank` -> `--max-rank`."""
    return "--" + name.replace("_", "-")


@cache
def rule_options() -> tuple[click.Option, ...]:
    """One flag per option name over all rules; none where torch, and so the registry, is missing.

    Raises:
        TypeError: two rules give one name to options of different types.
    """
    try:
        from fedlora_kernels.rules import rules
    except ImportError:
        return ()
    owners: dict[str, list[str]] = {}
    for rule in rules().values():
        for name in rule.options:
            owners.setdefault(name, []).append(rule.name)
    return tuple(_option(name, names) for name, names in owners.items())


def _option(name: str, owners: Sequence[str]) -> click.Option:
    from fedlora_kernels.rules import rules

    known = rules()
    annotations = [get_type_hints(known[owner].solve)[name] for owner in owners]
    kinds = [_without_none(annotation) for annotation in annotations]
    if any(kind != kinds[0] for kind in kinds):
        raise TypeError(f"option {name!r} has different types in {', '.join(owners)}: {kinds}")
    texts: dict[str, list[str]] = {}
    defaults: dict[str, list[str]] = {}
    for owner in owners:
        texts.setdefault(described(known[owner].solve, name), []).append(owner)
        defaults.setdefault(_default(known[owner].options[name].default), []).append(owner)
    text = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
    for value, names in defaults.items():
        if value:
            text += (
                f" [default: {value}]" if len(defaults) == 1 else f" [{', '.join(names)}: {value}]"
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


def _default(value: object) -> str:
    return "" if value is None or value == () or value is inspect.Parameter.empty else str(value)


def described(function: Callable[..., object], name: str) -> str:
    """What the Args section of a docstring says of an argument, on one line."""
    text = inspect.getdoc(function) or ""
    found = re.search(rf"^    {re.escape(name)}: (.*(?:\n {{5,}}\S.*)*)", text, re.MULTILINE)
    return " ".join(found[1].split()).rstrip(".") if found else ""
