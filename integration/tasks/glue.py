"""GLUE (arXiv 1804.07461): classification of sentences and pairs, by subset."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import CARDS, Content, Example, Published, Task, TaskError

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

SIZES = {
    "cola": ((2528, 6023), 1043),
    "sst2": ((29780, 37569), 872),
    "mrpc": ((1194, 2474), 408),
    "qqp": ((229468, 134378), 40430),
    "mnli": ((130899, 130900, 130903), 9815),
    "qnli": ((52366, 52377), 5463),
    "rte": ((1249, 1241), 277),
}
"""Subset -> training examples of every label, test examples. How a total divides into labels was
counted in GLUE's own files for cola, sst2, mrpc and rte (its file of mrpc has one example of the
second label less). The shares of qqp, mnli and qnli add up to the printed totals but were not
checked one by one."""


def read(*, subset: str = "sst2", source: str = "nyu-mll/glue") -> Content:
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

    return table.content(classes, example)


def _row(draw: Random, place: int, options: Mapping[str, Any]) -> dict[str, Any]:
    texts, classes = SUBSETS[TASK.which(options)]
    return {**{text: sentence(draw, 6) for text in texts}, "label": place % len(classes)}


TASK = Task(
    "glue",
    "classification",
    read,
    variant="subset",
    published={
        subset: Published(train, test, CARDS + "glue/dataset_infos.json")
        for subset, (train, test) in SIZES.items()
    },
    row=_row,
)
