"""The README's quickstart section and the tables of docs/rules.md and docs/findings.md, from runs.

    python -m integration.report.pages [README.md docs/rules.md docs/findings.md]

A page says what it wants, each between two marks (page_filler.py); the text between them is made
from the files in integration/results:

    <!-- quickstart amd-epyc-2-threads/quickstart -->
    <!-- end -->

    <!-- table accuracy: cpu/iid = IID; cpu/dirichlet-0.1 = Dirichlet 0.1 -->
    <!-- end -->

    <!-- run cpu/iid: loss = Loss; down = MB -->
    <!-- end -->

The quickstart section is the figure of the errors and the table of a run. In a table `accuracy` is
one of CELLS, `cpu/iid` a run's folder, `IID` the heading of its column. Rules named after the
cells, as in `table accuracy fedit florist: ...`, are the only ones shown. A `run` is a table of one
run, with a column for each of the cells that are named.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fedlora_kernels as flk
from integration.files import write
from integration.report import figures
from integration.report.page_filler import arguments, fill
from integration.report.series import read_run
from integration.report.table import Entry, columns, megabytes, relative, score

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "integration" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "rules.md", ROOT / "docs" / "findings.md")

CELLS: Mapping[str, Callable[[Entry], str]] = {
    "accuracy": score("accuracy", "within_noise"),
    "clients": score("client_accuracy", "client_within_noise"),
    "loss": score("loss", "loss_within_noise"),
    "error": lambda entry: relative(entry["relative_error"]),
    "rate": lambda entry: f"{entry['learning_rate']:g}",
    "seeds": lambda entry: str(len(entry.get("losses", "1"))),
    "rank": lambda entry: f"{entry['rank']:.1f}",
    "down": lambda entry: megabytes(entry["bytes_down"]),
}
"""Table -> what a rule's cell shows; MB of one round for all clients."""


def filled(page: str, results: Path = RESULTS, root: Path = ROOT) -> str:
    """The page with every section made anew; links are relative to `root`.

    Raises ValueError for an unknown table, and an error for a run that is not there.
    """

    def table(text: str) -> str:
        head, _, runs_text = text.partition(":")
        name, *rules = head.split()
        runs = {heading: results / run for heading, run in _columns(runs_text)}
        return "\n".join(_table(_known(name), rules, runs))

    def run(text: str) -> str:
        folder, _, cells_text = text.partition(":")
        cells = {heading: CELLS[_known(name)] for heading, name in _columns(cells_text)}
        return "\n".join(_run(_by_rule(results / folder.strip()), cells))

    def quickstart(run: str) -> str:
        place = (results / run / "errors.svg").relative_to(root)
        summary = read_run(results / run).summary
        return f"![Relative error of every rule over the rounds]({place})\n\n{_summary(summary)}"

    return fill(page, {"quickstart": quickstart, "table": table, "run": run})


def main(pages: Sequence[Path] = PAGES) -> None:
    """Fill the pages, and draw errors.svg into the folder of every quickstart section's run."""
    for path in pages:
        page = path.read_text(encoding="utf-8")
        for run in arguments(page, "quickstart"):
            write(RESULTS / run / "errors.svg", figures.errors(read_run(RESULTS / run).rules))
        write(path, filled(page))


def _summary(summary: Sequence[Mapping[str, Any]]) -> str:
    """summary.json as a markdown table."""
    shown = columns(summary)
    rows = [[column.title for column in shown]]
    rows += [[column.text(entry) for column in shown] for entry in summary]
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(shown) - 1) + "|", *lines])


def _columns(text: str) -> Iterator[tuple[str, str]]:
    """Heading and what is under it, of `what = heading; what = heading`."""
    for column in text.split(";"):
        what, _, heading = column.partition("=")
        yield heading.strip(), what.strip()


def _known(name: str) -> str:
    if name not in CELLS:
        raise ValueError(f"unknown table {name!r}; known: {', '.join(CELLS)}")
    return name


def _head(headings: Collection[str]) -> Iterator[str]:
    yield "| | " + " | ".join(headings) + " |"
    yield "|---" + "|---:" * len(headings) + "|"


def _run(rules: Mapping[str, Entry], cells: Mapping[str, Callable[[Entry], str]]) -> Iterator[str]:
    yield from _head(cells)
    for rule, entry in rules.items():
        found = (cell(entry) for cell in cells.values())
        yield f"| {flk.rules.find(rule).title} | " + " | ".join(found) + " |"


def _table(name: str, rules: Sequence[str], runs: Mapping[str, Path]) -> Iterator[str]:
    yield from _head(runs)
    summaries = [_by_rule(run) for run in runs.values()]
    for rule in rules or dict.fromkeys(rule for column in summaries for rule in column):
        cells = (CELLS[name](column[rule]) if rule in column else "" for column in summaries)
        yield f"| {flk.rules.find(rule).title} | " + " | ".join(cells) + " |"
    if name in ("accuracy", "loss"):
        begun = (json.loads((run / "settings.json").read_text()) for run in runs.values())
        yield "| *start* | " + " | ".join(f"{x[f'start_{name}']:.3f}" for x in begun) + " |"


def _by_rule(run: Path) -> dict[str, Entry]:
    entries = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {entry["rule"]: entry for entry in entries}


if __name__ == "__main__":
    main([Path(page) for page in sys.argv[1:]] or PAGES)
