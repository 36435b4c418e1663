"""`fedlora rules`: what each aggregation rule is, what travels under it, and its options."""

import click
from rich.text import Text

from fedlora_kernels import rules as registry
from fedlora_kernels.cli import screen
from fedlora_kernels.cli.rule_options import flag

_CAPTION = """\
travels: what a client sends. ranks: of the clients, any or equal.
after: continue, the next round starts from the global adapter (or each client's own);
       merge, first the adapter or its residual is merged into the base model
       (in 16 or 32 bits: merging into 4 or 8 bits rounds the update).
`fedlora aggregate --help` says what the options mean."""


@click.command
@click.option("--markdown", is_flag=True, help="Print the table of the README.")
def rules(markdown: bool) -> None:
    """List the aggregation rules."""
    if markdown:
        click.echo(as_markdown())
        return
    console = screen.out()
    wide = console.width >= screen.NARROW
    names = ["rule", "title", "paper"] if wide else ["rule"]
    headings = ("travels", "global update", "ranks", "after", "options")
    table = screen.table(*names, *headings, caption=_CAPTION)
    for rule in map(registry.find, registry.names()):
        name = Text(rule.name, style="bold")
        paper = Text(rule.paper, style=f"link {rule.link()}")
        table.add_row(
            *([name, Text(rule.title), paper] if wide else [Text("\n").join((name, paper))]),
            Text(rule.travels),
            Text(rule.exact),
            Text("any" if rule.heterogeneous else "equal"),
            Text(rule.after),
            Text((" " if wide else "\n").join(map(flag, rule.options())) or "-"),
        )
    for column in table.columns:
        column.no_wrap = column.header in ("rule", "paper", "ranks", "after")
    screen.show(console, table)


def as_markdown() -> str:
    """The README's table of all rules."""
    heads = ("`rule=`", "paper", "what travels", "global update", "different ranks",
             "next round starts from")  # fmt: skip
    lines = [heads, ("---",) * len(heads)]
    for rule in map(registry.find, registry.names()):
        lines.append(
            (
                f"`{rule.name}`",
                f"{rule.title}, [{rule.paper}]({rule.link()})",
                rule.travels,
                rule.exact,
                "yes" if rule.heterogeneous else "no",
                rule.start(),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
