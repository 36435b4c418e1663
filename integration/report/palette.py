"""Colors and style of all figures and pages, those of benchmarks/ too.

The colors of lines are those of ``fedlora inspect --plot``, which every kind of color vision
separates.
"""

from __future__ import annotations

from fedlora_kernels.plot import BLUE, GREEN, ORANGE, PURPLE, VERMILION

__all__ = [
    "BLUE",
    "EDGE",
    "GRAY",
    "GREEN",
    "GRID",
    "HIGHLIGHT",
    "INK",
    "MUTED",
    "ORANGE",
    "PURPLE",
    "STYLE",
    "TEXT",
    "VERMILION",
]

INK = "#24292F"
"""Text, and lines that are no series."""
TEXT = "#57606A"
"""Paragraphs beside figures."""
MUTED = "#6E7781"
"""Labels and remarks."""
GRAY = "#B8BEC6"
"""Series in the background."""
EDGE = "#D0D7DE"
GRID = "#EAEEF2"
HIGHLIGHT = "#EEF6FC"
"""Behind the best cells of a table."""

STYLE = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fedlora_kernels",
}
"""matplotlib's rcParams that all figures share."""
