"""Causal language modeling of the running Python's own library sources: perplexity.

An example is one function or class of a pure-Python module, parsed, not imported; its topic is the
chapter of the library reference that the module belongs to.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from integration.tasks.stdlib_chapters import CHAPTERS, sources
from integration.tasks.task import Example, Task, TaskError, split

MINIMUM_LINES = 4
"""Shorter definitions (`def __len__`) are too much alike to be a test of anything."""


def load(
    *,
    test_size: int,
    shared_per_class: int = 0,
    train_size: int | None = None,
    most_characters: int = 2000,
) -> Task:
    """Make the task from the running Python; texts are cut to `most_characters`.

    Raises TaskError where the standard library has no sources.
    """
    found = definitions(most_characters)
    if len(found) < 10 * test_size // 9:
        raise TaskError(
            f"task stdlib_code: found {len(found)} functions and classes, too few for test_size "
            f"{test_size}; are the sources of the standard library installed?"
        )
    return split(
        "stdlib_code",
        tuple(CHAPTERS),
        found,
        test_size=test_size,
        train_size=train_size,
        kind="language",
    )


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
