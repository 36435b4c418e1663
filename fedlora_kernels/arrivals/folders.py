"""Folders: the clients of a rule that needs them again, mapped from where they lie."""

from pathlib import Path

from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE


def stamp(folder: Path) -> tuple[int, ...]:
    """Sizes and times of the last change of an adapter's two files; empty where one is missing."""
    try:
        found = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError:
        return ()
    return tuple(number for item in found for number in (item.st_size, item.st_mtime_ns))


def refuse_changed(folder: Path, expected: tuple[int, ...], who: str) -> None:
    """Raise AdapterError where a folder is not as it was when its client was added."""
    if stamp(folder) != expected:
        what = "has changed" if folder.is_dir() else "is gone"
        raise AdapterError(
            f"{who}: {folder} {what} since the client was added; put it back, or begin a stream "
            "with copy=True, which keeps copies"
        )


def load(folder: Path, name: str | None) -> Adapter:
    """An adapter under the name that messages have for it, and without a source: one folder may
    come again with a client's next adapter, when copies are kept.
    """
    return Adapter.load(folder).named(name)


def refuse_other_scalings(written: Adapter, meant: Adapter, who: str) -> None:
    """Raise AdapterError where a config gives other scalings than the factors have."""
    for module, factors in meant.trained.items():
        found = written.factors[module].scaling
        if found != factors.scaling:
            raise AdapterError(
                f"{who}, module {module}: its config gives the scaling {found:g}, its factors have "
                f"{factors.scaling:g}"
            )
