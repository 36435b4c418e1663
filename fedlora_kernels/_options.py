"""Objects that are found by name in a folder of files, and whose fields are their options.

A folder holds one frozen dataclass per file, a subclass of :class:`Named`; its name is that of its
file. A :class:`Registry` reads the folder. torch is imported when an object computes, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_type_hints

N = TypeVar("N", bound="Named")


class Option(NamedTuple):
    """One option."""

    kind: Any
    """its type, as annotated"""
    default: Any
    help: str


def option(default: Any, help: str) -> Any:  # noqa: A002 - what it is called everywhere
    """A field that is an option: its default, and what it means in one sentence."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Named:
    """An object with a name and options."""

    noun: ClassVar[str]
    """what messages call objects of this kind"""
    name: ClassVar[str]
    """its name in the registry: that of its file"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__module__.rpartition(".")[2])

    @classmethod
    def kinds(cls: type[N]) -> Iterator[type[N]]:
        """All subclasses that there are."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()

    @classmethod
    def options(cls) -> Mapping[str, Option]:
        """The options by name."""
        kinds = get_type_hints(cls)
        return {
            item.name: Option(kinds[item.name], item.default, item.metadata["help"])
            for item in fields(cls)
            if "help" in item.metadata and item.default is not MISSING
        }

    @classmethod
    def with_options(cls: type[N], given: Mapping[str, Any]) -> N:
        """The object with these options; raises TypeError for one that it does not have."""
        for name in given:
            if name not in cls.options():
                known = ", ".join(cls.options()) or "none"
                raise TypeError(
                    f"{cls.noun} {cls.name!r} has no option {name!r}; its options: {known}"
                )
        return cls(**given)

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not the default."""
        return {
            name: getattr(self, name)
            for name, known in self.options().items()
            if getattr(self, name) != known.default
        }


class Registry(Generic[N]):
    """The objects of one kind by name, read from the files of a package.

    Args:
        kind: the class of which they are subclasses.
        package: the package's name.
        path: its ``__path__``.
        order: what they are sorted by.
    """

    def __init__(
        self, kind: type[N], package: str, path: Iterable[str], order: Callable[[type[N]], Any]
    ) -> None:
        self._kind = kind
        self.kinds: dict[str, type[N]] = {
            found.name: found
            for found in sorted(
                (
                    found
                    for file in iter_modules(path)
                    if not file.name.startswith("_")
                    for found in vars(import_module(f"{package}.{file.name}")).values()
                    if isinstance(found, type) and issubclass(found, kind) and found is not kind
                ),
                key=order,
            )
        }
        """by name, in this order"""

    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self.kinds)

    def find(self, name: str) -> type[N]:
        """The object of this name, as a class.

        Raises:
            ValueError: there is none; the message lists those that there are.
        """
        if name not in self.kinds:
            expected = ", ".join(self.kinds)
            raise ValueError(f"unknown {self._kind.noun} {name!r}; expected one of {expected}")
        return self.kinds[name]

    def make(self, named: str | N, **options: object) -> N:
        """The object itself, or that of this name with these options.

        Raises:
            ValueError: the name is unknown, or an option is out of range.
            TypeError: there is no such option, or the object already has its options.
        """
        if not isinstance(named, str):
            if options:
                noun, kind = named.noun, type(named).__name__
                raise TypeError(
                    f"options are fields of the {noun}: {kind}({', '.join(options)}=...), "
                    f"found a {noun} and options beside it"
                )
            return named
        return self.find(named).with_options(options)
