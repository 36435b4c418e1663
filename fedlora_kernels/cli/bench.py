"""`fedlora bench`: this library beside what a user would run instead, on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from fedlora_kernels.cli.program import require_torch


def bench(
    short: Annotated[
        bool, typer.Option("--short/--long", help="Four modules and few rounds, or more of both.")
    ] = True,
    device: Annotated[str | None, typer.Option(help="A torch device; the CPU by default.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's own choice by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for DEVICE/short.json with all numbers.")
    ] = None,
) -> None:
    """Time every stage and its peers on the same inputs; outputs are checked before a number."""
    require_torch()
    from fedlora_kernels.bench import main

    raise typer.Exit(main(short, device=device, threads=threads, out=out))
