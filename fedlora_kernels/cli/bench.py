"""`fedlora bench`: this library beside what a user would run instead, on this machine.

The benchmarks are part of the source checkout, not of the package.
"""

import sys
from importlib import import_module
from pathlib import Path

import click

import fedlora_kernels
from fedlora_kernels.cli.program import BadInput, require_torch


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
    """Time the steps of an aggregation beside alternatives such as PEFT, an SVD and NumPy.

    All get the same inputs, and outputs are checked before a time is reported. Needs a source
    checkout of this library. `python -m benchmarks.run --list` lists more benchmarks.
    """
    require_torch()
    checkout = Path(fedlora_kernels.__file__).parents[1]
    if not (checkout / "benchmarks" / "suites" / "short.py").is_file():
        raise BadInput(
            "fedlora bench needs a source checkout of fedlora_kernels; this installation has no "
            "benchmarks/"
        )
    sys.path.insert(0, str(checkout))
    arguments = ["--suite", "short" if short else "long", "--device", device or "cpu"]
    arguments += ["--threads", str(threads)] if threads else []
    arguments += ["--results", str(out)] if out else []
    context.exit(import_module("benchmarks.run").main(arguments))
