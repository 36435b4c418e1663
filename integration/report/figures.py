"""The figures of the report, as SVG texts without outside references.

The color of a rule says whether it reaches its SVD floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from integration.report.palette import BLUE, GRAY, GREEN, INK, MUTED, PURPLE, VERMILION
from integration.report.panels import STYLE, end, names, note, panels, svg
from integration.report.series import Rounds
from integration.report.table import MISSING

AT_FLOOR = BLUE
ABOVE_FLOOR = VERMILION

AT_FLOOR_WITHIN = 1e-5
"""Relative errors this close to the floor are rounding of the float32 factors."""


def color(rounds: Rounds) -> str:
    """Blue for a rule whose error is its SVD floor in every round, vermilion for the others."""
    pairs = zip(_values(rounds, "relative_error"), _values(rounds, "svd_floor"), strict=True)
    at_floor = all(error - floor < AT_FLOOR_WITHIN for error, floor in pairs)
    return AT_FLOOR if at_floor else ABOVE_FLOOR


def accuracy(rules: Mapping[str, Rounds], starts: Mapping[str, float]) -> str:
    """Test accuracy over the rounds, a panel for each rule, the start as a dashed line.

    Of several seeds the mean, between the worst and the best seed.
    """
    lines = {rule: _evaluated(rounds) for rule, rounds in rules.items()}

    def draw(axes: Axes, rule: str, place: int) -> None:
        start, mine, ink = starts[rule], lines[rule], color(rules[rule])
        axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        for other in rules:
            if other != rule:
                numbers, values = zip((0, starts[other]), *lines[other], strict=True)
                axes.plot(numbers, values, color=GRAY, linewidth=0.9)
        told = [entry for entry in rules[rule] if _told(entry)]
        axes.fill_between(
            [entry["round"] for entry in told],
            [entry["lowest"] for entry in told],
            [entry["highest"] for entry in told],
            color=ink,
            alpha=0.15,
            linewidth=0,
        )
        numbers, values = zip((0, start), *mine, strict=True)
        axes.plot(numbers, values, color=ink, linewidth=2.2, solid_capstyle="round")
        if mine:
            axes.plot(*mine[-1], "o", color=ink, markersize=5)
            end(axes, *mine[-1], f"{mine[-1][1]:.3f}", ink)
        last = rules[rule][-1]["round"]
        if place == 0:
            note(axes, last * 1.22, start, f"start {start:.3f}", end=True)
        axes.set_xlim(0, last * 1.22)

    return panels(rules, draw, "test accuracy")


def errors(rules: Mapping[str, Rounds]) -> str:
    """Relative error of the aggregation over the rounds, the SVD floor of its rank dotted.

    A round whose error is null (nothing to be relative to) is a gap, at the end a dash.
    """
    losses = [
        (rule, entry["relative_error"] or 0.0, entry["averaging_error"] or 0.0)
        for rule, rounds in rules.items()
        for entry in rounds
    ]
    top = max(1.1 * max(max(error, averaging) for _, error, averaging in losses), 1e-3)
    compared = max(losses, key=lambda loss: loss[2] - loss[1])[0]

    def draw(axes: Axes, rule: str, place: int) -> None:
        rounds = rules[rule]
        numbers = [entry["round"] for entry in rounds]
        error, floor = _values(rounds, "relative_error"), _values(rounds, "svd_floor")
        averaging = _values(rounds, "averaging_error")
        ink = color(rounds)
        if not all(map(math.isnan, averaging)):
            axes.plot(numbers, averaging, color=GRAY, linewidth=1.2)
            if rule == compared:
                note(axes, numbers[-1], 0.75 * top, "gray: averaging", end=True)
        if place == 0:
            note(axes, numbers[-1], 0.9 * top, "dotted: SVD floor", end=True)
        axes.fill_between(numbers, floor, error, color=ink, alpha=0.12, linewidth=0)
        axes.plot(numbers, floor, color=INK, linewidth=1.4, linestyle=(0, (1, 1.6)))
        axes.plot(numbers, error, color=ink, linewidth=2.2, marker="o", markersize=3.5)
        last = 0.0 if math.isnan(error[-1]) else error[-1]
        value = "0" if last < AT_FLOOR_WITHIN else f"{last:.2f}"
        end(axes, numbers[-1], last, MISSING if math.isnan(error[-1]) else value, ink)
        axes.set_xlim(numbers[0] - 0.15, numbers[-1] + 0.22 * max(numbers[-1] - 1, 1))
        axes.set_ylim(-0.05 * top, top)

    return panels(rules, draw, "relative error")


def traffic(rules: Mapping[str, Rounds], starts: Mapping[str, float]) -> str:
    """Accuracy against all bytes sent so far, up and down together, a line for each rule."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        ends: list[tuple[float, float, str, str]] = []
        for rule, rounds in rules.items():
            sent, points = 0.0, []
            for entry in rounds:
                sent += (entry["bytes_up"] + entry["bytes_down"]) / 1e6
                if _told(entry):
                    points.append((sent, entry["accuracy"]))
            if not points:
                continue
            ink = color(rounds)
            sizes, values = zip(*points, strict=True)
            axes.plot(sizes, values, color=ink, linewidth=1.2, alpha=0.55)
            axes.plot(sizes[:-1], values[:-1], "o", color=ink, markersize=3, alpha=0.55)
            axes.plot(sizes[-1], values[-1], "o", color=ink, markersize=8, markeredgecolor="w")
            ends.append((sizes[-1], values[-1], rule, ink))
        for start in sorted(set(starts.values())):
            axes.axhline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        axes.set_xlim(left, right * (right / left) ** 0.16)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _bytes(1e6 * size)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes so far, all clients, up and down (logarithmic)")
        axes.set_ylabel("test accuracy")
        note(axes, axes.get_xlim()[1], min(starts.values()), "start", end=True)
        names(axes, ends)
        return svg(figure)


def times(rules: Mapping[str, Rounds]) -> str:
    """Where a round's time goes: seconds of training, transfer, aggregation and evaluation."""
    parts = {"training": GREEN, "transfer": PURPLE, "aggregation": BLUE, "evaluation": GRAY}
    seconds = {
        rule: {part: fmean(entry[f"{part}_ms"] or 0.0 for entry in rounds) / 1e3 for part in parts}
        for rule, rounds in rules.items()
    }
    with rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.4, 0.9 + 0.36 * len(rules)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(rules) - 1, -1, -1)
        left = [0.0] * len(rules)
        for part, ink in parts.items():
            widths = [seconds[rule][part] for rule in rules]
            axes.barh(places, widths, 0.62, left, color=ink, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, rule, end in zip(places, rules, left, strict=True):
            share = seconds[rule]["aggregation"] / end if end else 0.0
            axes.annotate(
                f"aggregation {100 * share:.2g} %",
                (end, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
                fontsize=8.5,
            )
        axes.set_yticks(places, list(rules))
        axes.set_xlim(0, 1.22 * max([*left, 1e-9]))
        axes.set_xlabel("seconds of a round, training summed over its clients")
        axes.legend(frameon=False, ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1))
        return svg(figure)


def _values(rounds: Rounds, name: str) -> list[float]:
    """A field of every round, NaN where it is null: lines leave a gap there."""
    return [math.nan if entry[name] is None else float(entry[name]) for entry in rounds]


def _told(entry: Mapping[str, Any]) -> bool:
    return entry["accuracy"] is not None


def _evaluated(rounds: Rounds) -> list[tuple[int, float]]:
    """(round, accuracy) of the rounds that were evaluated."""
    return [(entry["round"], entry["accuracy"]) for entry in rounds if _told(entry)]


def _bytes(size: float) -> str:
    """5 kB, 20 MB, 1.5 GB."""
    power = min(3, max(1, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**power:g} {('kB', 'MB', 'GB')[power - 1]}"
