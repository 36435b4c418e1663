"""The README's quickstart section and its figure, from a committed result folder.

python -m integration.report.readme integration/results/<device>/quickstart
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.files import write
from integration.report import figures
from integration.report.series import read_run
from integration.report.table import columns

BEGIN = "<!-- quickstart:begin -->"
END = "<!-- quickstart:end -->"


def write_section(results: Path, readme: Path) -> None:
    """Draw ``errors.svg`` into the result folder and put the section between the README's marks.

    Raises ValueError where the README lacks the marks.
    """
    run = read_run(results)
    write(results / "errors.svg", figures.errors(run.rules))
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the marks {BEGIN} and {END}")
    place = (results / "errors.svg").resolve().relative_to(readme.resolve().parent)
    section = (
        f"\n![Relative error of every rule over four rounds]({place})\n\n{_table(run.summary)}\n"
    )
    write(readme, before + begin + section + end + after)


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    shown = columns(summary)
    rows = [[column.title for column in shown]]
    rows += [[column.text(entry) for column in shown] for entry in summary]
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(shown) - 1) + "|", *lines])


if __name__ == "__main__":
    write_section(Path(sys.argv[1]), Path("README.md"))
