"""Figures of the single modules: their ranks as a heat map, their singular values over the rounds.

A module's place is its layer (the first number in its name) and its kind (what follows).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from statistics import median

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from integration.report.palette import INK
from integration.report.panels import STYLE, note, panels, svg
from integration.report.series import Rounds

ROUNDS = 8
"""So many rounds are drawn at most, evenly chosen, the last one among them."""

NUMBERED = 700
"""Up to so many cells carry their number."""

SHADES = colormaps["Blues"]


def ranks(rules: Mapping[str, Rounds]) -> str:
    """Rank of every module and round, a heat map for each rule whose ranks differ; "" for none.

    A column is a layer, a row a round; rows of one kind of module stand together.
    """
    drawn = {rule: rounds for rule, rounds in rules.items() if _differ(rounds)}
    if not drawn:
        return ""
    tables = {rule: _table(_chosen(rounds)) for rule, rounds in drawn.items()}
    most = max(float(np.nanmax(table)) for _, _, table in tables.values())
    with rc_context(STYLE | {"axes.grid": False, "axes.spines.left": False}):
        heights = [0.9 + 0.24 * len(table) for _, _, table in tables.values()]
        figure = Figure(figsize=(10.4, sum(heights)), layout="constrained")
        grid = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)
        for axes, (rule, (rows, layers, table)) in zip(grid.flat, tables.items(), strict=True):
            edges = [np.arange(count + 1) - 0.5 for count in table.shape]
            axes.pcolormesh(*reversed(edges), table, cmap=SHADES, vmin=0, vmax=1.25 * most)
            axes.invert_yaxis()
            axes.set_title(rule, loc="left", fontsize=10.5, fontweight="bold")
            axes.set_yticks(range(len(rows)), rows, fontsize=8)
            axes.set_xticks(range(len(layers)), layers, fontsize=8)
            axes.set_xlabel("layer")
            _lines_between_kinds(axes, rows)
            if table.size <= NUMBERED:
                _numbers(axes, table, most)
        return svg(figure)


def spectra(rules: Mapping[str, Rounds]) -> str:
    """Leading singular values of the ideal update, the median module, a line for every round.

    "" where no spectra were recorded.
    """
    drawn = {rule: rounds for rule, rounds in rules.items() if any(map(_values, rounds))}
    if not drawn:
        return ""

    def draw(axes: Axes, rule: str, place: int) -> None:
        rounds = _chosen(drawn[rule])
        axes.set_yscale("log")
        for step, entry in enumerate(rounds):
            values = _values(entry)
            shade = SHADES(0.35 + 0.6 * (step + 1) / len(rounds))
            axes.plot(range(1, len(values) + 1), values, color=shade, linewidth=1.8)
        if place == 0:
            first, last = rounds[0]["round"], rounds[-1]["round"]
            text = f"light to dark: round {first} to {last}" if first != last else f"round {first}"
            note(axes, axes.get_xlim()[1], axes.get_ylim()[1], text, below=True, end=True)

    return panels(drawn, draw, "singular value", across="index")


def _differ(rounds: Rounds) -> bool:
    return len({module["rank"] for entry in rounds for module in entry["modules"].values()}) > 1


def _chosen(rounds: Rounds) -> Rounds:
    count = min(ROUNDS, len(rounds))
    return [rounds[(place + 1) * len(rounds) // count - 1] for place in range(count)]


def _table(rounds: Rounds) -> tuple[list[str], list[int], np.ndarray]:
    """Names of the rows, the layers, and the ranks [rows, layers]; NaN where there is no module."""
    places = {name: _place(name) for name in rounds[0]["modules"]}
    kinds = sorted({kind for _, kind in places.values()})
    layers = sorted({layer for layer, _ in places.values()})
    short = _shortened(kinds)
    table = np.full((len(kinds) * len(rounds), len(layers)), np.nan)
    for name, (layer, kind) in places.items():
        for step, entry in enumerate(rounds):
            row = kinds.index(kind) * len(rounds) + step
            table[row, layers.index(layer)] = entry["modules"][name]["rank"]
    rows = [f"{short[kind]}  round {entry['round']}" for kind in kinds for entry in rounds]
    return rows, layers, table


def _place(name: str) -> tuple[int, str]:
    """model.layers.3.self_attn.q_proj -> (3, "self_attn.q_proj")."""
    found = re.search(r"(?:^|\.)(\d+)\.(.*)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def _shortened(kinds: list[str]) -> dict[str, str]:
    """Each kind by its last part, where no other kind has the same."""
    last = Counter(kind.rpartition(".")[2] for kind in kinds)
    return {
        kind: kind.rpartition(".")[2] if last[kind.rpartition(".")[2]] == 1 else kind
        for kind in kinds
    }


def _lines_between_kinds(axes: Axes, rows: list[str]) -> None:
    kinds = [row.split("  ")[0] for row in rows]
    for place in range(1, len(rows)):
        if kinds[place] != kinds[place - 1]:
            axes.axhline(place - 0.5, color="white", linewidth=3)


def _numbers(axes: Axes, table: np.ndarray, most: float) -> None:
    for (row, column), rank in np.ndenumerate(table):
        if not np.isnan(rank):
            ink = "white" if rank > 0.6 * most else INK
            axes.text(column, row, f"{rank:g}", ha="center", va="center", color=ink, fontsize=8)


def _values(entry: Mapping[str, object]) -> list[float]:
    """The median over the modules of every leading singular value that all of them have."""
    modules = entry["modules"]
    assert isinstance(modules, Mapping)
    found = [module.get("spectrum") or [] for module in modules.values()]
    length = min(map(len, found), default=0)
    values = [median(spectrum[i] for spectrum in found) for i in range(length)]
    return [value for value in values if value > 0]
