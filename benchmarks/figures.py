"""The figures of the committed result files, and the pages that show them.

    python -m benchmarks.figures [--results benchmarks/results] [PAGE ...]

Draws the figures of every device, then fills the pages (README.md and docs/performance.md where
none is named). Markers and labels at the lines' ends say the same as their colors.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import pages
from benchmarks.stand import results
from benchmarks.stand.table import duration
from integration.report import palette
from integration.report.palette import BLUE, EDGE, GREEN, INK, MUTED, ORANGE, PURPLE, VERMILION

PAGES = (
    Path("README.md"),
    Path("docs/performance.md"),
    Path("docs/scale.md"),
    Path("docs/robust.md"),
)

LINES = {
    "stacked_svd": (INK, "o"),
    "gram": (BLUE, "s"),
    "spectrum": (VERMILION, "^"),
    "combine": (GREEN, "D"),
    "flora_na": (PURPLE, "v"),
    "three SVDs": (ORANGE, "X"),
}
"""Color and marker of every line."""

ACROSS = 3
"""Growth curves beside each other."""

STYLE = {
    **palette.STYLE,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
}


def speedups(acceptance: Mapping[str, Any]) -> Figure:
    """How many times as long the peers take: a panel per peer, exact and fast beside each other."""
    summary = acceptance["summary"]["stacked_svd"]
    panels = ("three SVDs", "QR + QR + core SVD")
    figure: Figure
    axes: Any
    figure, axes = pyplot.subplots(1, 2, figsize=(8.6, 2.9), layout="constrained", sharey=True)
    labels = [
        f"R = {case['stacked_rank']}, {_kept(case['ranks_kept'])} ranks kept" for case in summary
    ]
    for panel, peer in zip(axes, panels, strict=True):
        widest = 0.0
        for offset, (precision, color) in enumerate((("exact", BLUE), ("fast", ORANGE))):
            values = [case["times_as_long_as"][precision].get(peer) or 0.0 for case in summary]
            places = [index + 0.38 * (offset - 0.5) for index in range(len(summary))]
            panel.barh(places, values, height=0.34, color=color, label=precision)
            for place, value in zip(places, values, strict=True):
                text = f"{value:.1f}" if value else "no time"
                panel.text(value, place, f" {text}", va="center", color=INK)
            widest = max(widest, *values)
        panel.axvline(1, color=INK, linewidth=1)
        panel.set_title(peer)
        panel.set_xlabel("times as long as stacked_svd")
        panel.set_yticks(range(len(labels)), labels)
        panel.set_xlim(0, widest * 1.14)
        panel.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", colors=INK, length=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def growth(scaling: Mapping[str, Any]) -> Figure:
    """Time above, peak memory below, for every curve, three beside each other."""
    curves = [curve for curve in scaling["curves"] if len(curve["points"]) > 1]
    strips = -(-len(curves) // ACROSS)
    figure: Figure
    axes: Any
    figure, axes = pyplot.subplots(
        2 * strips,
        ACROSS,
        figsize=(9.6, 5.6 * strips),
        layout="constrained",
        squeeze=False,
        height_ratios=(2, 1) * strips,
    )
    for panel in axes.flat:
        panel.set_visible(False)
    for index, curve in enumerate(curves):
        row, column = 2 * (index // ACROSS), index % ACROSS
        upper, lower = axes[row][column], axes[row + 1][column]
        upper.set_visible(True)
        lower.set_visible(True)
        _times(upper, curve)
        _peaks(lower, curve)
        lower.sharex(upper)
        upper.set_title(f"{curve['axis']}:  {curve['fixed']}")
        lower.set_xlabel(curve["axis"])
        if column == 0:
            upper.set_ylabel("time of one call")
            lower.set_ylabel("beyond inputs, outputs")
    return figure


def _times(axes: Axes, curve: Mapping[str, Any]) -> None:
    for name, (color, marker) in LINES.items():
        points = [
            (point["x"], point["seconds"][name])
            for point in curve["points"]
            if point["seconds"].get(name) is not None
        ]
        if len(points) < 2:
            continue
        slope = curve["exponents"].get(name)
        label = name if slope is None else f"{name}  ~ {curve['axis']}^{slope:.1f}"
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
    _logarithmic(axes, duration)
    axes.legend(loc="upper left", fontsize=7.5, handlelength=1.6, borderpad=0.1, labelspacing=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 30)  # room for the legend
    crossing, last = curve["spectrum_overtakes_gram"], curve["points"][-1]
    if crossing is not None:
        x = crossing * last["x"] / last["stacked_rank"]
        # Below the legend, beside the axis: the curves are far above there.
        axes.axvline(x, ymax=0.55, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.text(x, low, f" R = {crossing:.0f}", color=MUTED, fontsize=7.5, va="bottom")


def _peaks(axes: Axes, curve: Mapping[str, Any]) -> None:
    points = [(point["x"], point["peak_bytes"], point["input_bytes"]) for point in curve["points"]]
    measured = [(x, peak) for x, peak, _ in points if peak]
    if measured:
        slope = curve["exponents"].get("peak memory")
        label = "peak" if slope is None else f"peak  ~ {curve['axis']}^{slope:.1f}"
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, ys, color=INK, marker="o", markersize=4, linewidth=1.6, label=label)
    axes.plot(
        [x for x, *_ in points],
        [size for *_, size in points],
        color=MUTED,
        linestyle=(0, (3, 2)),
        linewidth=1.3,
        label="inputs",
    )
    _logarithmic(axes, _bytes)
    axes.legend(loc="upper left", fontsize=7.5, handlelength=1.8, borderpad=0.1)


def _logarithmic(axes: Axes, shown: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: shown(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def floors(suites: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of the floor reached: ours as filled marks, the best peer hollow, a row per input."""
    rows = []
    for stage in ("gram", "spectrum", "combine", "weighted_sum", "stacked_svd", "flora_na"):
        for block in pages.blocks(suites[stage]["rows"]) if stage in suites else ():
            ours = [row for row in block if not row["source"] and row["share_of_floor"]]
            theirs = [
                row for row in block if row["source"] and not row["less"] and row["share_of_floor"]
            ]
            if ours:
                rows.append((stage, ours, theirs))
    figure: Figure
    axes: Any
    figure, axes = pyplot.subplots(figsize=(8.6, 0.8 + 0.2 * len(rows)), layout="constrained")
    labels = []
    for place, (stage, ours, theirs) in enumerate(rows):
        if place and stage != rows[place - 1][0]:
            axes.axhline(place - 0.5, color=EDGE, linewidth=0.8)
        row = ours[0]
        family = "" if row["family"] == "shared_start" else f", {row['family']}"
        labels.append(
            f"{stage}   {row['modules']} x {row['m']}x{row['n']}, {row['ranks']}, "
            f"{row['dtype']}{family}"
        )
        for mine, color, marker in zip(ours[:2], (BLUE, ORANGE), ("o", "s"), strict=False):
            axes.plot(100 * mine["share_of_floor"], place, marker, color=color, markersize=6)
        if theirs:
            best = max(peer["share_of_floor"] for peer in theirs)
            axes.plot(100 * best, place, "D", color=INK, markerfacecolor="none", markersize=5)
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.tick_params(axis="y", colors=INK, length=0)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g} %"))
    axes.set_xlabel("share of the floor (logarithmic)")
    axes.axvline(100, color=INK, linewidth=1)
    for label, color, marker, fill in (
        ("exact (spectrum: energy 0.9; combine: float64; weighted_sum: stacked)", BLUE, "o", BLUE),
        ("fast (all components; float32; listed)", ORANGE, "s", ORANGE),
        ("best peer", INK, "D", "none"),
    ):
        axes.plot([], [], marker, color=color, markerfacecolor=fill, markersize=6, label=label)
    figure.legend(loc="outside upper left", ncols=3, fontsize=7.5, columnspacing=1)
    return figure


def _kept(bounds: Sequence[int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _count(x: float) -> str:
    return f"{x:.0f}" if x < 1024 else f"{x / 1024:.0f}k"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def drawn(folder: Path, kind: str) -> list[Path]:
    """Write a device's figures into ``figures/`` beside its results."""
    suites = results.read(folder)
    made: dict[str, Callable[[], Figure]] = {}
    if "acceptance" in suites:
        made["speedups"] = lambda: speedups(suites["acceptance"])
    if "scaling" in suites:
        made["growth"] = lambda: growth(suites["scaling"])
    if "gram" in suites or "stacked_svd" in suites:
        made["floors"] = lambda: floors(suites)
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in made.items():
            path = folder / "figures" / f"{name}.{kind}"
            path.parent.mkdir(exist_ok=True)
            figure = draw()
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
            figure.savefig(path, dpi=110, metadata=metadata)
            pyplot.close(figure)
            paths.append(path)
    return paths


def main() -> int:
    """Draw the figures of every device and fill the pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES, metavar="PAGE")
    chosen = parser.parse_args()
    for folder in sorted(path for path in chosen.results.iterdir() if path.is_dir()):
        drawn(folder, "svg")
    for page in chosen.pages:
        root = os.path.relpath(chosen.results, page.parent)
        try:
            text = pages.filled(page.read_text(encoding="utf-8"), chosen.results, root)
        except ValueError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
