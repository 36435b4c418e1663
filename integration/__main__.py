"""`python -m integration compare | run | report`. Wrong flags end with exit code 2 and one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from integration.compare import choose
from integration.compare import compare as compare_rules
from integration.report import write_report
from integration.settings import SettingsError, from_preset
from integration.tasks import TaskError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning with every aggregation rule, on one real task.",
)

Preset = Annotated[str, typer.Option(help="A name in integration/presets, or a .toml file.")]
Out = Annotated[Path, typer.Option(help="Folder for the run's files.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds of every rule.")]
Clients = Annotated[int | None, typer.Option(help="Number of clients.")]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps per client and round.")]
Alpha = Annotated[float | None, typer.Option(help="Dirichlet concentration; small is uneven.")]
Seed = Annotated[int | None, typer.Option(help="Decides all randomness.")]
Ranks = Annotated[str | None, typer.Option(help="One rank for all, or one per client: 8,8,4,4.")]
After = Annotated[
    str | None, typer.Option(help="continue or merge; without it, each rule's own way.")
]
Energy = Annotated[float | None, typer.Option(help="Energy that FLoRIST keeps, in (0, 1].")]
TrainSize = Annotated[int | None, typer.Option(help="At most so many training examples.")]
TestSize = Annotated[int | None, typer.Option(help="Examples in the test split.")]


@app.command()
def compare(
    preset: Preset = "quickstart",
    out: Out = Path("runs/compare"),
    rules: Annotated[str | None, typer.Option(help="Rules, separated by commas.")] = None,
    rounds: Rounds = None,
    clients: Clients = None,
    steps: Steps = None,
    alpha: Alpha = None,
    seed: Seed = None,
    ranks: Ranks = None,
    after: After = None,
    energy: Energy = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
) -> None:
    """Take several rules through the same rounds and compare them."""
    flags = locals()
    names = None if rules is None else tuple(name.strip() for name in rules.split(","))
    _start(flags | {"rules": names})


@app.command()
def run(
    rule: Annotated[str, typer.Option(help="The rule.")],
    preset: Preset = "quickstart",
    out: Out = Path("runs/run"),
    rounds: Rounds = None,
    clients: Clients = None,
    steps: Steps = None,
    alpha: Alpha = None,
    seed: Seed = None,
    ranks: Ranks = None,
    after: After = None,
    energy: Energy = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
) -> None:
    """Take one rule through its rounds."""
    flags = locals()
    del flags["rule"]
    _start(flags | {"rules": (rule,)})


@app.command()
def report(out: Annotated[Path, typer.Option(help="Folder of an earlier run.")]) -> None:
    """Write report.html again from the files of an earlier run."""
    if not (out / "summary.json").is_file():
        raise SettingsError(f"{out} has no summary.json; expected the folder of an earlier run")
    Console().print(str(write_report(out)))


def _start(flags: dict[str, Any]) -> None:
    """Settings from the flags, then the comparison."""
    preset, out, ranks = flags.pop("preset"), flags.pop("out"), flags.pop("ranks")
    try:
        numbers = None if ranks is None else tuple(int(rank) for rank in ranks.split(","))
    except ValueError:
        raise SettingsError(f"ranks must be numbers such as 8,8,4,4, found {ranks!r}") from None
    if out.exists() and not out.is_dir():
        raise SettingsError(f"out must be a folder, found the file {out}")
    settings = from_preset(preset, ranks=numbers, **flags)
    rules, left_out = choose(settings, explicit=flags["rules"] is not None)
    console = Console()
    for line in left_out:
        console.print(line)
    compare_rules(settings, rules, out, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except (SettingsError, TaskError) as error:
        message = str(error)
    except (click.Abort, KeyboardInterrupt):
        return 130
    else:
        return int(code or 0)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
