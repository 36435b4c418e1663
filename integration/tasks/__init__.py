"""The tasks by name. A new task is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING

from integration.tasks import (
    arithmetic,
    competition_math,
    glue,
    gsm8k,
    instructions,
    programs,
    stdlib_chapters,
    stdlib_code,
)
from integration.tasks.task import Example, Task, TaskError

if TYPE_CHECKING:
    from integration.settings import Settings

__all__ = ["TASKS", "Example", "Task", "TaskError", "load_task"]

TASKS: dict[str, Callable[..., Task]] = {
    "stdlib_chapters": stdlib_chapters.load,
    "stdlib_code": stdlib_code.load,
    "arithmetic": arithmetic.load,
    "glue": glue.load,
    "gsm8k": gsm8k.load,
    "math": competition_math.load,
    "programs": programs.load,
    "dolly": instructions.dolly,
    "alpaca_gpt4": instructions.alpaca_gpt4,
    "instructions": instructions.load,
}
"""Name -> loader(test_size=, shared_per_class=, train_size=None, **options); TaskError where it
fails. Loaders of data sets pass the sizes on to `Table.task`."""


def load_task(settings: Settings) -> Task:
    """The task of a run. Raises TaskError for an unknown task or option."""
    if settings.task not in TASKS:
        raise TaskError(f"unknown task {settings.task!r}; known: {', '.join(TASKS)}")
    load = TASKS[settings.task]
    sizes = {
        "test_size": settings.test_size,
        "shared_per_class": settings.shared_per_class,
        "train_size": settings.train_size,
    }
    parameters = signature(load).parameters.values()
    known = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY and x.name not in sizes]
    for name in settings.task_options:
        if name not in known:
            raise TaskError(
                f"task {settings.task} has no option {name!r}; its options: "
                f"{', '.join(known) or 'none'}"
            )
    return load(**sizes, **settings.task_options)
