"""GLUE (arXiv 1804.07461): classification of sentences and pairs, by subset."""

from __future__ import annotations

from integration.tasks.tables import columns, rows, train_rows
from integration.tasks.task import Example, Task, TaskError, split

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


def load(
    *,
    test_size: int,
    shared_per_class: int,
    train_size: int | None = None,
    subset: str = "sst2",
    source: str = "nyu-mll/glue",
) -> Task:
    """Read the subset; its validation split is the test split, as the test labels are not public.

    Raises TaskError for an unknown subset, and for a data set that is not there.
    """
    if subset not in SUBSETS:
        raise TaskError(f"task glue: unknown subset {subset!r}; known: {', '.join(SUBSETS)}")
    texts, classes = SUBSETS[subset]
    validation = "validation_matched" if subset == "mnli" else "validation"
    train, test = train_rows(source, subset), rows(source, validation, subset)
    columns(train, (*texts, "label"), source)

    def examples(found: list[dict[str, object]]) -> list[Example]:
        return [
            Example(
                str(row[texts[0]]),
                int(str(row["label"])),
                second=str(row[texts[1]]) if len(texts) > 1 else None,
            )
            for row in found
        ]

    return split(
        f"glue {subset}",
        classes,
        examples([dict(row) for row in train]),
        test=None if test is None else examples([dict(row) for row in test]),
        test_size=test_size,
        shared_per_class=shared_per_class,
        train_size=train_size,
    )
