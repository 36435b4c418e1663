"""The tasks by name. A new task is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from integration.tasks import stdlib_chapters
from integration.tasks.task import Example, Task, TaskError

__all__ = ["TASKS", "Example", "Task", "TaskError"]

TASKS: dict[str, Callable[..., Task]] = {"stdlib_chapters": stdlib_chapters.load}
"""Name -> loader(test_size=, shared_per_class=, train_size=None); TaskError where it fails."""
