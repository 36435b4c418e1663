"""`python -m integration compare | run | report`. Wrong flags end with exit code 2 and one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console

import fedlora_kernels as flk
from integration.compare import compare as compare_rules
from integration.flower import launch as flower
from integration.lm_eval import evaluate as lm_eval
from integration.model.loading import fastest
from integration.model.pretrain import RECIPES, Pretraining, pretrain, recipe
from integration.plan import plan, show
from integration.report.html import write_report
from integration.rounds.records import check_folder
from integration.rounds.rule import choose
from integration.settings import Settings, SettingsError, from_preset
from integration.settings.flags import Start, flags_of, run_flags
from integration.tasks import TaskError
from integration.tiny import miniature

FOLDER = click.Path(path_type=Path)


@click.group(no_args_is_help=False)
def app() -> None:
    """Federated fine-tuning with every aggregation rule, on one real task."""


@run_flags(out="runs/compare")
@app.command()
def compare(start: Start, changes: dict[str, Any]) -> None:
    """Take several rules through the same rounds and compare them.

    By default every option has the preset's value. The rules' own options other than --energy are
    set in a preset file, in the table [options.RULE].
    """
    _run(start, changes)


@run_flags(out="runs/run", hidden="rules")
@app.command()
@click.option("--rule", help="The rule; by default the preset's rules.")
def run(start: Start, changes: dict[str, Any], rule: str | None) -> None:
    """Take one rule, or the preset's rules, through the rounds.

    If one rule ran, its last adapter is written to OUT. By default every option has the preset's
    value. The rules' own options other than --energy are set in a preset file, in the table
    [options.RULE].
    """
    if changes["rules"] is not None:
        raise SettingsError("run takes one rule (--rule); compare takes several (--rules)")
    _run(start, changes | {"rules": None if rule is None else (rule,)})


@app.command("pretrain")
@click.option("--out", type=FOLDER, required=True, help="Folder for the model.")
def pretrain_command(out: Path, shape: str | None, **changes: Any) -> None:
    """Train a small Llama from scratch on generated text, and write a transformers folder."""
    pretrain(recipe(shape, **changes), out, Console())


pretrain_command.params += flags_of(Pretraining)


@app.command("lm-eval")
@click.option("--out", type=FOLDER, required=True, help="Folder of an adapter that a run has left.")
@click.option("--tasks", required=True, help="Tasks of lm-evaluation-harness, separated by commas.")
@click.option("--limit", type=int, help="Examples per task.")
def lm_eval_command(out: Path, tasks: str, limit: int | None) -> None:
    """Evaluate a run's adapter with the language model evaluation harness."""
    names = [name.strip() for name in tasks.split(",")]
    Console().print_json(data=lm_eval(out, names, limit))


@app.command()
@click.argument("runs", nargs=-1, type=FOLDER)
@click.option(
    "--out",
    type=FOLDER,
    help="The report's folder, or .html file. Without RUNS, the folder of the run.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write the report of one or several earlier runs again, from their files."""
    folders = list(runs or ([] if out is None else [out]))
    if not folders:
        raise SettingsError("report needs the folder of an earlier run, or several")
    target = out if runs else None
    if target is None and len(folders) > 1:
        raise SettingsError("the report of several runs needs --out")
    if target is not None and target.suffix != ".html":
        target = target / "report.html"
    Console().print(str(write_report(*folders, out=target)))


def _run(start: Start, changes: dict[str, Any]) -> None:
    """Settings from the flags, then the plan, or the comparison, here or on Flower."""
    settings, explicit = from_preset(start.preset, **changes), changes["rules"] is not None
    console = Console()
    if start.dry_run:
        with TemporaryDirectory() as folder:  # a plan leaves nothing behind
            _plan(start, settings, Path(folder), explicit, console)
        return
    small = miniature(settings, start.out) if start.tiny else None
    settings = fastest(settings if small is None else small.settings)
    rules, left_out = choose(settings, explicit=explicit)
    check_folder(start.out, settings, resume=start.resume)
    if small is not None:
        small.write()
    _pretrain_what_is_missing(settings, console)
    if start.engine == "flower":  # its server says what is left out
        flower.run(settings, start.out, resume=start.resume, superlink=start.superlink)
        return
    for line in left_out:
        console.print(line)
    compare_rules(settings, rules, start.out, console, resume=start.resume)


def _plan(start: Start, settings: Settings, folder: Path, explicit: bool, console: Console) -> None:
    """Print the plan of a run; `folder` is where a miniature's files are read from."""
    if start.tiny:
        small = miniature(settings, folder)
        small.write()
        settings = small.settings
    rules, left_out = choose(settings, explicit=explicit)
    for line in left_out:
        console.print(line)
    show(plan(replace(settings, rules=tuple(rule.name for rule in rules))), console)


def _pretrain_what_is_missing(settings: Settings, console: Console) -> None:
    """Make the model of a preset that starts from one of ours, where it has not been made yet."""
    folder = Path(settings.model)
    ours = settings.init == "pretrained" and settings.config in RECIPES
    if ours and not (folder / "config.json").is_file():
        console.print(f"{folder} is not there yet: pretraining {settings.config}")
        pretrain(recipe(settings.config), folder, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        code = app.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except (SettingsError, TaskError) as error:
        message = str(error)
    except flk.AdapterError as error:  # such as a client whose training has diverged
        print(f"error: {error}", file=sys.stderr)
        return 1
    except flower.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    else:
        return int(code or 0)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
