"""Journal: which clients a stream has, in the order in which they came.

    settings.json    what the stream is of, written once
    clients.jsonl    a line per client; its end is the moment at which the client is in the stream

The line is written last, when everything that it stands for is on the disk. A line without its end
is of a process that was killed: it counts for nothing, and the next line takes its place.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.arrivals.durable import flushed

SETTINGS = "settings.json"
CLIENTS = "clients.jsonl"


@dataclass(frozen=True)
class Entry:
    """One client."""

    client: str | None
    """what ``add`` was told to call it"""
    folder: str | None
    """where it was read from; None for an adapter that was only in memory"""
    name: str | None
    """how messages call it"""
    weight: float
    stamp: tuple[int, ...] = ()
    """of the folder's files, when the stream reads them again: sizes and times of their last change
    """

    @property
    def key(self) -> tuple[str, str] | None:
        """What it is known by."""
        if self.client is not None:
            return "client", self.client
        return None if self.folder is None else ("folder", self.folder)


class Journal:
    """The clients of the stream in a folder.

    Args:
        state: the folder; made when it is missing.
        settings: what the stream is of.

    Raises:
        FileExistsError: the folder holds other things.
        ValueError: the folder holds a stream of other settings; the message names the first.
    """

    def __init__(self, state: Path, settings: Mapping[str, str | None]) -> None:
        self.entries: list[Entry] = []
        """the clients, as they were when the journal was last :meth:`held`"""
        self._file = state / CLIENTS
        self._end = 0
        self._keys: dict[tuple[str, str], int] = {}
        _settle(state, dict(settings))

    @contextmanager
    def held(self) -> Iterator[None]:
        """The journal up to date, and no other process or stream adding to it in the block."""
        import fcntl  # Unix alone has it

        handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._catch_up(handle)
            yield
        finally:
            os.close(handle)

    def _catch_up(self, handle: int) -> None:
        """The lines that were written since, by whomever."""
        size = os.fstat(handle).st_size
        *lines, _ = os.pread(handle, size - self._end, self._end).split(b"\n")
        for line in lines:
            fields = json.loads(line)
            self._take(Entry(**{**fields, "stamp": tuple(fields["stamp"])}))
            self._end += len(line) + 1

    def _take(self, entry: Entry) -> None:
        if entry.key is not None:
            self._keys[entry.key] = len(self.entries)
        self.entries.append(entry)

    def append(self, entry: Entry) -> None:
        """One more client, on the disk when this returns; the journal must be held."""
        line = json.dumps(asdict(entry)).encode() + b"\n"
        with open(self._file, "r+b", buffering=0) as file:
            file.truncate(self._end)
            try:
                file.seek(self._end)
                if file.write(line) != len(line):
                    raise OSError(f"{self._file}: the disk is full")
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._end)
                raise
        self._end += len(line)
        self._take(entry)

    def label(self, index: int) -> str:
        """A client as messages name it."""
        return label(index, self.entries[index].name)

    def find(self, key: tuple[str, str] | None) -> int | None:
        """The index of the client that is known by this, or None."""
        return None if key is None else self._keys.get(key)

    def refuse_known(self, entry: Entry) -> None:
        """Raise AdapterError for a client that is there."""
        there = self.find(entry.key)
        if there is not None:
            who = entry.name if entry.client is None else f"client {entry.client!r}"
            raise AdapterError(
                f"{who} is in this stream already, as {self.label(there)}; nothing was added"
            )


def _settle(state: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new stream, or compare with those of the one that is there."""
    file = state / SETTINGS
    if state.exists() and not state.is_dir():
        raise FileExistsError(f"{state} is a file, expected a folder")
    if not file.is_file():
        if state.is_dir() and any(not x.name.startswith(SETTINGS) for x in state.iterdir()):
            raise FileExistsError(
                f"{state} is not empty and holds no stream; choose another folder for its state"
            )
        state.mkdir(parents=True, exist_ok=True)
        made = state / f"{SETTINGS}.{os.getpid()}"
        made.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        flushed(made)
        made.rename(file)
        flushed(state)
        flushed(state.parent)
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{state} holds a stream of {name} {found.get(name)}, found {value}; "
                "choose another folder for its state"
            )
