"""Causal language modeling of the running Python's own library sources: perplexity.

An example is one function or class of a pure-Python module, parsed, not imported; its topic is the
chapter of the library reference that the module belongs to.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from integration.tasks.stdlib_chapters import CHAPTERS, sources
from integration.tasks.task import Content, Example, Task, TaskError

MINIMUM_LINES = 4
"""Shorter definitions (`def __len__`) are too much alike to be a test of anything."""

MINIMUM_DEFINITIONS = 1000
"""Fewer mean that the library's sources are not installed."""


def read(*, most_characters: int = 2000) -> Content:
    """Make the task from the running Python; texts are cut to `most_characters`.

    Raises TaskError where the standard library has no sources.
    """
    found = definitions(most_characters)
    if len(found) < MINIMUM_DEFINITIONS:
        raise TaskError(
            f"task stdlib_code: found {len(found)} functions and classes, need "
            f"{MINIMUM_DEFINITIONS}; install the sources of the standard library "
            "(Debian: python3-dev)"
        )
    return Content(tuple(CHAPTERS), found)


def definitions(most_characters: int) -> list[Example]:
    """The outermost functions and classes of the library's modules, without repetitions."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Example] = {}
    for label, modules in enumerate(CHAPTERS.values()):
        for path in (path for module in modules for path in sources(root, module)):
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = text.splitlines(keepends=True)
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    end = int(node.end_lineno or node.lineno)
                    if end - node.lineno + 1 >= MINIMUM_LINES:
                        source = "".join(lines[node.lineno - 1 : end])[:most_characters]
                        found.setdefault(source, Example("", label, completion=source))
    return list(found.values())


TASK = Task("stdlib_code", "language", read)
