"""Table: measured rows as a terminal shows them."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.stand.measure import Row

COLUMNS = {"time": 7, "ratio": 6, "of floor": 8, "GB/s": 5, "GFLOP/s": 7, "error": 7}
"""Heading -> width in characters: with the variant's name a line of 80."""


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One per comparison: time, ratio to its first row, share of the floor, error; 80 columns."""
    for (stage, _, label), block in groupby(
        rows, key=lambda row: (row.stage, row.comparison, inputs(row))
    ):
        shown = Table(
            title=f"[bold]{stage}[/bold]  {label}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        shown.add_column("", no_wrap=True, width=26)
        for heading, width in COLUMNS.items():
            shown.add_column(heading, justify="right", no_wrap=True, width=width)
        for row in block:
            shown.add_row(row.variant, *_numbers(row))
        yield shown


def inputs(row: Row) -> str:
    """What a row was measured on: 8 modules 4096 x 4096, clients 8 x 16, fp32."""
    modules = "1 module" if row.modules == 1 else f"{row.modules} modules"
    family = "" if row.family == "shared_start" else f", {row.family}"
    size = f"{row.m} x {row.n}" if "+" not in row.module else f"of {row.model} ({row.module})"
    return f"{modules} {size}, clients {row.ranks}, {row.dtype}{family}"


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def _numbers(row: Row) -> tuple[str, ...]:
    worst = max((float(check["error"]) for check in row.checks), default=float("nan"))
    if row.seconds is None:
        return ("[red]no time[/red]", "", "", "", "", f"[red]{worst:.1e}[/red]")
    share = f"{row.share_of_floor:.0%}" if row.share_of_floor is not None else ""
    times = "" if row.times_first is None else f"{row.times_first:.2f}"
    return (
        duration(row.seconds),
        times,
        share,
        f"{row.gbytes_per_second:.1f}",
        f"{row.gflops:.1f}",
        f"{max(worst, 0.0):.0e}",
    )
