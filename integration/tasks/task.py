"""What a task is: labelled texts, split once into train, shared and test."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class TaskError(ValueError):
    """A task that cannot be made here, or not in these sizes."""


@dataclass(frozen=True)
class Example:
    """One text and the index of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """A text classification task.

    `train` is what the clients hold between them, `shared` is the small public split that every
    party has (the frozen head is made from it), `test` judges the global model. The three are
    disjoint.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    shared: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def majority(self) -> float:
        """Share of the largest class in the test split: the accuracy of knowing nothing."""
        counts = Counter(example.label for example in self.test)
        return max(counts.values()) / len(self.test)


def split(
    name: str,
    classes: tuple[str, ...],
    examples: Iterable[Example],
    *,
    test_size: int,
    shared_per_class: int,
    train_size: int | None = None,
) -> Task:
    """Split by a hash of the text: the same for every seed, and stable when a text comes or goes.

    In hash order the first `test_size` examples are the test split, the next `shared_per_class` of
    every class are the shared split and the rest, at most `train_size`, is the training split.

    Raises TaskError where the examples do not suffice.
    """
    ordered = sorted(examples, key=lambda e: hashlib.sha256(e.text.encode()).digest())
    test, rest = ordered[:test_size], ordered[test_size:]
    taken: Counter[int] = Counter()
    shared: list[Example] = []
    train: list[Example] = []
    for example in rest:
        if taken[example.label] < shared_per_class:
            taken[example.label] += 1
            shared.append(example)
        else:
            train.append(example)
    short = [c for i, c in enumerate(classes) if taken[i] < shared_per_class]
    if short:
        raise TaskError(
            f"task {name}: fewer than {shared_per_class} examples are left for the shared split "
            f"of {', '.join(short)}; lower test_size ({test_size}) or shared_per_class"
        )
    if not train:
        raise TaskError(f"task {name}: no training examples are left; lower test_size")
    return Task(name, classes, tuple(train[:train_size]), tuple(shared), tuple(test))
