"""The table at the end of a comparison: summary.json as columns, for the terminal and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Entry = Mapping[str, Any]
"""One rule of summary.json."""

MISSING = "\u2013"
"""In place of a number that is not finite, or that the rule does not have."""

WIDE = 1000
"""Characters: room for every column."""


@dataclass(frozen=True)
class Column:
    """One column: its title, and what stands in it."""

    title: str
    text: Callable[[Entry], str]
    best: tuple[str, Callable[..., Any]] | None = None
    """The key whose best value is marked in the report, and max or min."""
    needs: str | None = None
    """A key that only some runs have; the column is left out where no rule has it."""
    about: str = ""
    """What a column that not every table has is."""


def columns(summary: Sequence[Entry]) -> list[Column]:
    """The columns of these rules."""
    return [
        column
        for column in COLUMNS
        if column.needs is None or any(column.needs in entry for entry in summary)
    ]


def table(summary: Sequence[Entry], width: int = WIDE) -> Table:
    """summary.json as a table of at most `width` characters, where leaving out SPARE allows it."""
    shown = columns(summary)
    made = _table(summary, shown)
    for give_way in SPARE:
        if Console(width=WIDE).measure(made).maximum <= width:
            break
        shown = give_way(shown)
        made = _table(summary, shown)
    return made


def _table(summary: Sequence[Entry], shown: Sequence[Column]) -> Table:
    caption = [
        "error: |sent - ideal| / |ideal| of the update, mean over modules and rounds",
        "MB: all clients, one round",
        *(f"{column.title}: {column.about}" for column in shown if column.about),
    ]
    if any("accuracy_interval" in entry for entry in summary):
        caption.append("\u00b1: 95 % interval of the mean; ~: within noise of the best rule")
    result = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
        caption="\n".join(caption),
        caption_justify="left",
    )
    for column in shown:
        justify = "left" if column.title == "rule" else "right"
        result.add_column(column.title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for entry in summary:
        result.add_row(*(column.text(entry) for column in shown))
    return result


def score(key: str, noise: str | None = None) -> Callable[[Entry], str]:
    """0.731; of several seeds 0.731 +- 0.012, with ~ where the best rule cannot be told from it.

    `noise` is the key that says so.
    """

    def text(entry: Entry) -> str:
        value, half = entry.get(key), entry.get(f"{key}_interval")
        if value is None:
            return MISSING
        if half is None:
            return f"{value:.3f}"
        mark = " ~" if noise and entry.get(noise) else ""
        return f"{value:.3f} \u00b1 {half:.3f}{mark}"

    return text


def alone(key: str) -> Callable[[Entry], str]:
    """0.731, also of several seeds."""
    return lambda entry: score(key)({key: entry.get(key)})


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


COLUMNS = (
    Column("rule", lambda entry: str(entry["rule"])),
    Column("accuracy", score("accuracy", "within_noise"), best=("accuracy", max)),
    Column(
        "clients",
        score("client_accuracy", "client_within_noise"),
        best=("client_accuracy", max),
        needs="client_accuracy",
        about="accuracy of what a client runs on its own test examples, mean over the clients",
    ),
    Column(
        "global",
        score("global_accuracy"),
        needs="global_accuracy",
        about="accuracy of the clients' mean update, where every client runs its own model",
    ),
    Column("loss", score("loss", "loss_within_noise")),
    Column(
        "rate",
        lambda entry: f"{entry['learning_rate']:g}",
        needs="learning_rate",
        about="the rule's learning rate, chosen on the validation split",
    ),
    Column("error", lambda entry: relative(entry["relative_error"])),
    Column("SVD floor", lambda entry: relative(entry["svd_floor"])),
    Column("rank", lambda entry: f"{entry['rank']:.1f}"),
    Column("up MB", lambda entry: megabytes(entry["bytes_up"]), best=("bytes_up", min)),
    Column("down MB", lambda entry: megabytes(entry["bytes_down"]), best=("bytes_down", min)),
    Column("agg. ms", lambda entry: f"{entry['aggregation_ms']:.1f}"),
)


def _without(title: str) -> Callable[[Sequence[Column]], list[Column]]:
    return lambda shown: [column for column in shown if column.title != title]


def _without_interval(title: str, key: str) -> Callable[[Sequence[Column]], list[Column]]:
    return lambda shown: [
        replace(column, text=alone(key)) if column.title == title else column for column in shown
    ]


SPARE: tuple[Callable[[Sequence[Column]], list[Column]], ...] = (
    _without_interval("loss", "loss"),
    _without_interval("global", "global_accuracy"),
    _without("agg. ms"),
    _without("global"),
    _without("SVD floor"),
)
"""What gives way in a narrow terminal, in this order; the report and summary.json have all."""
