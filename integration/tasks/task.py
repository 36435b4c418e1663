"""What a task is: examples, split once into train, shared and test, and what counts as right."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


class TaskError(ValueError):
    """A task that cannot be made here, or not in these sizes."""


@dataclass(frozen=True)
class Example:
    """One text and its class; or, for a language model, a prompt and its completion."""

    text: str
    """What the model reads: the text to classify, or the prompt (may be empty)."""
    label: int
    """Index of the class; of a language task, of the topic by which clients may differ."""
    second: str | None = None
    """The second text of a classification of pairs."""
    completion: str | None = None
    """What a language model shall write after the text."""
    answer: str = ""
    """What `Task.right` compares a generated text with."""
    turns: tuple[tuple[str, str], ...] = ()
    """(role, content) of the conversation so far, in place of `text`: goes through the tokenizer's
    chat template."""


@dataclass(frozen=True)
class Task:
    """A text classification or a language task.

    `train` is what the clients hold between them, `shared` is the small public split that every
    party has (the frozen head of a classification is made from it), the global model is evaluated
    on `test`. The three are disjoint.
    """

    name: str
    classes: tuple[str, ...]
    """Names of the labels: classes, or topics."""
    train: tuple[Example, ...]
    shared: tuple[Example, ...]
    test: tuple[Example, ...]
    kind: Literal["classification", "language"] = "classification"
    right: Callable[[Example, str], bool] | None = None
    """Whether a generated text answers the example. Without it the accuracy of a language task is
    the share of its completions' tokens that the model predicts."""

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
    shared_per_class: int = 0,
    train_size: int | None = None,
    test: Sequence[Example] | None = None,
    kind: Literal["classification", "language"] = "classification",
    right: Callable[[Example, str], bool] | None = None,
) -> Task:
    """Split by a hash of the text: the same for every seed, and stable when a text comes or goes.

    In hash order the first `test_size` examples are the test split (of `test`, where the task comes
    with a test split of its own), the next `shared_per_class` of every class are the shared split
    and the rest, at most `train_size`, is the training split. What asks the same as a test example
    is left out of it (a question that is there twice, with two answers); a test split of the task's
    own is taken as it was published, and the training examples beside it too.

    Raises TaskError where the examples do not suffice.
    """
    ordered = _in_hash_order(examples)
    if test is None:
        chosen = ordered[:test_size]
        asked = set(map(_asked, chosen))
        rest = [example for example in ordered[test_size:] if _asked(example) not in asked]
    else:
        chosen, rest = _in_hash_order(test)[:test_size], ordered
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
    if not chosen:
        raise TaskError(f"task {name}: the test split is empty")
    return Task(name, classes, tuple(train[:train_size]), tuple(shared), tuple(chosen), kind, right)


def hashed(text: str) -> bytes:
    """What decides the split that a text belongs to: the test split has the lowest hashes."""
    return hashlib.sha256(text.encode()).digest()


def _read(example: Example) -> str:
    """Everything that the model reads of an example."""
    conversation = "".join(content for _, content in example.turns)
    return conversation + example.text + (example.second or "")


def _asked(example: Example) -> str | None:
    """What two examples that ask the same have in common."""
    return _read(example) or example.completion


def _in_hash_order(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda x: hashed(_read(x) + (x.completion or "")))
