"""What a task is: its kind, where its examples come from, its published sizes, a sample row.

`Task.load` reads the examples and splits them once into train, shared and test.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from random import Random
from typing import Any, Literal

Kind = Literal["classification", "language"]

HUB = "https://huggingface.co/datasets/"

CARDS = "https://github.com/huggingface/datasets, datasets/"
"""Where the cards of the older data sets were kept before they moved to the hub."""


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
    """What `LoadedTask.right` compares a generated text with."""
    turns: tuple[tuple[str, str], ...] = ()
    """(role, content) of the conversation so far, in place of `text`: goes through the tokenizer's
    chat template."""

    @property
    def question(self) -> str:
        """The text, or what was said last."""
        return self.turns[-1][1] if self.turns else self.text


Right = Callable[[Example, str], bool]
"""(example, generated text) -> whether the text answers the example."""


@dataclass(frozen=True)
class Content:
    """What a task reads: its examples before they are split."""

    classes: tuple[str, ...]
    """Names of the labels: classes, or topics."""
    examples: Iterable[Example]
    test: Sequence[Example] | None = None
    """The examples of a test split of the data set's own."""
    right: Right | None = None


@dataclass(frozen=True)
class LoadedTask:
    """A text classification or a language task, with its examples.

    `train` is what the clients hold between them, `shared` is the small public split that every
    party has (the frozen head of a classification is made from it), the global model is evaluated
    on `test`. They and `validation` are disjoint.
    """

    name: str
    classes: tuple[str, ...]
    """Names of the labels: classes, or topics."""
    train: tuple[Example, ...]
    shared: tuple[Example, ...]
    test: tuple[Example, ...]
    kind: Kind = "classification"
    right: Right | None = None
    """Without it the accuracy of a language task is the share of its completions' tokens that the
    model predicts."""
    validation: tuple[Example, ...] = ()
    """Training examples that no client holds: they choose a learning rate, the test split never."""

    @property
    def majority(self) -> float:
        """Share of the largest class in the test split: the accuracy of knowing nothing."""
        counts = Counter(example.label for example in self.test)
        return max(counts.values()) / len(self.test)


@dataclass(frozen=True)
class Published:
    """The sizes of a data set's splits, for plans that are made where the data are not.

    Labels are in the order of the task's classes; one label stands for a data set without topics.
    """

    train: tuple[int, ...]
    """Training examples of every label."""
    test: int
    """Examples of its test split; 0 where it has none and the test is cut from the training."""
    source: str
    """Where the totals are printed."""


@dataclass(frozen=True)
class Task:
    """One task, under the name that the setting `task` has. Every file of this folder that has a
    `TASK` adds one.
    """

    name: str
    kind: Kind
    read: Callable[..., Content]
    """(**options) -> the examples. The keyword arguments are the options of the task; raises
    TaskError where there is nothing to read."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Value of the option `variant` -> sizes; of a task without variants the key is ""."""
    variant: str = ""
    """The option that decides which data set is read, such as GLUE's subset."""
    row: Callable[[Random, int, Mapping[str, Any]], dict[str, Any]] | None = None
    """(random numbers, position, options) -> a sample row in the columns of the data set, for
    --tiny. None for a task that makes its own data."""
    tiny_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of a task that makes its own data, for --tiny."""

    def load(
        self,
        *,
        test_size: int,
        shared_per_class: int = 0,
        train_size: int | None = None,
        validation_size: int = 0,
        **options: Any,
    ) -> LoadedTask:
        """The examples, split; `split` says what the sizes are.

        A language task gets no shared split, as it has no head that would be made from it.
        Raises TaskError for an unknown option, and where the examples are missing or too few.
        """
        known = self.options
        for name in options:
            if name not in known:
                raise TaskError(
                    f"task {self.name} has no option {name!r}; its options: "
                    f"{', '.join(known) or 'none'}"
                )
        content = self.read(**options)
        return split(
            f"{self.name} {self.which(options)}".strip(),
            content.classes,
            content.examples,
            test=content.test,
            test_size=test_size,
            shared_per_class=shared_per_class if self.kind == "classification" else 0,
            train_size=train_size,
            validation_size=validation_size,
            kind=self.kind,
            right=content.right,
        )

    @property
    def options(self) -> dict[str, Any]:
        """Option -> its default."""
        return {name: x.default for name, x in signature(self.read).parameters.items()}

    def local(self, data: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the folders of `data` in place of the hub's names.

        A data set's folder has the name of its variant (sst2) or the last part of its name on the
        hub (gsm8k). Raises TaskError where `data` has neither.
        """
        named = {name: x for name, x in (self.options | dict(options)).items() if "source" in name}
        local = dict(options)
        for option, source in named.items() if data is not None else ():
            names = [name for name in (self.which(options), str(source).rpartition("/")[2]) if name]
            found = [folder for name in names if (folder := Path(str(data), name)).is_dir()]
            if found:
                local[option] = str(found[0])
            elif source and not Path(source).exists():
                raise TaskError(f"{data} has no folder {' or '.join(dict.fromkeys(names))}")
        return local

    def which(self, options: Mapping[str, Any]) -> str:
        """The value of the option `variant`; "" for a task without variants."""
        return str((self.options | dict(options))[self.variant]) if self.variant else ""


def split(
    name: str,
    classes: tuple[str, ...],
    examples: Iterable[Example],
    *,
    test_size: int,
    shared_per_class: int = 0,
    train_size: int | None = None,
    validation_size: int = 0,
    test: Sequence[Example] | None = None,
    kind: Kind = "classification",
    right: Right | None = None,
) -> LoadedTask:
    """Split by a hash of the text: the same for every seed, and stable when a text comes or goes.

    In hash order the first `test_size` examples are the test split (of `test`, where the task comes
    with a test split of its own), the next `shared_per_class` of every class are the shared split,
    the next `validation_size` the validation split and the rest, at most `train_size`, is the
    training split. What asks the same as a test or validation example is left out of it (a question
    that is there twice, with two answers); a test split of the task's own is taken as it was
    published, and the training examples beside it too.

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
    validation, train = train[:validation_size], train[validation_size:]
    decides = set(map(_asked, validation))
    train = [example for example in train if _asked(example) not in decides]
    short = [c for i, c in enumerate(classes) if taken[i] < shared_per_class]
    if short:
        raise TaskError(
            f"task {name}: fewer than {shared_per_class} examples are left for the shared split "
            f"of {', '.join(short)}; lower test_size ({test_size}) or shared_per_class"
        )
    if not train:
        raise TaskError(
            f"task {name}: no training examples are left; lower test_size or validation_size"
        )
    if not chosen:
        raise TaskError(f"task {name}: the test split is empty")
    return LoadedTask(
        name,
        classes,
        tuple(train[:train_size]),
        tuple(shared),
        tuple(chosen),
        kind,
        right,
        tuple(validation),
    )


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
