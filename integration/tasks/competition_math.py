"""MATH (arXiv 2103.03874): competition problems of seven subjects, exact match of the boxed answer.

The boxes are compared as texts without blanks: the published equivalences of fractions and units
beyond that are not made up for, so the accuracy is a lower bound.
"""

from __future__ import annotations

from typing import Any

from integration.tasks.answers import boxed, same_box
from integration.tasks.tables import Row, Table
from integration.tasks.task import Example, Task


def load(*, source: str = "qwedsacf/competition_math", **sizes: Any) -> Task:
    """Read the data set (columns problem, solution, type); TaskError where it is not there."""
    table = Table.read(source, needs=("problem", "solution", "type"))
    subjects = table.values("type")

    def example(row: Row) -> Example:
        prompt, solution = f"Problem: {row['problem']}\nSolution:", str(row["solution"])
        label = subjects.index(str(row["type"]))
        return Example(prompt, label, completion=f" {solution}", answer=boxed(solution) or "")

    return table.task("math", subjects, example, right=same_box, **sizes)
