"""The command line `fedlora`: one file per command, all of them registered here.

No module of this folder imports torch when it is imported; the commands that need it do so when
they run.
"""

import io
import sys
from typing import Annotated

import typer

from fedlora_kernels import __version__
from fedlora_kernels.cli.aggregate import aggregate
from fedlora_kernels.cli.bench import bench
from fedlora_kernels.cli.doctor import doctor
from fedlora_kernels.cli.inspect import inspect
from fedlora_kernels.cli.program import Command, Program
from fedlora_kernels.cli.rule_options import RuleCommand
from fedlora_kernels.cli.rules import rules

app = typer.Typer(
    cls=Program,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Correct, fast aggregation of LoRA adapters for federated fine-tuning servers.",
)
app.command(cls=RuleCommand)(aggregate)
app.command(cls=Command)(inspect)
app.command(cls=Command)(rules)
app.command(cls=Command)(doctor)
app.command(cls=Command)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedlora {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point `fedlora`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no file name may break the report
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fedlora")
