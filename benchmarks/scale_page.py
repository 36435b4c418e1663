"""The tables of docs/scale.md, from the suite ``scale`` of every device that has measured it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.stand.table import duration

Document = Mapping[str, Any]

CLIENTS = 1_000_000
"""How many clients the plan is for."""

FLOAT32_OVER_BF16 = 2
"""What a level above the first reads are results, which are float32."""


def tables(found: Document) -> str:
    """All tables of one device's results: of the parts that it measured."""
    parts: list[str] = []
    for name, shown in SHOWN.items():
        if name in found:
            parts += shown(found[name], found)
    if "many" in found:
        parts += _plan(found["many"], found)
    return "\n\n".join(parts)


def _many(many: Document, found: Document) -> Iterator[str]:
    yield (
        f"{many['clients']:,} clients, {found['case']}: {_bytes(many['file_bytes'])} of files, "
        f"R = {many['stacked_rank']:,}, `memory_limit` {_bytes(found['memory_limit'])}."
    )
    rows = [
        "| rule | load | aggregate | save | peak memory | of floor | ranks | above the optimum |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in many["rows"]:
        times = " | ".join(duration(row[f"{step}_seconds"]) for step in _STEPS)
        gap = f"{row['above_optimum']:.0e}" if "above_optimum" in row else ""
        rows.append(
            f"| `{row['rule']}` | {times} | {_bytes(row['peak_bytes'])} | "
            f"{row['share_of_floor']:.0%} | {_range(row['ranks'])} | {gap} |"
        )
    yield "\n".join(rows)


_STEPS = ("load", "aggregate", "save")


def _arrivals(arrivals: Document, found: Document) -> Iterator[str]:
    yield (
        f"{arrivals['clients']:,} clients, {arrivals['case']}, through a `Stream`, with the rule's "
        "result once more by `aggregate`:"
    )
    rows = [
        "| rule | all `add` | last `add` | `result` | `aggregate` | `result` over `aggregate` |",
        "|---|---|---|---|---|---|",
    ]
    for row in arrivals["rows"]:
        names = ("add", "last_add", "result", "aggregate")
        times = " | ".join(duration(row[f"{name}_seconds"]) for name in names)
        rows.append(f"| `{row['rule']}` | {times} | {row['result_over_aggregate']:.2f} |")
    yield "\n".join(rows)


def _report(report: Document, found: Document) -> Iterator[str]:
    yield (
        "FedIT's report of one module of 2048 x 2048 at R = 1600 takes "
        f"{duration(report['report_seconds'])}; all singular values from the R x R matrices take "
        f"{duration(report['full_spectrum_seconds'])}."
    )


def _growth(curves: list[Document], found: Document) -> Iterator[str]:
    yield "Growth of FLoRIST's time and memory with the clients, their rank and the modules:"
    rows = [
        "| case | R | aggregate | peak memory | after the last arrival | peak of the stream |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {point['case']} | {point['stacked_rank']:,} | "
        f"{duration(point['aggregate_seconds'])} | {_bytes(point['peak_bytes'])} | "
        f"{duration(point['result_seconds'])} | {_bytes(point['stream_peak_bytes'])} |"
        for curve in curves
        for point in curve["points"]
    ]
    yield "\n".join(rows)


def _processes(processes: Document, found: Document) -> Iterator[str]:
    yield (
        f"One round in several processes: {processes['clients']:,} clients, {processes['case']}, "
        "from the clients' files to the result and its report:"
    )
    rows = ["| rule | processes | threads of each | time | peak memory of a process |"]
    rows.append("|---|---|---|---|---|")
    rows += [
        f"| `{point['rule']}` | {point['processes']} | {point['threads_each']} | "
        f"{duration(point['seconds'])} | {_bytes(point['peak_bytes'])} |"
        for point in processes["points"]
    ]
    yield "\n".join(rows)


def _plan(many: Document, found: Document) -> Iterator[str]:
    """A level's time is the measured one times the numbers it reads over those measured."""
    yield f"### A plan for {CLIENTS:,} clients"
    yield (
        "The table is arithmetic from the measured times and bytes above. Servers form a tree; "
        f"each reads {many['clients']:,} adapters. A server of the first level sends its result "
        "up with the sum of its clients' weights as the weight."
    )
    fan_in, leaves = many["clients"], many["file_bytes"]
    rank = many["stacked_rank"] / fan_in
    rows = [
        "| rule | level | servers | each reads | peak memory | time | each sends up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in many["rows"]:
        seconds = row["aggregate_seconds"] + row["load_seconds"]
        result = max(row["ranks"]) / rank  # of the result, in ranks of a client
        servers, level, numbers, width = CLIENTS, 0, 1.0, 1
        while servers > 1:
            servers, level = -(-servers // fan_in), level + 1
            sent = leaves / fan_in * FLOAT32_OVER_BF16 * result
            rows.append(
                f"| `{row['rule']}` | {level} | {servers:,} | {_bytes(leaves * numbers * width)} | "
                f"{_bytes(row['peak_bytes'])} | {duration(seconds * numbers)} | {_bytes(sent)} |"
            )
            numbers, width = result, FLOAT32_OVER_BF16
    yield "\n".join(rows)


SHOWN: Mapping[str, Callable[[Any, Document], Iterator[str]]] = {
    "many": _many,
    "arrivals": _arrivals,
    "report": _report,
    "growth": _growth,
    "processes": _processes,
}
"""Part of the study -> its paragraphs, from the part and the whole file."""


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _range(bounds: list[int]) -> str:
    low, high = bounds
    return f"{low}" if low == high else f"{low} to {high}"
