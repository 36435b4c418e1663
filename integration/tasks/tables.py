"""Rows of a data set, by hub id or from files on the disk, through Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from integration.tasks.task import TaskError

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


def train_rows(source: str, subset: str | None = None) -> list[Row]:
    """The rows of the split "train"; TaskError where there is none."""
    found = rows(source, "train", subset)
    if not found:
        raise TaskError(f"data set {source!r} has no split 'train'")
    return found


def columns(found: Iterable[Row], needed: Iterable[str], source: str) -> None:
    """Raise TaskError where the rows lack one of the columns."""
    there = set(next(iter(found)))
    for name in needed:
        if name not in there:
            raise TaskError(
                f"data set {source!r} has no column {name!r}; its columns: "
                f"{', '.join(sorted(there))}"
            )
