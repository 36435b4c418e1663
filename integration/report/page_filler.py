"""Text between the marks of a markdown page, made anew by a program; for benchmarks/ too.

    <!-- NAME ARGUMENTS -->
    what the filler NAME makes of ARGUMENTS
    <!-- end -->

Marks of other names, and comments that are no marks, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Filler = Callable[[str], str]
"""arguments -> text"""

END = "<!-- end -->"


def fill(page: str, fillers: Mapping[str, Filler]) -> str:
    """The page with the text between the marks of these names replaced.

    Raises ValueError where the page has no such mark, or a mark without its end.
    """
    parts: list[str] = []
    done = 0
    for mark in _marks(page, fillers):
        stop = page.find(END, mark.end())
        following = _pattern(fillers).search(page, mark.end())
        if stop < 0 or (following is not None and following.start() < stop):
            raise ValueError(f"{mark[0]} lacks its {END}")
        text = fillers[mark[1]](mark[2].strip()).strip("\n")
        parts += [page[done : mark.end()], f"\n\n{text}\n\n"]
        done = stop
    if not parts:
        names = " or ".join(f"<!-- {name} ... -->" for name in fillers)
        raise ValueError(f"the page has no mark {names}")
    return "".join([*parts, page[done:]])


def arguments(page: str, name: str) -> list[str]:
    """The arguments of every mark of this name."""
    return [mark[2].strip() for mark in _marks(page, [name])]


def _marks(page: str, names: Mapping[str, object] | list[str]) -> list[re.Match[str]]:
    return list(_pattern(names).finditer(page))


def _pattern(names: Mapping[str, object] | list[str]) -> re.Pattern[str]:
    return re.compile(rf"<!-- ({'|'.join(map(re.escape, names))})(?= )([^>]*?) -->")
