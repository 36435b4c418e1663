"""GSM8K (arXiv 2110.14168): grade-school word problems, exact match of the number after ####."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks.answers import after_hashes, same_number
from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import CARDS, Content, Example, Published, Task


def read(*, source: str = "openai/gsm8k") -> Content:
    """Read the data set (columns question, answer); TaskError where it is not there."""
    table = Table.read(source, "main", needs=("question", "answer"))
    return table.content(("word problems",), _example, right=same_number)


def _example(row: Row) -> Example:
    prompt, answer = f"Question: {row['question']}\nAnswer:", str(row["answer"])
    return Example(prompt, 0, completion=f" {answer}", answer=after_hashes(answer) or "")


def _row(draw: Random, place: int, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": sentence(draw, 8), "answer": f"{sentence(draw, 3)}\n#### {place}"}


TASK = Task(
    "gsm8k",
    "language",
    read,
    published={"": Published((7473,), 1319, CARDS + "gsm8k/README.md")},
    row=_row,
)
