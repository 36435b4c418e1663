"""plot: one figure of an inspection, singular values and the similarity of the clients.

Importing this module needs matplotlib (``pip install fedlora_kernels[plot]``). Figures are made
without pyplot, so nothing global changes and no display is needed.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedlora_kernels._inspect import Inspection

# Okabe and Ito's colors, told apart with every common color blindness; yellow is left out,
# which is too faint for a line on white. All figures of the project take them from here.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK = "#56B4E9", "#E69F00", "#000000"

# A second round of them is dashed.
_COLORS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK)
_STYLES = ("-", "--", ":", "-.")
_GRAY = "#666666"
# Numbers in the cells are legible up to here; beyond, the colors speak alone.
_NUMBERED = 12
_ALL = 0.999
_LABEL = 18

Line = tuple[str, dict[str, Any], tuple[float, ...], tuple[float, ...]]


def check(path: str) -> None:
    """Refuse a file name that no figure can be written under.

    Raises:
        ValueError: matplotlib cannot write such files.
        IsADirectoryError: the path is a folder.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, expected a file name such as figure.png")
    known = FigureCanvasAgg.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in known:
        raise ValueError(
            f"{path}: figures cannot be written as {suffix or 'a file without a suffix'!r}; "
            f"expected one of {', '.join(sorted(known))}"
        )


def save(found: Inspection, path: str) -> None:
    """Draw the figure into a file; its suffix is the format.

    Raises:
        ValueError: the format is unknown.
        OSError: the file cannot be written.
    """
    check(path)
    drawn = io.BytesIO()
    figure(found).savefig(drawn, format=Path(path).suffix.removeprefix(".").lower(), dpi=160)
    Path(path).write_bytes(drawn.getvalue())


def figure(found: Inspection) -> Figure:
    """Spectrum, cumulative energy and (for two clients or more) the similarity heat map."""
    several = len(found.clients) > 1
    widths = [4.6, 4.6, 5.2] if several else [4.6, 4.6]
    made = Figure(figsize=(sum(widths) + 1.2, 4.8), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(made)
    axes = made.subplots(1, len(widths), width_ratios=widths)
    _spectrum(axes[0], found)
    _energy(axes[1], found)
    if several:
        _similarity(made, axes[2], found)
    return made


def _spectrum(axes: Any, found: Inspection) -> None:
    """Singular values of the ideal aggregate, one line a projection (RMS over its modules)."""
    axes.set_title("Singular values of the ideal aggregate", loc="left", fontsize=10)
    lines = _lines(found)
    if not lines:
        _say(axes, "the ideal aggregate is zero" if found.modules else "no factors to decompose")
        return
    axes.set_xlabel("component")
    axes.set_ylabel("singular value (RMS over the layers)")
    axes.set_yscale("log")
    ends = []
    for name, style, sigma, _ in lines:
        axes.plot(range(1, len(sigma) + 1), sigma, **style)
        ends.append((name, style, len(sigma), sigma[-1]))
    _frame(axes)
    _label_ends(axes, ends)


def _energy(axes: Any, found: Inspection) -> None:
    """The share of the energy that the leading components hold."""
    axes.set_title("Energy in the leading components", loc="left", fontsize=10)
    lines = _lines(found)
    if not lines:
        _say(axes, "no energy")
        return
    axes.set_xlabel("rank")
    axes.set_ylabel("share of ‖ΔW‖²")
    for _, style, _, energy in lines:
        axes.plot(range(1, len(energy) + 1), energy, **style)
    lowest = min([energy[0] for *_, energy in lines] + list(found.energies))
    axes.set_ylim(max(0.0, lowest - 0.05), 1.02)
    # Where all lines have reached the top there is nothing more to see.
    longest = max(len(energy) for *_, energy in lines)
    enough = max(sum(share < _ALL for share in energy) + 1 for *_, energy in lines)
    _frame(axes, min(longest, max(enough, 4)) + 0.5)
    low, high = axes.get_ylim()
    heights = _apart([(share - low) / (high - low) for share in found.energies], 0.045)
    for share, height in zip(found.energies, heights, strict=True):
        axes.axhline(share, color=_GRAY, linewidth=0.6, linestyle=(0, (1, 3)), zorder=0)
        axes.annotate(
            f"{share:g}",
            (1.015, height),
            xycoords="axes fraction",
            fontsize=8,
            color=_GRAY,
            va="center",
            annotation_clip=False,
        )


def _lines(found: Inspection) -> list[Line]:
    """Name, style, singular values and energies of each projection that is not zero."""
    live = [projection for projection in found.projections if projection.sigma]
    longest = max((len(projection.sigma) for projection in live), default=0)
    lines = []
    for index, projection in enumerate(live):
        style: dict[str, Any] = {
            "color": _COLORS[index % len(_COLORS)],
            "linestyle": _STYLES[index // len(_COLORS) % len(_STYLES)],
            "linewidth": 1.6,
            "marker": "o" if longest <= 24 else None,
            "markersize": 3,
        }
        lines.append((projection.name, style, projection.sigma, projection.energy))
    return lines


def _label_ends(axes: Any, ends: Sequence[tuple[str, dict[str, Any], int, float]]) -> None:
    """Each line's name beside its end, moved apart where the ends are close."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    heights = [(math.log10(value) - low) / (high - low) for *_, value in ends]
    placed = _apart(heights, min(0.055, 1 / len(heights)))
    for (name, style, count, value), height in zip(ends, placed, strict=True):
        leader = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6, "color": style["color"]}
        axes.annotate(
            name,
            (count, value),
            xytext=(1.06, height),
            textcoords="axes fraction",
            fontsize=8,
            color=style["color"],
            va="center",
            annotation_clip=False,
            arrowprops={**leader, "linestyle": style["linestyle"]},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, from 0 to 1, moved as little as needed to lie ``gap`` apart."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and _bottom(clusters[-1], heights, gap) < (
            _bottom(clusters[-2], heights, gap) + gap * len(clusters[-2])
        ):
            last = clusters.pop()
            clusters[-1] += last
    placed = [0.0] * len(heights)
    for cluster in clusters:
        for position, index in enumerate(cluster):
            placed[index] = _bottom(cluster, heights, gap) + gap * position
    return placed


def _bottom(cluster: Sequence[int], heights: Sequence[float], gap: float) -> float:
    middle = sum(heights[index] for index in cluster) / len(cluster)
    extent = gap * (len(cluster) - 1)
    return max(0.0, min(middle - extent / 2, 1 - extent))


def _similarity(made: Figure, axes: Any, found: Inspection) -> None:
    """Cosines between the clients' updates, -1 to 1, zero in white."""
    count = len(found.clients)
    axes.set_title("Cosine between the clients' updates", loc="left", fontsize=10)
    axes.set_facecolor("#cccccc")  # shows where a client's update is zero
    image = axes.imshow(found.similarity, cmap="PuOr_r", vmin=-1, vmax=1)
    labels = _client_labels([client.name for client in found.clients])
    step = 1 if count <= 40 else math.ceil(count / 40)
    size = 8 if count <= 16 else 6
    axes.set_xticks(range(0, count, step), range(0, count, step), fontsize=size)
    axes.set_yticks(range(0, count, step), labels[::step], fontsize=size)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if count <= _NUMBERED:
        for row, values in enumerate(found.similarity):
            for column, value in enumerate(values):
                axes.text(
                    column,
                    row,
                    "-" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}",
                    ha="center",
                    va="center",
                    fontsize=10 if count <= 6 else 7,
                    color="white" if abs(value) > 0.7 else "black",
                )
    bar = made.colorbar(image, ax=axes, shrink=0.8, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)


def _client_labels(names: Sequence[str]) -> list[str]:
    """Folder name and number; long names lose the end that tells them apart least."""
    short = [Path(name).name or name for name in names]
    if len(set(short)) < len(short):
        short = list(names)
    heads = [name if len(name) <= _LABEL else name[: _LABEL - 1] + "…" for name in short]
    tails = [name if len(name) <= _LABEL else "…" + name[1 - _LABEL :] for name in short]
    cut = heads if len(set(heads)) >= len(set(tails)) else tails
    return [f"{name}  {index}" for index, name in enumerate(cut)]


def _frame(axes: Any, right: float | None = None) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0.5, right=right)


def _say(axes: Any, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=_GRAY)
