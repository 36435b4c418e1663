"""The progress of a training, told by transformers' Trainer: a bar on a terminal, else lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback


class StepBar:
    """A context in which `callback` shows how many of `steps` steps are done, and the loss."""

    def __init__(self, title: str, steps: int, console: Console) -> None:
        self._title = title
        self._steps = steps
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task(title, total=steps)
        self.callback = _Tells(self)

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def at(self, step: int) -> None:
        """So many steps are done."""
        self._progress.update(self._bar, completed=step)

    def show(self, step: int, loss: float) -> None:
        """The loss of the last steps."""
        self._progress.update(self._bar, description=f"{self._title} {loss:.3f}")
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: step {step} of {self._steps}, loss {loss:.3f}")


class _Tells(TrainerCallback):  # type: ignore[misc]
    def __init__(self, bar: StepBar) -> None:
        self._shown = bar

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        self._shown.at(state.global_step)

    def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._shown.show(state.global_step, float(logs["loss"]))
