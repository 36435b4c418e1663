"""Measure: times of several ways to one result, side by side, and only if the results are right.

    run = Run(comparison, device, roofline)
    rows = run.measured()

Each way is run once before the rounds, and its output is checked. If a check fails, no time is
reported for that variant. Then rounds follow in which every way runs once, so that a busy moment of
the machine hits all of them; medians of the rounds' ratios are reported. No time is reported for a
variant that raises, nor for a peer that is not finished in time; the other variants keep theirs.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from types import FrameType
from typing import Any

from benchmarks.stand.correctness import Check
from benchmarks.stand.device import Device
from benchmarks.stand.roofline import Roofline, Work
from benchmarks.stand.shapes import NAMES, Case

ROUNDS = (3, 25)
"""Fewest and most rounds of a comparison."""

ONCE_S = 2.0
"""What takes longer is measured once, by its first call."""

BUDGET_S = 3.0
"""Seconds that the rounds of one comparison may take together."""


@dataclass(frozen=True)
class Variant:
    """One way to a result."""

    name: str
    run: Callable[[], Any]
    checks: Callable[[Any], Sequence[Check]]
    work: Work
    """of the task, so that all variants of one task have one floor"""
    source: str = ""
    """whose code or paper it is; empty for this library"""
    note: str = ""
    less: bool = False
    """gives less than the task asks for: shown, but no competitor"""
    facts: Callable[[Any], Mapping[str, Any]] | None = None
    """what else is to be known of an output"""
    before: Callable[[], None] | None = None
    """done untimed before every run"""
    timed: Callable[[], tuple[float, Any]] | None = None
    """runs and takes its own time (in another process, say); returns seconds and the output"""


@dataclass(frozen=True)
class Comparison:
    """Variants of one task on the same inputs; the others are related to the first."""

    stage: str
    case: Case
    variants: tuple[Variant, ...]
    name: str = ""
    """of what is compared, where the case alone does not say it"""


@dataclass(frozen=True)
class Row:
    """One variant, measured or not."""

    stage: str
    comparison: str
    """the case, in words; the same for all rows that were measured side by side"""
    variant: str
    source: str
    less: bool
    model: str
    module: str
    m: int
    n: int
    modules: int
    ranks: str
    stacked_rank: int
    dtype: str
    family: str
    seed: int
    seconds: float | None
    """median over the rounds; None where a check failed or the variant raised"""
    samples: tuple[float, ...]
    """seconds, one per round"""
    times_first: float | None
    """median over the rounds of this variant's time over the first variant's"""
    floor_seconds: float
    share_of_floor: float | None
    gbytes_per_second: float | None
    gflops: float | None
    """10^9 of the counted operations per second"""
    checks: tuple[Mapping[str, Any], ...]
    refused: str = ""
    """why there is no time: the check that failed, or what was raised"""
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Run:
    """The measurement of one comparison."""

    def __init__(
        self,
        comparison: Comparison,
        device: Device,
        roofline: Roofline,
        *,
        rounds: int | None = None,
        budget_s: float = BUDGET_S,
        peers_once_s: float = ONCE_S,
        patience_s: float | None = None,
        keep: Callable[[list[Row]], None] | None = None,
    ) -> None:
        """Run and check every variant once, before the rounds.

        Args:
            comparison: what is measured.
            device: where.
            roofline: the device's.
            rounds: how many; as many as the budget allows when None.
            budget_s: seconds that the rounds may take together.
            peers_once_s: a peer that takes longer is measured once, by its first call.
            patience_s: a peer's call that takes longer is interrupted, and no time is reported for
                that peer; only in a process's main thread.
            keep: gets the rows so far after every variant.
        """
        self.comparison, self.device, self.roofline = comparison, device, roofline
        self._once_s, self._patience_s = min(peers_once_s, ONCE_S), patience_s
        self._samples: dict[str, list[float]] = {}
        self._called: dict[str, float] = {}
        self._raised: dict[str, str] = {}
        self._checks: dict[str, Sequence[Check]] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._once: set[str] = set()
        for variant in comparison.variants:
            self._samples[variant.name] = []
            first = self._attempt(variant, self._checked)
            if first is not None and rounds is None and first > self._only_call_s(variant):
                self._once.add(variant.name)
                self._samples[variant.name] = [first]
            if keep is not None:
                keep(self.rows())
        self.rounds = rounds or self._affordable(budget_s)

    def _checked(self, variant: Variant) -> float:
        """Run, check, and say how long the second call took (the first one, where that is long)."""
        seconds, output = self._timed(variant)
        self._checks[variant.name] = tuple(variant.checks(output))
        self._facts[variant.name] = dict(variant.facts(output)) if variant.facts else {}
        self._called[variant.name] = seconds
        del output
        if seconds > self._only_call_s(variant):
            return seconds
        self._called[variant.name] = self._seconds(variant)
        return self._called[variant.name]

    def _only_call_s(self, variant: Variant) -> float:
        """A first call that takes longer is the variant's only one."""
        return self._once_s if variant.source else ONCE_S

    def _seconds(self, variant: Variant) -> float:
        return self._timed(variant)[0]

    def _attempt(self, variant: Variant, call: Callable[[Variant], float]) -> float | None:
        """What the call returns, or None if it raises: no other variant loses its row to that."""
        try:
            with interrupted(self._patience_s if variant.source else None):
                return call(variant)
        except Exception as problem:  # whatever a peer, a driver or a library raises
            self._raised[variant.name] = f"{type(problem).__name__}: {problem}"
            return None

    def _affordable(self, budget_s: float) -> int:
        repeated = [variant for variant in self.comparison.variants if self._repeats(variant)]
        each = sum(self._attempt(variant, self._seconds) or 0.0 for variant in repeated)
        fewest, most = ROUNDS
        return max(fewest, min(most, int(budget_s / max(each, 1e-9))))

    def _timed(self, variant: Variant) -> tuple[float, Any]:
        if variant.before is not None:
            variant.before()
        return self.device.timed(variant.run) if variant.timed is None else variant.timed()

    def _repeats(self, variant: Variant) -> bool:
        return self.refusal(variant) == "" and variant.name not in self._once

    def refusal(self, variant: Variant) -> str:
        """Why no time is reported for the variant, or nothing."""
        if variant.name in self._raised:
            return self._raised[variant.name]
        red = [check for check in self._checks.get(variant.name, ()) if not check.passed]
        return "; ".join(
            f"{check.quantity} is {check.error:.2e}, allowed {check.tolerance:.0e}" for check in red
        )

    def others(self) -> None:
        """One round of every variant but the first."""
        for variant in self.comparison.variants[1:]:
            self._repeat(variant)

    def first(self) -> None:
        """The same round's first variant."""
        self._repeat(self.comparison.variants[0])

    def _repeat(self, variant: Variant) -> None:
        if not self._repeats(variant):
            return
        seconds = self._attempt(variant, self._seconds)
        if seconds is not None:
            self._samples[variant.name].append(seconds)

    def measured(self) -> list[Row]:
        """All rounds, then the rows."""
        for _ in range(self.rounds):
            self.others()
            self.first()
        return self.rows()

    def rows(self) -> list[Row]:
        """What has been measured so far, of the variants that have been run."""
        return [
            self._row(variant)
            for variant in self.comparison.variants
            if variant.name in self._samples
        ]

    def _row(self, variant: Variant) -> Row:
        case, work = self.comparison.case, variant.work
        refused = self.refusal(variant)
        samples = () if refused else self._times(variant)
        seconds = median(samples) if samples else None
        floor = work.floor(self.roofline)
        leader = self.comparison.variants[0]
        first = () if self.refusal(leader) else self._times(leader)
        note = variant.note
        if variant.name in self._once and not refused:
            note = f"{note}; measured once" if note else "measured once"
        return Row(
            stage=self.comparison.stage,
            comparison=f"{self.comparison.name} {case}".strip(),
            variant=variant.name,
            source=variant.source,
            less=variant.less,
            model=case.model,
            module=case.kinds,
            m=case.m,
            n=case.n,
            modules=case.modules * len(case.parts),
            ranks=case.rank_text,
            stacked_rank=case.stacked_rank,
            dtype=NAMES[case.dtype],
            family=case.family,
            seed=case.seed,
            seconds=seconds,
            samples=tuple(round(sample, 9) for sample in samples),
            times_first=ratio(samples, first),
            floor_seconds=floor,
            share_of_floor=floor / seconds if seconds else None,
            gbytes_per_second=work.bytes / seconds / 1e9 if seconds else None,
            gflops=work.flops / seconds / 1e9 if seconds else None,
            checks=tuple(asdict(check) for check in self._checks.get(variant.name, ())),
            refused=refused,
            note=note,
            facts=self._facts.get(variant.name, {}),
        )

    def _times(self, variant: Variant) -> tuple[float, ...]:
        """The rounds' times; before the first round that of the call before it."""
        called = self._called.get(variant.name)
        return tuple(self._samples[variant.name]) or (() if called is None else (called,))


@contextmanager
def interrupted(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError inside the context after so many seconds; None never does.

    Python's own code is interrupted; a call into a library runs to its end first.
    """
    if seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not finished after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ratio(samples: Sequence[float], first: Sequence[float]) -> float | None:
    """Median of the rounds' ratios, or the ratio of medians where the rounds differ in number."""
    if not samples or not first:
        return None
    if len(samples) != len(first):
        return median(samples) / median(first)
    return median(mine / theirs for mine, theirs in zip(samples, first, strict=True))
