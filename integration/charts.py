"""The figures of the report, as SVG texts without outside references.

Rules get a panel each, in which the other rules stay visible in grey: seven crossing lines in one
panel cannot be told apart. Two colours that every kind of colour vision separates (Okabe and Ito)
say whether a rule reaches its SVD floor.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

Rounds = Sequence[Mapping[str, Any]]
"""The lines of metrics.jsonl of one rule."""

AT_FLOOR = "#0072B2"
ABOVE_FLOOR = "#D55E00"
GREY = "#B8BEC6"
INK = "#24292F"
MUTED = "#6E7781"

AT_FLOOR_WITHIN = 1e-5
"""Relative errors this close to the floor are rounding of the float32 factors."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#D0D7DE",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#EAEEF2",
    "axes.axisbelow": True,
    "svg.hashsalt": "fedlora_kernels",
}

PANELS_PER_ROW = 4


def colour(rounds: Rounds) -> str:
    """Blue for a rule whose error is its SVD floor in every round, vermilion for the others."""
    at_floor = all(
        entry["relative_error"] - entry["svd_floor"] < AT_FLOOR_WITHIN for entry in rounds
    )
    return AT_FLOOR if at_floor else ABOVE_FLOOR


def accuracy(rules: Mapping[str, Rounds], start: float) -> str:
    """Test accuracy over the rounds, a panel for each rule, the start as a dashed line."""

    def draw(axes: Axes, rule: str, place: int) -> None:
        axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        if place == 0:
            _note(axes, rules[rule][-1]["round"], start, f"start {start:.3f}", below=True, end=True)
        for other in sorted(rules, key=lambda name: name == rule):
            values = [start, *(entry["accuracy"] for entry in rules[other])]
            mine = other == rule
            axes.plot(
                range(len(values)),
                values,
                color=colour(rules[other]) if mine else GREY,
                linewidth=2.2 if mine else 0.9,
                solid_capstyle="round",
            )
        last = rules[rule][-1]
        axes.plot(last["round"], last["accuracy"], "o", color=colour(rules[rule]), markersize=5)
        _end(axes, last["round"], last["accuracy"], f"{last['accuracy']:.3f}", colour(rules[rule]))
        axes.set_xlim(0, last["round"] * 1.22)

    return _panels(rules, draw, "test accuracy")


def errors(rules: Mapping[str, Rounds]) -> str:
    """Relative error of the aggregation over the rounds, the SVD floor of its rank dotted."""
    losses = [
        (rule, entry["relative_error"], entry["averaging_error"] or 0.0)
        for rule, rounds in rules.items()
        for entry in rounds
    ]
    top = max(1.1 * max(max(error, averaging) for _, error, averaging in losses), 1e-3)
    compared = max(losses, key=lambda loss: loss[2] - loss[1])[0]

    def draw(axes: Axes, rule: str, place: int) -> None:
        rounds = rules[rule]
        numbers = [entry["round"] for entry in rounds]
        error = [entry["relative_error"] for entry in rounds]
        floor = [entry["svd_floor"] for entry in rounds]
        averaging = [entry["averaging_error"] for entry in rounds]
        ink = colour(rounds)
        if None not in averaging:
            axes.plot(numbers, averaging, color=GREY, linewidth=1.2)
            if rule == compared:
                _note(axes, numbers[-1], 0.55 * top, "grey: averaging", end=True)
        if place == 0:
            _note(axes, numbers[0], 0, "dotted: SVD floor")
        axes.fill_between(numbers, floor, error, color=ink, alpha=0.12, linewidth=0)
        axes.plot(numbers, floor, color=INK, linewidth=1.4, linestyle=(0, (1, 1.6)))
        axes.plot(numbers, error, color=ink, linewidth=2.2, marker="o", markersize=3.5)
        value = "0" if error[-1] < AT_FLOOR_WITHIN else f"{error[-1]:.2f}"
        _end(axes, numbers[-1], error[-1], value, ink)
        axes.set_xlim(numbers[0] - 0.15, numbers[-1] + 0.22 * max(numbers[-1] - 1, 1))
        axes.set_ylim(-0.05 * top, top)

    return _panels(rules, draw, "relative error")


def traffic(rules: Mapping[str, Rounds], summary: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy at the end against the bytes of a round, up and down together."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        points: list[tuple[float, float, str, str]] = []
        for entry in summary:
            size = (entry["bytes_up"] + entry["bytes_down"]) / 1e6
            ink = colour(rules[entry["rule"]])
            axes.plot(size, entry["accuracy"], "o", color=ink, markersize=8, markeredgecolor="w")
            points.append((size, entry["accuracy"], entry["rule"], ink))
        start = summary[0]["start_accuracy"]
        axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        sizes = [size for size, *_ in points]
        axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.9)
        axes.xaxis.set_major_locator(MaxNLocator(1))
        axes.set_xticks(_round_sizes(min(sizes), max(sizes)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g} MB"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes of one round, all clients, up and down (logarithmic)")
        axes.set_ylabel("test accuracy")
        low, high = start, max(accuracy for _, accuracy, *_ in points)
        axes.set_ylim(low - 0.15 * (high - low + 1e-3), high + 0.15 * (high - low + 1e-3))
        _note(axes, axes.get_xlim()[1], start, f"start {start:.3f}", end=True)
        _labels(axes, points)
        return _svg(figure)


def _panels(rules: Mapping[str, Rounds], draw: Callable[[Axes, str, int], None], label: str) -> str:
    """One panel per rule on common axes."""
    across = min(PANELS_PER_ROW, len(rules))
    down = math.ceil(len(rules) / across)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.5 * across, 0.5 + 1.9 * down), layout="constrained")
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for place, (axes, rule) in enumerate(zip(panels, rules, strict=False)):
            draw(axes, rule, place)
            axes.set_title(rule, loc="left", fontsize=10.5, fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if place + across >= len(rules):
                axes.set_xlabel("round")
            if place % across == 0:
                axes.set_ylabel(label)
        for axes in panels[len(rules) :]:
            axes.set_visible(False)
        return _svg(figure)


def _labels(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name every point at its right; names that would overlap move apart and keep a thin line."""
    low, high = axes.get_ylim()
    apart = 0.062 * (high - low)
    groups: list[list[tuple[float, float, str, str]]] = []
    for point in sorted(points):
        if groups and point[0] < 1.25 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    for group in groups:
        group.sort(key=lambda point: point[1])
        places = [point[1] for point in group]
        for _ in range(100):
            for below in range(len(places) - 1):
                overlap = apart - (places[below + 1] - places[below])
                if overlap > 0:
                    places[below] -= overlap / 2
                    places[below + 1] += overlap / 2
        left = max(point[0] for point in group) * 1.09
        for (size, value, rule, ink), place in zip(group, places, strict=True):
            axes.plot([size, left], [value, place], color=ink, linewidth=0.6, zorder=1)
            axes.annotate(
                rule, (left, place), (3, 0), textcoords="offset points", va="center", color=ink
            )


def _round_sizes(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around [low, high]."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    sizes = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [size for size in sizes if low / 1.4 <= size <= high * 1.9]


def _end(axes: Axes, x: float, y: float, text: str, ink: str) -> None:
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", color=ink, fontsize=9
    )


def _note(
    axes: Axes, x: float, y: float, text: str, *, below: bool = False, end: bool = False
) -> None:
    """A muted remark above or below a line, from x to the right or (`end`) to the left."""
    axes.annotate(
        text,
        (x, y),
        (0 if end else 3, -3 if below else 3),
        textcoords="offset points",
        va="top" if below else "bottom",
        ha="right" if end else "left",
        color=MUTED,
        fontsize=8.5,
    )


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element: no XML header, no date, the same bits for the same data."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]
