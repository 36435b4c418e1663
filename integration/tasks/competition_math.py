"""MATH (arXiv 2103.03874): competition problems of seven subjects, exact match of the boxed answer.

The boxes are compared as texts without blanks: the published equivalences of fractions and units
beyond that are not made up for, so the accuracy is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks.answers import boxed, same_box
from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import HUB, Content, Example, Published, Task


def read(*, source: str = "qwedsacf/competition_math") -> Content:
    """Read the data set (columns problem, solution, type); TaskError where it is not there."""
    table = Table.read(source, needs=("problem", "solution", "type"))
    subjects = table.values("type")

    def example(row: Row) -> Example:
        prompt, solution = f"Problem: {row['problem']}\nSolution:", str(row["solution"])
        label = subjects.index(str(row["type"]))
        return Example(prompt, label, completion=f" {solution}", answer=boxed(solution) or "")

    return table.content(subjects, example, right=same_box)


def _row(draw: Random, place: int, _: Mapping[str, Any]) -> dict[str, Any]:
    solution = rf"{sentence(draw, 3)} \boxed{{{place}}}"
    return {"problem": sentence(draw, 8), "solution": solution, "type": f"subject {place % 7}"}


TASK = Task(
    "math",
    "language",
    read,
    # The 7,500 and 5,000 of MATH in one split, printed in thousands: 12.5k rows.
    published={"": Published((12500,), 0, HUB + "qwedsacf/competition_math")},
    row=_row,
)
