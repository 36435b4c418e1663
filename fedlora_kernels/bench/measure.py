"""Measure: times of several ways to one result, side by side, and only if the results are right.

    run = Run(comparison, device, roofline)
    rows = run.measured()

Each way is run once untimed by rounds: its output is checked, and a red check refuses the number.
Then rounds follow in which every way runs once, so that a busy moment of the machine hits all of
them; medians of the rounds' ratios are reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from fedlora_kernels.bench.correctness import Check
from fedlora_kernels.bench.device import Device
from fedlora_kernels.bench.roofline import Roofline, Work
from fedlora_kernels.bench.shapes import NAMES, Case

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
    """One measured (or refused) variant."""

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
    """median over the rounds; None where a check refused it"""
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
    ) -> None:
        self.comparison, self.device, self.roofline = comparison, device, roofline
        self._samples: dict[str, list[float]] = {}
        self._checks: dict[str, Sequence[Check]] = {}
        self._facts: dict[str, Mapping[str, Any]] = {}
        self._once: set[str] = set()
        for variant in comparison.variants:
            first = self._checked(variant)
            if rounds is None and first > ONCE_S:
                self._once.add(variant.name)
                self._samples[variant.name] = [first]
        self.rounds = rounds or self._affordable(budget_s)

    def _checked(self, variant: Variant) -> float:
        """Run, check, and say how long the second call took (the first one, where that is long)."""
        seconds, output = self._timed(variant)
        self._checks[variant.name] = tuple(variant.checks(output))
        self._facts[variant.name] = dict(variant.facts(output)) if variant.facts else {}
        self._samples[variant.name] = []
        del output
        if seconds > ONCE_S:
            return seconds
        return self._timed(variant)[0]

    def _affordable(self, budget_s: float) -> int:
        repeated = [variant for variant in self.comparison.variants if self._repeats(variant)]
        each = sum(self._timed(variant)[0] for variant in repeated)
        fewest, most = ROUNDS
        return max(fewest, min(most, int(budget_s / max(each, 1e-9))))

    def _timed(self, variant: Variant) -> tuple[float, Any]:
        if variant.before is not None:
            variant.before()
        return self.device.timed(variant.run)

    def _repeats(self, variant: Variant) -> bool:
        return self.refusal(variant) == "" and variant.name not in self._once

    def refusal(self, variant: Variant) -> str:
        """Why the variant's number is refused, or nothing."""
        red = [check for check in self._checks[variant.name] if not check.passed]
        return "; ".join(
            f"{check.quantity} is {check.error:.2e}, allowed {check.tolerance:.0e}" for check in red
        )

    def others(self) -> None:
        """One round of every variant but the first."""
        for variant in self.comparison.variants[1:]:
            if self._repeats(variant):
                self._samples[variant.name].append(self._timed(variant)[0])

    def first(self) -> None:
        """The same round's first variant."""
        variant = self.comparison.variants[0]
        if self._repeats(variant):
            self._samples[variant.name].append(self._timed(variant)[0])

    def measured(self) -> list[Row]:
        """All rounds, then the rows."""
        for _ in range(self.rounds):
            self.others()
            self.first()
        return self.rows()

    def rows(self) -> list[Row]:
        """What has been measured so far."""
        return [self._row(variant) for variant in self.comparison.variants]

    def _row(self, variant: Variant) -> Row:
        case, work = self.comparison.case, variant.work
        refused = self.refusal(variant)
        samples = () if refused else tuple(self._samples[variant.name])
        seconds = median(samples) if samples else None
        floor = work.floor(self.roofline)
        leader = self.comparison.variants[0]
        first = () if self.refusal(leader) else self._samples[leader.name]
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
            checks=tuple(asdict(check) for check in self._checks[variant.name]),
            refused=refused,
            note=note,
            facts=self._facts[variant.name],
        )


def ratio(samples: Sequence[float], first: Sequence[float]) -> float | None:
    """Median of the rounds' ratios, or the ratio of medians where the rounds differ in number."""
    if not samples or not first:
        return None
    if len(samples) != len(first):
        return median(samples) / median(first)
    return median(mine / theirs for mine, theirs in zip(samples, first, strict=True))
