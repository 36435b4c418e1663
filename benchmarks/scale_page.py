"""The tables of docs/scale.md, from the suite ``scale`` of every device that has measured it."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.stand.table import duration

Document = Mapping[str, Any]

CLIENTS = 1_000_000
"""How many clients the plan is for."""

FLOAT32_OVER_BF16 = 2
"""What a level above the first reads are results, which are float32."""


def tables(found: Document) -> str:
    """All tables of one device's results."""
    parts = [
        f"{found['clients']:,} clients, {found['case']}: {_bytes(found['file_bytes'])} of files, "
        f"R = {found['stacked_rank']:,}, `memory_limit` {_bytes(found['memory_limit'])}.",
        "\n".join(_many(found["many"])),
        f"The first {found['arriving']:,} of them through a `Stream`, with the rule's result once "
        "more by `aggregate`:",
        "\n".join(_arrivals(found["arrivals"])),
        "FedIT's report of one module of 2048 x 2048 at R = 1600 takes "
        f"{duration(found['report']['report_seconds'])}; all singular values from the R x R "
        f"matrices take {duration(found['report']['full_spectrum_seconds'])}.",
        "Growth of FLoRIST's time and memory with the clients, their rank and the modules:",
        "\n".join(_growth(found["growth"])),
        *_processes(found.get("processes")),  # which the first results did not measure
        f"### A plan for {CLIENTS:,} clients",
        "The table is arithmetic from the measured times and bytes above. Servers form a tree; "
        f"each reads {found['clients']:,} adapters. A server of the first level sends its result "
        "up with the sum of its clients' weights as the weight.",
        "\n".join(_plan(found)),
    ]
    return "\n\n".join(parts)


def _many(rows: list[Document]) -> Iterator[str]:
    yield "| rule | load | aggregate | save | peak memory | of floor | ranks | above the optimum |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        times = " | ".join(duration(row[f"{step}_seconds"]) for step in _STEPS)
        gap = f"{row['above_optimum']:.0e}" if "above_optimum" in row else ""
        yield (
            f"| `{row['rule']}` | {times} | {_bytes(row['peak_bytes'])} | "
            f"{row['share_of_floor']:.0%} | {_range(row['ranks'])} | {gap} |"
        )


_STEPS = ("load", "aggregate", "save")


def _arrivals(rows: list[Document]) -> Iterator[str]:
    yield "| rule | all `add` | last `add` | `result` | `aggregate` | `result` over `aggregate` |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        names = ("add", "last_add", "result", "aggregate")
        times = " | ".join(duration(row[f"{name}_seconds"]) for name in names)
        yield f"| `{row['rule']}` | {times} | {row['result_over_aggregate']:.2f} |"


def _growth(curves: list[Document]) -> Iterator[str]:
    yield "| case | R | aggregate | peak memory | after the last arrival | peak of the stream |"
    yield "|---|---|---|---|---|---|"
    for curve in curves:
        for point in curve["points"]:
            yield (
                f"| {point['case']} | {point['stacked_rank']:,} | "
                f"{duration(point['aggregate_seconds'])} | {_bytes(point['peak_bytes'])} | "
                f"{duration(point['result_seconds'])} | {_bytes(point['stream_peak_bytes'])} |"
            )


def _processes(found: Document | None) -> Iterator[str]:
    """A sentence and a table."""
    if found is None:
        return
    yield (
        f"One round in several processes: {found['clients']:,} clients, {found['case']}, from the "
        "clients' files to the result and its report:"
    )
    rows = ["| rule | processes | threads of each | time | peak memory of a process |"]
    rows.append("|---|---|---|---|---|")
    rows += [
        f"| `{point['rule']}` | {point['processes']} | {point['threads_each']} | "
        f"{duration(point['seconds'])} | {_bytes(point['peak_bytes'])} |"
        for point in found["points"]
    ]
    yield "\n".join(rows)


def _plan(found: Document) -> Iterator[str]:
    """A level's time is the measured one times the numbers it reads over those measured."""
    fan_in, leaves = found["clients"], found["file_bytes"]
    rank = found["stacked_rank"] / fan_in
    yield "| rule | level | servers | each reads | peak memory | time | each sends up |"
    yield "|---|---|---|---|---|---|---|"
    for row in found["many"]:
        seconds = row["aggregate_seconds"] + row["load_seconds"]
        result = max(row["ranks"]) / rank  # of the result, in ranks of a client
        servers, level, numbers, width = CLIENTS, 0, 1.0, 1
        while servers > 1:
            servers, level = -(-servers // fan_in), level + 1
            sent = leaves / fan_in * FLOAT32_OVER_BF16 * result
            yield (
                f"| `{row['rule']}` | {level} | {servers:,} | {_bytes(leaves * numbers * width)} | "
                f"{_bytes(row['peak_bytes'])} | {duration(seconds * numbers)} | {_bytes(sent)} |"
            )
            numbers, width = result, FLOAT32_OVER_BF16


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _range(bounds: list[int]) -> str:
    low, high = bounds
    return f"{low}" if low == high else f"{low} to {high}"
