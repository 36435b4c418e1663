"""The table at the end of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = (
    "rule",
    "accuracy",
    "loss",
    "error",
    "SVD floor",
    "rank",
    "up MB",
    "down MB",
    "agg. ms",
)

MISSING = "\u2013"
"""In place of a number that is not finite."""


def cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One rule of summary.json as the texts under COLUMNS."""
    return (
        entry["rule"],
        accuracy(entry),
        MISSING if entry["loss"] is None else f"{entry['loss']:.3f}",
        relative(entry["relative_error"]),
        relative(entry["svd_floor"]),
        f"{entry['rank']:.1f}",
        megabytes(entry["bytes_up"]),
        megabytes(entry["bytes_down"]),
        f"{entry['aggregation_ms']:.1f}",
    )


def accuracy(entry: Mapping[str, Any]) -> str:
    """0.731; of several seeds 0.731 +- 0.012, with ~ where the best rule cannot be told from it."""
    if "accuracy_interval" not in entry:
        return f"{entry['accuracy']:.3f}"
    mark = " ~" if entry["within_noise"] else ""
    return f"{entry['accuracy']:.3f} \u00b1 {entry['accuracy_interval']:.3f}{mark}"


def table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """summary.json as a table for the terminal."""
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
        caption=(
            "error: |sent - ideal| / |ideal| of the update, mean over modules and rounds\n"
            "MB: all clients, one round"
            + (
                "\n\u00b1: 95 % interval of the mean; ~: within noise of the best rule"
                if any("accuracy_interval" in entry for entry in summary)
                else ""
            )
        ),
        caption_justify="left",
    )
    for column in COLUMNS:
        result.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    for entry in summary:
        result.add_row(*cells(entry))
    return result


def relative(error: float | None) -> str:
    """A relative error with as many digits as it deserves: 0.213, 3e-08, 0."""
    if error is None:
        return MISSING
    if error == 0 or error >= 1e-3:
        return f"{error:.3f}" if error else "0"
    return f"{error:.0e}"


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    return f"{size / 1e6:.2f}"
