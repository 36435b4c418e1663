"""`fedlora bench`: this library beside what a user would run instead, on this machine."""

from pathlib import Path

import click

from fedlora_kernels.cli.program import require_torch


@click.command
@click.option("--short/--long", default=True, help="Four modules and few rounds, or more of both.")
@click.option("--device", help="A torch device; the CPU by default.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; torch's own choice by default."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for DEVICE/short.json with all numbers.",
)
@click.pass_context
def bench(
    context: click.Context, short: bool, device: str | None, threads: int | None, out: Path | None
) -> None:
    """Time every stage and its peers on the same inputs; outputs are checked before a number."""
    require_torch()
    from fedlora_kernels.bench import main

    context.exit(main(short, device=device, threads=threads, out=out))
