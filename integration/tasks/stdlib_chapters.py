"""Which chapter of the library reference does a documentation string belong to?

The texts are the first paragraphs of the documentation strings of the running Python's standard
library; the class of a text is the chapter of its module. Pure-Python modules are parsed, not
imported, so making the task has no side effects (no `import this`, no window, no thread). Modules
written in C have no source: the harmless ones in `COMPILED` are imported, the rest are left out.

On Python 3.11: 4,051 strings; in a test split of 640 of them the largest chapter has 0.29, and a
linear probe on the frozen all-MiniLM-L6-v2 with all training strings reaches 0.77.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from integration.tasks.task import Content, Example, Task, TaskError

CHAPTERS: dict[str, tuple[str, ...]] = {
    chapter: tuple(modules.split())
    for chapter, modules in {
        "text": "string re sre_parse sre_compile difflib textwrap unicodedata stringprep codecs "
        "encodings locale gettext pprint reprlib shlex csv str",
        "data types": "collections _collections_abc heapq bisect array weakref enum datetime "
        "_pydatetime calendar zoneinfo dict list set",
        "mathematics": "_pydecimal fractions statistics random numbers math cmath int float "
        "complex",
        "files": "os pathlib posixpath ntpath genericpath shutil tempfile glob fnmatch filecmp "
        "fileinput linecache stat tarfile zipfile gzip bz2 lzma zlib",
        "concurrency": "asyncio threading multiprocessing concurrent subprocess queue sched "
        "selectors select",
        "internet": "http urllib smtplib imaplib ftplib poplib socketserver socket ssl xmlrpc "
        "webbrowser ipaddress email mailbox wsgiref nntplib telnetlib cgi",
        "testing": "unittest doctest pdb bdb trace traceback timeit profile pstats tracemalloc "
        "faulthandler logging",
        "language": "inspect importlib pkgutil zipimport modulefinder runpy ast dis tokenize "
        "symtable pickletools pyclbr typing",
    }.items()
}
"""Chapter -> modules. A module that this Python lacks (nntplib from 3.13 on) is passed over."""

COMPILED = frozenset({"array", "cmath", "faulthandler", "math", "select", "unicodedata", "zlib"})
"""Modules without Python source whose import does nothing but define names."""

PER_MODULE = 150
"""At most so many strings of one module, so that no chapter is one module (asyncio has 300)."""

MINIMUM_WORDS = 4
"""Shorter paragraphs ("Return self.") say nothing about their chapter."""

MINIMUM_STRINGS = 2000
"""Fewer mean that the library's sources are not installed."""

KEY_WORDS = 20
"""Texts that agree in so many leading words are one text: the model reads little more."""


def read() -> Content:
    """Make the task from the running Python.

    Raises TaskError where the standard library has no sources (a frozen or stripped Python).
    """
    classes = tuple(CHAPTERS)
    return Content(
        classes, [Example(text, classes.index(chapter)) for text, chapter in strings().items()]
    )


def strings() -> Mapping[str, str]:
    """Text -> chapter, without repetitions; parsed once in a process.

    A text that several modules of one chapter share is kept once; one that several chapters share
    ("Return the size in bytes.") has no right answer and is dropped.
    """
    return parse(Path(sysconfig.get_paths()["stdlib"]))


@cache
def parse(root: Path) -> Mapping[str, str]:
    """`strings` of the library in this folder."""
    found: dict[str, tuple[str, str]] = {}
    ambiguous: set[str] = set()
    for chapter, modules in CHAPTERS.items():
        for module in modules:
            taken = 0
            for text in _paragraphs(root, module):
                key = " ".join(re.findall(r"\w+", text.lower())[:KEY_WORDS])
                if key in found:
                    if found[key][1] != chapter:
                        ambiguous.add(key)
                elif taken < PER_MODULE:
                    found[key] = (text, chapter)
                    taken += 1
    kept = {text: chapter for key, (text, chapter) in found.items() if key not in ambiguous}
    if len(kept) < MINIMUM_STRINGS:
        raise TaskError(
            f"task stdlib_chapters: found {len(kept)} documentation strings under {root}, need "
            f"{MINIMUM_STRINGS}; install the sources of the standard library (Debian: python3-dev)"
        )
    return MappingProxyType(kept)


def _paragraphs(root: Path, module: str) -> Iterator[str]:
    """First paragraphs of the module's documentation strings, of MINIMUM_WORDS words or more."""
    found = sources(root, module)
    documented = _parsed(found) if found else _imported(module)
    for documentation in documented:
        paragraph = " ".join(inspect.cleandoc(documentation).split("\n\n")[0].split())
        if len(paragraph.split()) >= MINIMUM_WORDS:
            yield paragraph


def sources(root: Path, module: str) -> list[Path]:
    """The module's source files in a fixed order, without the tests that some packages carry."""
    if (file := root / f"{module}.py").is_file():
        return [file]
    return [
        path
        for path in sorted((root / module).rglob("*.py"))
        if not {"test", "tests"} & set(path.relative_to(root).parts)
    ]


def _parsed(found: list[Path]) -> Iterator[str]:
    for path in found:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and (documentation := ast.get_docstring(node, clean=False)):
                yield documentation


def _imported(module: str) -> Iterator[str]:
    """Documentation of a built-in type (`str`) or of a module in COMPILED that this Python has."""
    holders: list[object] = []
    if isinstance(built_in := getattr(builtins, module, None), type):
        holders.append(built_in)
    elif module in COMPILED:
        try:
            holders.append(importlib.import_module(module))
        except ImportError:
            return
    for holder in holders:
        for name, member in sorted(vars(holder).items()):
            if isinstance(member, type) and member.__module__ == module:
                holders.append(member)
            documentation = getattr(member, "__doc__", None)
            if not name.startswith("__") and callable(member) and isinstance(documentation, str):
                yield documentation


TASK = Task("stdlib_chapters", "classification", read)
