"""The tables of docs/findings.md, from the summaries of committed runs.

    python -m integration.findings integration/results docs/findings.md

The page says which tables it wants, each between two marks; the text between them is replaced:

    <!-- table accuracy: cpu/iid = IID; cpu/dirichlet-0.1 = Dirichlet 0.1 -->
    <!-- end -->

`accuracy` is one of CELLS, `cpu/iid` a run's folder, `IID` the heading of its column. Rules named
after the cells, as in `table accuracy fedit florist: ...`, are the only ones shown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import fedlora_kernels as flk
from integration.files import write
from integration.table import Entry, megabytes, relative, score

TABLE = re.compile(r"(<!-- table (\w+)((?: \w+)*): ([^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)

CELLS: Mapping[str, Callable[[Entry], str]] = {
    "accuracy": score("accuracy", "within_noise"),
    "clients": score("client_accuracy", "client_within_noise"),
    "loss": score("loss", "loss_within_noise"),
    "error": lambda entry: relative(entry["relative_error"]),
    "rank": lambda entry: f"{entry['rank']:.1f}",
    "down": lambda entry: megabytes(entry["bytes_down"]),
}
"""Table -> what a rule's cell shows; MB of one round for all clients."""


def filled(text: str, results: Path) -> str:
    """The page with every table made anew.

    Raises ValueError for an unknown table, FileNotFoundError for a run that is not there.
    """

    def table(found: re.Match[str]) -> str:
        begin, name, rules, columns, end = found.groups()
        if name not in CELLS:
            raise ValueError(f"unknown table {name!r}; known: {', '.join(CELLS)}")
        pairs = (column.partition("=") for column in columns.split(";"))
        runs = {heading.strip(): results / run.strip() for run, _, heading in pairs}
        return begin + "\n" + "\n".join(_table(name, rules.split(), runs)) + "\n\n" + end

    return TABLE.sub(table, text)


def _table(name: str, rules: Sequence[str], runs: Mapping[str, Path]) -> Iterator[str]:
    yield "| | " + " | ".join(runs) + " |"
    yield "|---" + "|---:" * len(runs) + "|"
    columns = [_summary(run) for run in runs.values()]
    for rule in rules or dict.fromkeys(rule for column in columns for rule in column):
        cells = (CELLS[name](column[rule]) if rule in column else "" for column in columns)
        yield f"| {flk.rules.find(rule).title} | " + " | ".join(cells) + " |"
    if name in ("accuracy", "loss"):
        begun = (json.loads((run / "settings.json").read_text()) for run in runs.values())
        yield "| *start* | " + " | ".join(f"{x[f'start_{name}']:.3f}" for x in begun) + " |"


def _summary(run: Path) -> dict[str, Entry]:
    entries = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {entry["rule"]: entry for entry in entries}


if __name__ == "__main__":
    page = Path(sys.argv[2])
    write(page, filled(page.read_text(encoding="utf-8"), Path(sys.argv[1])))
