"""GSM8K (arXiv 2110.14168): grade-school word problems, exact match of the number after ####."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks.answers import after_hashes, same_number
from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import CARDS, Content, Example, Published, Task


def read(
    *, source: str = "openai/gsm8k", chat: bool = False, most_characters: int | None = None
) -> Content:
    """Read the data set (columns question, answer); TaskError where it is not there.

    `chat` asks the question as a user's turn instead of "Question: ... Answer:". Problems of more
    than `most_characters` in question and answer together are left out of both splits.
    """
    table = Table.read(source, "main", needs=("question", "answer"))
    if most_characters is not None:
        table = table.where(lambda row: len(row["question"] + row["answer"]) <= most_characters)
    return table.content(("word problems",), _chat if chat else _example, right=same_number)


def _example(row: Row) -> Example:
    prompt, answer = f"Question: {row['question']}\nAnswer:", str(row["answer"])
    return Example(prompt, 0, completion=f" {answer}", answer=after_hashes(answer) or "")


def _chat(row: Row) -> Example:
    question, answer = str(row["question"]), str(row["answer"])
    number = after_hashes(answer) or ""
    return Example("", 0, completion=answer, answer=number, turns=(("user", question),))


def _row(draw: Random, place: int, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": sentence(draw, 8), "answer": f"{sentence(draw, 3)}\n#### {place}"}


TASK = Task(
    "gsm8k",
    "language",
    read,
    published={"": Published((7473,), 1319, CARDS + "gsm8k/README.md")},
    row=_row,
)
