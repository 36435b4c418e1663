"""What the report's figures are drawn with: their style, a panel for each rule, names and remarks.

Rules get a panel each, in which the other rules stay visible in gray: seven crossing lines in one
panel cannot be told apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from integration.report import palette
from integration.report.palette import MUTED
from integration.report.series import Rounds

STYLE = {
    **palette.STYLE,
    "font.size": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "axes.grid.axis": "y",
}

PANELS_PER_ROW = 4


def panels(
    rules: Mapping[str, Rounds],
    draw: Callable[[Axes, str, int], None],
    label: str,
    across: str = "round",
) -> str:
    """One panel per rule on common axes; `draw` gets the rule and the panel's number."""
    columns = min(PANELS_PER_ROW, len(rules))
    down = math.ceil(len(rules) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.5 * columns, 0.5 + 1.9 * down), layout="constrained")
        grid = figure.subplots(down, columns, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for place, (axes, rule) in enumerate(zip(panels, rules, strict=False)):
            draw(axes, rule, place)
            axes.set_title(rule, loc="left", fontsize=10.5, fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if place + columns >= len(rules):
                axes.set_xlabel(across)
            if place % columns == 0:
                axes.set_ylabel(label)
        for axes in panels[len(rules) :]:
            axes.set_visible(False)
        return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element: no XML header, no date, the same bits for the same data."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode("utf-8")
    return text[text.index("<svg") :]


def names(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
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


def end(axes: Axes, x: float, y: float, text: str, ink: str) -> None:
    """The value at the end of a line."""
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", color=ink, fontsize=9
    )


def note(
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
