"""Data sets, by hub id or from files on the disk, through Hugging Face's `datasets`: their rows,
and the examples that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from integration.tasks.task import Content, Example, Right, TaskError

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

WORDS = ("river", "stone", "apple", "green", "seven", "window", "market", "letter", "carry")

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

    def where(self, kept: Callable[[Row], bool]) -> Table:
        """The rows that `kept` says yes to. Raises TaskError where none is left to train on."""
        train = list(filter(kept, self.train))
        if not train:
            raise TaskError(f"data set {self.source!r}: no training row is left, all are longer")
        return Table(self.source, train, None if self.test is None else [*filter(kept, self.test)])

    def values(self, column: str) -> tuple[str, ...]:
        """What stands in a column, in the alphabet's order, without repetitions."""
        return tuple(sorted({str(row[column]) for row in [*self.train, *(self.test or [])]}))

    def content(
        self,
        classes: tuple[str, ...],
        example: Callable[[Row], Example],
        *,
        right: Right | None = None,
    ) -> Content:
        """Every row's example."""
        return Content(
            classes,
            list(map(example, self.train)),
            None if self.test is None else list(map(example, self.test)),
            right,
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


def sentence(draw: Random, length: int) -> str:
    """Words of a sample row."""
    return " ".join(draw.choice(WORDS) for _ in range(length))
