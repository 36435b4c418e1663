"""Programs in the formats of MBPP (arXiv 2108.07732) and HumanEval (arXiv 2107.03374).

With `run_code = true` the accuracy is pass@1: every program that the model writes is run with its
tests, in a process of its own without the user's environment, for at most TIMEOUT seconds and
MEMORY bytes. That stops accidents, not attacks: without the option nothing is run and the accuracy
is that of the next tokens.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from integration.tasks.tables import Row, Table, sentence
from integration.tasks.task import CARDS, Content, Example, Published, Task, TaskError

PASSED = 93
"""What a program returns that came to the end of its tests: exit() returns 0 before it, too."""

TIMEOUT = 5
MEMORY = 1 << 30


def read(
    *,
    source: str = "google-research-datasets/mbpp",
    test_source: str = "",
    run_code: bool = False,
) -> Content:
    """Read a data set with the columns of MBPP (text, code, test_list) or of HumanEval (prompt,
    canonical_solution, test, entry_point); TaskError where it is not there or has others.

    `test_source` is where the test split comes from: HumanEval has no other, so one trains on MBPP.
    """
    table = Table.read(source, test_source=test_source or None)
    right = passes if run_code else None
    return table.content(("programs",), _example, right=right)


def _example(row: Row) -> Example:
    """Of a row in either format."""
    if row.keys() >= {"prompt", "canonical_solution", "test", "entry_point"}:
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        return Example(
            str(row["prompt"]), 0, completion=str(row["canonical_solution"]), answer=tests
        )
    if row.keys() >= {"text", "code", "test_list"}:
        tests = "\n".join(str(test) for test in row["test_list"])
        prompt = f'"""\n{row["text"]}\n{tests}\n"""\n'
        return Example(prompt, 0, completion=str(row["code"]), answer=tests)
    raise TaskError(
        f"task programs: a row has the columns {', '.join(sorted(row))}; expected text, code and "
        "test_list, or prompt, canonical_solution, test and entry_point"
    )


def passes(example: Example, text: str) -> bool:
    """Whether the prompt with the text behind it passes the example's tests."""
    code = f"{example.text}{text}\n\n{example.answer}\nraise SystemExit({PASSED})\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_bytes(code.encode("utf-8", "replace"))
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(program)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def _row(draw: Random, place: int, _: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": sentence(draw, 8),
        "code": f"def f{place}():\n    return {place}",
        "test_list": [f"assert f{place}() == {place}"],
    }


TASK = Task(
    "programs",
    "language",
    read,
    published={"": Published((374,), 500, CARDS + "mbpp/README.md")},
    row=_row,
)
