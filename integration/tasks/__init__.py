"""What is learned. A task is one file of this folder with a `TASK`; nothing else lists the tasks.

task.py       what a task is, and how its examples are split
tables.py     the rows of data sets
answers.py    what counts as the same answer
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from integration.settings import Settings
from integration.tasks.task import Example, LoadedTask, Task, TaskError

__all__ = ["TASKS", "Example", "LoadedTask", "Task", "TaskError", "find_task", "load_task"]


def read_tasks(folders: Iterable[str]) -> dict[str, Task]:
    """Name -> task, of every file in these folders that has a `TASK`.

    Raises ValueError for two tasks of one name.
    """
    tasks: dict[str, Task] = {}
    for info in iter_modules(list(folders)):
        task = getattr(import_module(f"{__name__}.{info.name}"), "TASK", None)
        if isinstance(task, Task):
            if task.name in tasks:
                raise ValueError(f"two tasks have the name {task.name!r}")
            tasks[task.name] = task
    return tasks


TASKS = read_tasks(__path__)
"""Name -> task."""


def find_task(name: str) -> Task:
    """The task of this name. Raises TaskError for an unknown one."""
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(settings: Settings) -> LoadedTask:
    """The task of a run with its examples. Raises TaskError for an unknown task or option."""
    task = find_task(settings.task)
    return task.load(
        test_size=settings.test_size,
        shared_per_class=settings.shared_per_class,
        train_size=settings.train_size,
        validation_size=settings.validation_size,
        **task.local(settings.data, settings.task_options),
    )
