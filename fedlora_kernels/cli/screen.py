"""What the commands share on the screen: consoles, progress bars, JSON and how numbers look."""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from fedlora_kernels.cli.program import bad_input

if TYPE_CHECKING:
    from fedlora_kernels.adapters.adapter import Adapter

# Tables that go into a file or a pipe are as wide as they need to be.
_WIDE = 200
NARROW = 110
"""Terminals of fewer columns get the tables' most important columns only."""


def out() -> Console:
    """The console for results, on stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def table(*text: str, numbers: Sequence[str] = (), title: str = "", caption: str = "") -> Table:
    """A plain table with columns of text, then of numbers, which are never broken."""
    padding = (0, 1, 0, 0)
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    for heading in text:
        made.add_column(heading, overflow="fold", min_width=min(len(heading), 10))
    for heading in numbers:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def show(console: Console, made: Table) -> None:
    """Print a table below its title and above its caption, neither broken to the table's width."""
    title, caption = str(made.title or ""), str(made.caption or "")
    made.title = made.caption = None
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(made)
    if caption:
        console.print(Text(caption, style="dim"), soft_wrap=True)


def load(paths: Sequence[str], *, pickled: bool = False, numbers: bool = True) -> list["Adapter"]:
    """The adapters in these folders, with a progress bar; see :meth:`Adapter.load`.

    Raises:
        BadInput: a folder cannot be read as an adapter.
    """
    from fedlora_kernels.adapters.adapter import Adapter

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with _progress(*columns) as progress:
        task = progress.add_task("Loading clients", total=len(paths))
        adapters = []
        for path in paths:
            with bad_input():
                adapters.append(Adapter.load(path, pickled=pickled, numbers=numbers))
            progress.advance(task)
    return adapters


@contextmanager
def working(what: str) -> Iterator[None]:
    """A moving bar while one long call runs."""
    with _progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    ) as progress:
        progress.add_task(what, total=None)
        yield


def _progress(*columns: Any) -> Progress:
    """On stderr, gone when done, absent where stderr is no terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    return Progress(*columns, console=console, transient=True, disable=not shown)


def print_json(value: object) -> None:
    """Standard JSON on stdout: NaN and the infinities become null."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 module", "6 modules"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def share(value: float) -> str:
    """An energy or an error: fixed digits in the middle, 1e-7 for what is nearly nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("the loop returns")


def spread(values: Sequence[float], form: Any) -> str:
    """The one value, or the smallest and the largest: "8" or "4 to 16"."""
    low, high = form(min(values)), form(max(values))
    return str(low) if low == high else f"{low} to {high}"
