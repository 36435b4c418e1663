"""Every comparison of the everyday suites under pytest-benchmark.

    python -m pytest benchmarks --benchmark-only [-k "flows and MiniLM"] [--results DIR]

The same as ``python -m benchmarks.run``, for who wants pytest-benchmark's tables and files.
"""

from benchmarks.conftest import Compare
from benchmarks.stand.suite import Suite


def test_suite(suite: Suite, label: str, compare: Compare) -> None:
    compare(suite, label)
