"""MATH (arXiv 2103.03874): competition problems of seven subjects, exact match of the boxed answer.

The boxes are compared as texts without blanks: the published equivalences of fractions and units
beyond that are not made up for, so the accuracy is a lower bound.
"""

from __future__ import annotations

from integration.tasks.answers import boxed, same_box
from integration.tasks.tables import Row, columns, rows, train_rows
from integration.tasks.task import Example, Task, split


def load(
    *,
    test_size: int,
    shared_per_class: int = 0,
    train_size: int | None = None,
    source: str = "qwedsacf/competition_math",
) -> Task:
    """Read the data set (columns problem, solution, type); TaskError where it is not there."""
    train, test = train_rows(source), rows(source, "test")
    columns(train, ("problem", "solution", "type"), source)
    subjects = tuple(sorted({str(row["type"]) for row in [*train, *(test or [])]}))

    def example(row: Row) -> Example:
        prompt, solution = f"Problem: {row['problem']}\nSolution:", str(row["solution"])
        label = subjects.index(str(row["type"]))
        return Example(prompt, label, completion=f" {solution}", answer=boxed(solution) or "")

    return split(
        "math",
        subjects,
        [example(row) for row in train],
        test=None if test is None else [example(row) for row in test],
        test_size=test_size,
        train_size=train_size,
        kind="language",
        right=same_box,
    )
