"""`python -m integration compare | run | report`. Wrong flags end with exit code 2 and one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console

import fedlora_kernels as flk
from integration.compare import choose
from integration.compare import compare as compare_rules
from integration.flower import launch as flower
from integration.lm_eval import evaluate as lm_eval
from integration.model.pretrain import RECIPES, pretrain, recipe
from integration.plan import plan, show
from integration.report.html import write_report
from integration.settings import Settings, SettingsError, from_preset
from integration.settings.flags import Start, starting
from integration.tasks import TaskError
from integration.tiny import tiny as in_miniature

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning with every aggregation rule, on one real task.",
)


@app.command()
@starting(out="runs/compare")
def compare(start: Start, changes: dict[str, Any]) -> None:
    """Take several rules through the same rounds and compare them."""
    _run(start, changes)


@app.command()
@starting(out="runs/run")
def run(
    start: Start,
    changes: dict[str, Any],
    rule: Annotated[str | None, typer.Option(help="The rule; else the preset's.")] = None,
    rules: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Take one rule, or the preset's, through its rounds; one rule's adapter is left in OUT."""
    if rules is not None:
        raise SettingsError("run takes one rule (--rule); compare takes several (--rules)")
    _run(start, changes | {"rules": None if rule is None else (rule,)})


@app.command("pretrain")
def pretrain_command(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    shape: Annotated[
        str | None,
        typer.Option(help="A name in integration/configs; llama-30m on a GPU, else llama-tiny."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest.")] = None,
    problems: Annotated[int | None, typer.Option(help="Different word problems.")] = None,
    level: Annotated[int | None, typer.Option(help="Operations of one, at most.")] = None,
    largest: Annotated[int | None, typer.Option(help="First number of one, at most.")] = None,
    code: Annotated[float | None, typer.Option(help="Share of the library's texts.")] = None,
    sums: Annotated[float | None, typer.Option(help="Share of bare sums.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides all randomness.")] = None,
) -> None:
    """Train a small Llama from scratch on generated text, and write a transformers folder."""
    settings = recipe(
        shape,
        steps=steps,
        batch_size=batch_size,
        length=length,
        learning_rate=learning_rate,
        problems=problems,
        level=level,
        largest=largest,
        code=code,
        sums=sums,
        seed=seed,
    )
    pretrain(settings, out, Console())


@app.command("lm-eval")
def lm_eval_command(
    out: Annotated[Path, typer.Option(help="Folder of an adapter that a run has left.")],
    tasks: Annotated[str, typer.Option(help="The harness's tasks, separated by commas.")],
    limit: Annotated[int | None, typer.Option(help="Examples per task.")] = None,
) -> None:
    """Evaluate a run's adapter with the language model evaluation harness."""
    names = [name.strip() for name in tasks.split(",")]
    Console().print_json(data=lm_eval(out, names, limit))


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders of earlier runs.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The report's folder, or .html file; without RUNS the run's folder."),
    ] = None,
) -> None:
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
    settings = from_preset(start.preset, **changes)
    if start.tiny:
        settings = in_miniature(settings, start.out)
    rules, left_out = choose(settings, explicit=changes["rules"] is not None)
    console = Console()
    for line in left_out:
        console.print(line)
    chosen = replace(settings, rules=tuple(rule.name for rule in rules))
    if start.dry_run:
        show(plan(chosen), console)
        return
    _pretrain_what_is_missing(settings, console)
    if start.engine == "flower":
        flower.run(chosen, start.out, resume=start.resume, superlink=start.superlink)
    else:
        compare_rules(settings, rules, start.out, console, resume=start.resume)


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
        code = app(args=arguments, standalone_mode=False)
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
