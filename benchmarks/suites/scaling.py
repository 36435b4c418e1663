"""Growth: time and peak memory against K, r, m, n and L, with fitted exponents.

    python -m benchmarks.run --suite scaling --results benchmarks/results

A line ends where its next point would take longer than LIMIT_S, a curve where stacked_svd's does.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.peers import three_svds
from benchmarks.stand import inputs, memory
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Run, Variant
from benchmarks.stand.roofline import Roofline
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Setting, Study
from benchmarks.suites import combine, flora_na, gram, spectrum, stacked_svd

LIMIT_S = 20.0
"""Seconds for one call at one point."""

BUDGET_S = 0.5
"""Seconds for the rounds of one point."""

FITTED = 4
"""Exponents are fitted to this many points at the upper end."""

FIRST_RANK = 16
"""At smaller stacked ranks both stages take as long as their calls do."""

WHOLE = "stacked_svd"
MEMORY = "stacked_svd exact"


@dataclass(frozen=True)
class Curve:
    """Points along one axis, everything else fixed."""

    axis: str
    fixed: str
    cases: tuple[tuple[int, Case], ...]
    peers: bool = False


def curves() -> list[Curve]:
    """K with r = 1 and 4, r, m, n and L."""
    base = Case("scaling", "module", equal(8, 16), modules=1, size=(2048, 2048))

    def powers(first: int, last: int) -> list[int]:
        return [2**e for e in range(first, last + 1)]

    def along(values: Sequence[int], change: Any) -> tuple[tuple[int, Case], ...]:
        return tuple((value, replace(base, **change(value))) for value in values)

    return [
        Curve(
            "K",
            "r = 1, 2048 x 2048, L = 1",
            along(powers(1, 10), lambda k: {"ranks": equal(k, 1)}),
            peers=True,
        ),
        Curve(
            "K", "r = 4, 2048 x 2048, L = 1", along(powers(1, 8), lambda k: {"ranks": equal(k, 4)})
        ),
        Curve(
            "r",
            "K = 8, 2048 x 2048, L = 1",
            along(powers(0, 7), lambda r: {"ranks": equal(8, r)}),
            peers=True,
        ),
        Curve(
            "m",
            "n = 1024, K x r = 8 x 16, L = 1",
            along(powers(9, 15), lambda m: {"size": (m, 1024)}),
        ),
        Curve(
            "n",
            "m = 1024, K x r = 8 x 16, L = 1",
            along(powers(9, 15), lambda n: {"size": (1024, n)}),
        ),
        Curve(
            "L",
            "1024 x 1024, K x r = 8 x 16",
            along(powers(0, 6), lambda count: {"size": (1024, 1024), "modules": count}),
        ),
    ]


def shrunk(curve: Curve) -> Curve:
    """The first three points on small matrices."""
    small = tuple(
        (x, replace(case, size=(min(case.m, 96), min(case.n, 96)), ranks=case.ranks[:4]))
        for x, case in curve.cases[:3]
    )
    return replace(curve, cases=small)


def point(stacks: Stacks, with_peers: bool, without: Collection[str] = ()) -> Comparison:
    """The whole, its stages, FLoRA-NA, and three SVDs where asked for, less what takes too long."""
    whole = stacked_svd.compare(stacks, (three_svds.PEER,) if with_peers else ()).variants
    variants = [
        _named(whole[0], WHOLE),
        *(
            _named(compare(stacks).variants[0], name)
            for name, compare in (
                ("gram", gram.compare),
                ("spectrum", spectrum.compare),
                ("combine", combine.compare),
                ("flora_na", flora_na.compare),
            )
        ),
        *(variant for variant in whole if variant.source),
    ]
    kept = tuple(variant for variant in variants if variant.name not in without)
    return Comparison("scaling", stacks.case, kept)


def _named(variant: Variant, name: str) -> Variant:
    return replace(variant, name=name)


def walk(curve: Curve, device: Device, roofline: Roofline) -> dict[str, Any]:
    """Measure a curve's points until one is too long, and fit its exponents."""
    points: list[dict[str, Any]] = []
    too_long: set[str] = set()
    for x, case in curve.cases:
        stacks = inputs.draw(case, device.torch_device)
        rows = Run(
            point(stacks, curve.peers, too_long), device, roofline, budget_s=BUDGET_S
        ).measured()
        if device.is_cuda:
            used: memory.Memory | None = memory.peak_on_gpu(MEMORY, stacks)
        else:
            used = memory.peak(MEMORY, case, device.threads)
        points.append(
            {
                "x": x,
                "stacked_rank": case.stacked_rank,
                "seconds": {row.variant: row.seconds for row in rows},
                "refused": {row.variant: row.refused for row in rows if row.refused},
                "input_bytes": stacks.nbytes,
                "output_bytes": None if used is None else used.outputs,
                "peak_bytes": None if used is None else used.peak,
            }
        )
        # The next point doubles R, and R^3 may have taken over.
        too_long |= {row.variant for row in rows if 8 * (row.seconds or 0.0) > LIMIT_S}
        if WHOLE in too_long:
            break
    return {
        "axis": curve.axis,
        "fixed": curve.fixed,
        "points": points,
        "exponents": exponents(points),
        "spectrum_overtakes_gram": crossing(points, "gram", "spectrum"),
    }


def exponents(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slopes of log time and log peak memory against log x over the last points."""
    last = points[-FITTED:]
    series: dict[str, list[tuple[float, float]]] = {}
    for found in last:
        for name, seconds in found["seconds"].items():
            if seconds is not None:
                series.setdefault(name, []).append((found["x"], seconds))
        if found["peak_bytes"]:
            series.setdefault("peak memory", []).append((found["x"], found["peak_bytes"]))
    return {name: slope(pairs) for name, pairs in series.items() if len(pairs) > 1}


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y against log x."""
    xs = [math.log(x) for x, _ in pairs]
    ys = [math.log(y) for _, y in pairs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def crossing(points: Sequence[dict[str, Any]], slow_start: str, fast_growth: str) -> float | None:
    """The stacked rank from which on the second stage takes longer, interpolated in logarithms."""
    before: tuple[float, float] | None = None
    for found in points:
        first, second = found["seconds"].get(slow_start), found["seconds"].get(fast_growth)
        if first is None or second is None or found["stacked_rank"] < FIRST_RANK:
            continue
        here = (math.log(found["stacked_rank"]), math.log(second / first))
        if before is not None and before[1] < 0 <= here[1] and here[0] > before[0]:
            share = -before[1] / (here[1] - before[1])
            return math.exp(before[0] + share * (here[0] - before[0]))
        before = here
    return None


def measure(setting: Setting) -> dict[str, Any]:
    """All curves."""
    measured = []
    for curve in curves():
        drawn = shrunk(curve) if setting.tiny else curve
        found = walk(drawn, setting.device, setting.roofline)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in found["exponents"].items())
        setting.console.print(
            f"{curve.axis} ({curve.fixed}): to {found['points'][-1]['x']}: {shown}"
        )
        measured.append(found)
    failed = any(point["refused"] for curve in measured for point in curve["points"])
    return {"curves": measured, "failed": failed}


SUITE = Study("scaling", measure)
