"""`fedlora rules`: what each aggregation rule is, what travels under it, and its options."""

import click
from rich.text import Text

from fedlora_kernels.cli import screen
from fedlora_kernels.cli.program import require_torch
from fedlora_kernels.cli.rule_options import flag


@click.command
def rules() -> None:
    """List the aggregation rules."""
    require_torch()
    from fedlora_kernels.rules import rules as registry

    console = screen.out()
    wide = console.width >= screen.NARROW
    names = ["rule", "title", "arXiv"] if wide else ["rule"]
    table = screen.table(*names, "travels", "exact", "ranks", "after", "options")
    for rule in registry().values():
        name = Text(rule.name, style="bold")
        paper = Text(rule.paper, style=f"link https://arxiv.org/abs/{rule.paper}")
        table.add_row(
            *([name, Text(rule.title), paper] if wide else [Text("\n").join((name, paper))]),
            Text(rule.travels),
            Text(rule.exact),
            Text("any" if rule.heterogeneous else "equal"),
            Text(rule.after),
            Text((" " if wide else "\n").join(map(flag, rule.options)) or "-"),
        )
    for column in table.columns:
        column.no_wrap = column.header in ("rule", "arXiv", "ranks", "after")
    screen.show(console, table)
