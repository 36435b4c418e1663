"""Data sets, by hub id or from files on the disk, through Hugging Face's `datasets`: their rows,
and the task that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from integration.tasks.task import Example, Task, TaskError, split

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

Row = Mapping[str, Any]


def rows(source: str, split: str, subset: str | None = None) -> list[Row] | None:
    """The rows of one split, or None where the data set has no such split.

    `source` is a hub id (read from the local cache, unless HF_HUB_OFFLINE=0 allows a download), a
    file (JSON, JSON lines, CSV, Parquet: it is the split "train"), or a folder with a file for
    every split (`train.jsonl`, `test.jsonl`).
    Raises TaskError where there is nothing to read.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise TaskError(f"reading {source} needs datasets: pip install datasets") from None
    path = Path(source)
    try:
        if path.is_dir():
            files = [x for x in sorted(path.glob(f"{split}.*")) if x.suffix in FORMATS]
            if not files:
                return None
            path = files[0]
        elif path.is_file() and split != "train":
            return None
        if path.is_file():
            if path.suffix not in FORMATS:
                raise TaskError(f"{path}: expected one of {', '.join(FORMATS)}")
            reader = FORMATS[path.suffix]
            found = datasets.load_dataset(reader, data_files=str(path), split="train")
        else:
            names = datasets.get_dataset_split_names(source, subset)
            if split not in names:
                return None
            found = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise TaskError(
            f"data set {source!r} cannot be read: {reason} (a folder or a file works without a "
            "network, HF_HUB_OFFLINE=0 allows a download)"
        ) from None
    return list(found)


@dataclass(frozen=True)
class Table:
    """A data set's rows: those to train on, and those of its own test split, where it has one."""

    source: str
    train: list[Row]
    test: list[Row] | None

    @classmethod
    def read(
        cls,
        source: str,
        subset: str | None = None,
        *,
        test: str = "test",
        test_source: str | None = None,
        needs: Iterable[str] = (),
    ) -> Table:
        """Read the split "train" and the split `test`, that one from `test_source` where given.

        Raises TaskError where there is none to train on, or the rows lack a column of `needs`.
        """
        train = rows(source, "train", subset)
        if not train:
            raise TaskError(f"data set {source!r} has no split 'train'")
        found = rows(test_source or source, test, subset)
        columns(train, needs, source)
        columns(found or train, needs, test_source or source)
        return cls(source, train, found)

    def values(self, column: str) -> tuple[str, ...]:
        """What stands in a column, in the alphabet's order, without repetitions."""
        return tuple(sorted({str(row[column]) for row in [*self.train, *(self.test or [])]}))

    def task(
        self,
        name: str,
        classes: tuple[str, ...],
        example: Callable[[Row], Example],
        *,
        test_size: int,
        shared_per_class: int = 0,
        train_size: int | None = None,
        kind: Literal["classification", "language"] = "language",
        right: Callable[[Example, str], bool] | None = None,
    ) -> Task:
        """Every row's example, split into a task; `split` says what the sizes are.

        Language tasks have no head that a shared split would make, so they get none.
        """
        return split(
            name,
            classes,
            map(example, self.train),
            test=None if self.test is None else [example(row) for row in self.test],
            test_size=test_size,
            shared_per_class=shared_per_class if kind == "classification" else 0,
            train_size=train_size,
            kind=kind,
            right=right,
        )


def columns(found: Iterable[Row], needed: Iterable[str], source: str) -> None:
    """Raise TaskError where the rows lack one of the columns."""
    there = set(next(iter(found)))
    for name in needed:
        if name not in there:
            raise TaskError(
                f"data set {source!r} has no column {name!r}; its columns: "
                f"{', '.join(sorted(there))}"
            )
