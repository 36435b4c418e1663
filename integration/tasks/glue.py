"""GLUE (arXiv 1804.07461): classification of sentences and pairs, by subset."""

from __future__ import annotations

from typing import Any

from integration.tasks.tables import Row, Table
from integration.tasks.task import Example, Task, TaskError

SUBSETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("different", "equivalent")),
    "qqp": (("question1", "question2"), ("different", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
"""Subset -> columns of the texts, names of the labels. (STS-B is a regression and has no place.)"""


def load(*, subset: str = "sst2", source: str = "nyu-mll/glue", **sizes: Any) -> Task:
    """Read the subset; its validation split is the test split, as the test labels are not public.

    Raises TaskError for an unknown subset, and for a data set that is not there.
    """
    if subset not in SUBSETS:
        raise TaskError(f"task glue: unknown subset {subset!r}; known: {', '.join(SUBSETS)}")
    texts, classes = SUBSETS[subset]
    validation = "validation_matched" if subset == "mnli" else "validation"
    table = Table.read(source, subset, test=validation, needs=(*texts, "label"))

    def example(row: Row) -> Example:
        first, *second = (str(row[text]) for text in texts)
        return Example(first, int(row["label"]), second=second[0] if second else None)

    return table.task(f"glue {subset}", classes, example, kind="classification", **sizes)
