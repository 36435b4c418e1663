"""durable: files that are on the disk, whole, before the next step is taken.

A step writes files and folders under names that nothing refers to yet; the journal's line, written
last, refers to them. A process killed before that line leaves names that the next step clears.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def flushed(path: Path) -> None:
    """A file's content, or a folder's list of names, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, durable when the block ends."""
    if folder.exists():  # of a step that never ended
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    for file in folder.iterdir():
        flushed(file)
    flushed(folder)
    flushed(folder.parent)


def cleared(folders: Iterable[Path]) -> None:
    """Remove what nothing refers to any more."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], room: int) -> None:
    """Tensors by name, in files of at most ``room`` bytes (or of one tensor), as they come."""
    group: dict[str, Tensor] = {}
    count = 0
    for name, tensor in tensors:
        if group and sum(x.nbytes for x in group.values()) + tensor.nbytes > room:
            save_file(group, folder / f"{count}.safetensors")
            group, count = {}, count + 1
        group[name] = tensor
    save_file(group, folder / f"{count}.safetensors")


def read_tensors(folder: Path) -> Mapping[str, Tensor]:
    """What :func:`write_tensors` wrote, mapped: read from the disk when it is looked at."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
