"""The command line `fedlora`: one file per command, all of them registered here.

No module of this folder imports torch when it is imported; the commands that need it do so when
they run.
"""

import io
import sys

import click

from fedlora_kernels import __version__
from fedlora_kernels.cli.aggregate import aggregate as aggregate_command
from fedlora_kernels.cli.bench import bench as bench_command
from fedlora_kernels.cli.doctor import doctor as doctor_command
from fedlora_kernels.cli.inspect import inspect as inspect_command
from fedlora_kernels.cli.program import Program
from fedlora_kernels.cli.rules import rules as rules_command


@click.group(
    cls=Program,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, message="fedlora %(version)s", help="Print the version.")
@click.pass_context
def app(context: click.Context) -> None:
    """Correct, fast aggregation of LoRA adapters for federated fine-tuning servers."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (aggregate_command, inspect_command, rules_command, doctor_command, bench_command):
    app.add_command(command)


def main() -> None:
    """The entry point `fedlora`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no file name may break the report
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="fedlora")
