"""rank_pattern and alpha_pattern: the modules whose rank or alpha is not the config's own.

PEFT takes the first key, in the file's order, that matches a module's name or what follows one of
its dots (``peft.utils.other.get_pattern_key``). Where keys overlap, their order is meaning.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any


class Patterns:
    """The keys of one field, each looked at once.

    Keys of letters, digits, underscores and dots, which most are, are found by their text, so that
    thousands of them cost no more than a few. All others are compiled.

    Args:
        patterns: key -> value, as the config has them; None is empty.
    """

    def __init__(self, patterns: Mapping[str, Any] | None) -> None:
        self._values = list((patterns or {}).values())
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._compiled: list[tuple[int, re.Pattern[str]]] = []
        for place, key in enumerate(patterns or {}):
            if _PLAIN.fullmatch(key):
                dots = tuple(index for index, letter in enumerate(key) if letter == ".")
                same = self._plain.setdefault((len(key), dots), {})
                same.setdefault(_without(key, dots), place)
            else:
                self._compiled.append((place, re.compile(whole(key))))

    def value(self, module: str, default: Any) -> Any:
        """The value of the first key that matches, else the default."""
        place = len(self._values)
        for (length, dots), keys in self._plain.items():
            begin = len(module) - length
            if begin < 0 or (begin and module[begin - 1] != "."):
                continue
            place = min(place, keys.get(_without(module[begin:], dots), place))
        for other, pattern in self._compiled:
            if other >= place:
                break
            if pattern.match(module):
                place = other
        return self._values[place] if place < len(self._values) else default


_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


def _without(text: str, dots: Iterable[int]) -> str:
    """The text without some of its letters: in a pattern a dot stands for any."""
    skipped = set(dots)
    return "".join(letter for index, letter in enumerate(text) if index not in skipped)


def whole(pattern: str) -> str:
    """What PEFT makes of a key: it matches the module's name, or what follows one of its dots."""
    return rf"^(?:.*\.)?(?:{pattern})$"


def written(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Keys for the modules whose value is not the usual one: one key for each value.

    No two keys match one module, so their order means nothing.

    Args:
        values: module -> value, for all modules of the adapter.
        usual: the value that the config itself states.
    """
    groups: dict[Any, list[str]] = {}
    for module in sorted(values):
        if values[module] != usual:
            groups.setdefault(values[module], []).append(module)
    lines = "\n".join(sorted(values))
    return {_key(modules, lines): value for value, modules in groups.items()}


def _key(modules: list[str], lines: str) -> str:
    """A key that matches these modules alone, among names of one line each."""
    if len(modules) > 1:
        return f"^(?:{'|'.join(map(re.escape, modules))})"
    (module,) = modules
    try:
        matched = [found[0] for found in re.finditer(whole(module), lines, re.MULTILINE)]
    except re.error:
        matched = []
    return module if matched == modules else "^" + re.escape(module)
