"""Peer: what a user would run instead of this library, with where it comes from and its check.

    PEER = Peer("numpy average", "Flower ...", prepare, check)

A peer answers one kind of task (``stand/tasks.py``). It has a file in ``benchmarks/peers/``, and
the suites whose tasks it answers name it. What ``prepare`` does is not timed; the call that it
returns is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.stand.correctness import Check
from benchmarks.stand.measure import Variant
from benchmarks.stand.roofline import Work


class Task(Protocol):
    """What is asked of this library and of its peers alike."""

    @property
    def work(self) -> Work:
        """What every answer must at least move and compute."""


Asked = TypeVar("Asked", bound=Task)


@dataclass(frozen=True)
class Prepared:
    """One peer, ready to answer one task."""

    run: Callable[[], Any]
    before: Callable[[], None] | None = None
    """done untimed before every run"""
    note: str = ""
    facts: Callable[[Any], Mapping[str, Any]] | None = None
    """what else is to be known of an answer"""


@dataclass(frozen=True)
class Peer(Generic[Asked]):
    """Another way to a task's answer."""

    name: str
    source: str
    """whose code or paper it is"""
    prepare: Callable[[Asked], Prepared]
    check: Callable[[Asked, Any], Sequence[Check]]
    """what must hold of an answer before its time is reported"""
    less: bool = False
    """gives less than the task asks for: shown, but no competitor"""
    answers: Callable[[Asked], bool] = lambda task: True
    """whether it can answer the task here: its package is installed, its dtype exists"""

    def variant(self, task: Asked) -> Variant:
        """The peer as one variant of a comparison."""
        prepared = self.prepare(task)
        return Variant(
            self.name,
            prepared.run,
            lambda found: self.check(task, found),
            task.work,
            self.source,
            prepared.note,
            self.less,
            prepared.facts,
            prepared.before,
        )


def variants(task: Asked, peers: Sequence[Peer[Asked]]) -> tuple[Variant, ...]:
    """The variants of those peers that can answer the task here."""
    return tuple(peer.variant(task) for peer in peers if peer.answers(task))
