"""Folders that appear whole: written under a temporary name, then put in place in one step.

A crash at any moment leaves the old folder or the new one, never a mixture.
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replaced(target: Path, written: frozenset[str]) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well.

    Args:
        target: the folder to write.
        written: names this writer owns. Other files of an existing adapter folder (a model card,
            a tokenizer) are carried over; owned names that the block did not write disappear.

    Raises:
        FileExistsError: ``target`` is a file, or a non-empty folder without adapter_config.json.
    """
    refuse_foreign(target)
    target = Path(os.path.realpath(target))  # through links, and out of "." and ".."
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield made
        if target.is_dir():
            _carry_over(target, made, written)
        made.chmod(0o777 & ~_umask())
        _put_in_place(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def refuse_foreign(target: Path) -> None:
    """Raise FileExistsError where writing to ``target`` would destroy what is not an adapter."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "adapter_config.json").is_file():
        raise FileExistsError(
            f"{target} is not empty and holds no adapter_config.json; choose another folder"
        )


def _carry_over(source: Path, made: Path, written: frozenset[str]) -> None:
    for entry in source.iterdir():
        if entry.name in written or (made / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, made / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, made / entry.name, follow_symlinks=False)


def _put_in_place(made: Path, target: Path) -> None:
    """Rename onto a missing or empty target, else exchange the two names in one system call."""
    try:
        made.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(made, target):
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            try:
                made.rename(target)
            except OSError:
                (old / target.name).rename(target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names atomically (Linux renameat2); False where the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    done = call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE)
    return bool(done == 0)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
