"""The README's quickstart section and its figure, from a committed result folder.

python -m integration.readme integration/results/<device>/quickstart
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration import charts
from integration.files import write
from integration.series import read_run
from integration.table import COLUMNS, cells

BEGIN = "<!-- quickstart:begin -->"
END = "<!-- quickstart:end -->"


def write_section(results: Path, readme: Path) -> None:
    """Draw ``errors.svg`` into the result folder and put the section between the README's marks.

    Raises ValueError where the README lacks the marks.
    """
    run = read_run(results)
    write(results / "errors.svg", charts.errors(run.rules))
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
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(entry)) + " |" for entry in summary]
    return "\n".join(lines)


if __name__ == "__main__":
    write_section(Path(sys.argv[1]), Path("README.md"))
