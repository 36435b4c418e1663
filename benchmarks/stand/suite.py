"""Suite: comparisons that belong together and share one result file.

A file in ``benchmarks/suites/`` has one object ``SUITE``, a :class:`Suite` or a :class:`Study`; the
folder is the registry.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from rich.console import Console

from benchmarks import suites
from benchmarks.stand import inputs, measure
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Row
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.shapes import Case

Make = Callable[[Device], Comparison]
"""Draws the inputs and builds a comparison; called when it is its turn."""


@dataclass(frozen=True)
class Suite:
    """Comparisons by label, in the order in which they are measured."""

    name: str
    comparisons: Callable[[Device], Mapping[str, Make]]
    everyday: bool = True
    """measured where no suite is named"""
    tiny: Callable[[Device], Mapping[str, Make]] | None = None
    """the same on small inputs, to rehearse"""
    budget_s: float = measure.BUDGET_S
    """seconds that the rounds of one comparison may take together"""
    peers_once_s: float = measure.ONCE_S
    """a peer that takes longer is run once"""
    patience_s: float | None = None
    """a peer that takes longer is interrupted"""
    say: Callable[[Sequence[Row]], Sequence[str]] | None = None
    """lines of text below the tables"""


@dataclass(frozen=True)
class Study:
    """A measurement whose result is more than rows."""

    name: str
    measure: Callable[["Setting"], dict[str, Any]]
    """the content of the result file; "failed" says whether a check of this library's failed"""
    everyday: bool = False
    published: bool = True
    """part of the committed results"""


@dataclass(frozen=True)
class Setting:
    """Where and how large a study is."""

    device: Device
    roofline: Roofline
    tiny: bool
    console: Console
    only: Sequence[str] = ("",)
    """which parts, of a study that has parts: those whose name has one of these texts"""


@lru_cache(maxsize=1)
def drawn(case: Case, device: Device) -> Stacks:
    """Comparisons of one case that follow each other share its inputs."""
    return inputs.draw(case, device.torch_device)


def on_cases(
    compare: Callable[[Stacks], Comparison], cases: Sequence[Case]
) -> Callable[[Device], Mapping[str, Make]]:
    """One comparison per case."""

    def of(case: Case) -> Make:
        return lambda device: compare(drawn(case, device))

    return lambda _: {str(case): of(case) for case in cases}


def named(label: str, only: Sequence[str]) -> bool:
    """Whether the label has one of these texts."""
    return any(text in label for text in only)


def found() -> dict[str, Suite | Study]:
    """All suites by name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(suites.__path__))
    known = (import_module(f"{suites.__name__}.{name}").SUITE for name in modules)
    return {suite.name: suite for suite in known}
