"""GSM8K (arXiv 2110.14168): grade-school word problems, exact match of the number after ####."""

from __future__ import annotations

from integration.tasks.answers import after_hashes, same_number
from integration.tasks.tables import Row, columns, rows, train_rows
from integration.tasks.task import Example, Task, split


def load(
    *,
    test_size: int,
    shared_per_class: int = 0,
    train_size: int | None = None,
    source: str = "openai/gsm8k",
) -> Task:
    """Read the data set (columns question, answer); TaskError where it is not there."""
    train, test = train_rows(source, "main"), rows(source, "test", "main")
    columns(train, ("question", "answer"), source)
    return split(
        "gsm8k",
        ("word problems",),
        [_example(row) for row in train],
        test=None if test is None else [_example(row) for row in test],
        test_size=test_size,
        train_size=train_size,
        kind="language",
        right=same_number,
    )


def _example(row: Row) -> Example:
    prompt, answer = f"Question: {row['question']}\nAnswer:", str(row["answer"])
    return Example(prompt, 0, completion=f" {answer}", answer=after_hashes(answer) or "")
