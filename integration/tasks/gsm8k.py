"""GSM8K (arXiv 2110.14168): grade-school word problems, exact match of the number after ####."""

from __future__ import annotations

from typing import Any

from integration.tasks.answers import after_hashes, same_number
from integration.tasks.tables import Row, Table
from integration.tasks.task import Example, Task


def load(*, source: str = "openai/gsm8k", **sizes: Any) -> Task:
    """Read the data set (columns question, answer); TaskError where it is not there."""
    table = Table.read(source, "main", needs=("question", "answer"))
    return table.task("gsm8k", ("word problems",), _example, right=same_number, **sizes)


def _example(row: Row) -> Example:
    prompt, answer = f"Question: {row['question']}\nAnswer:", str(row["answer"])
    return Example(prompt, 0, completion=f" {answer}", answer=after_hashes(answer) or "")
