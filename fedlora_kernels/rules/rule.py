"""Rule: an aggregation rule's description and its function from Grams to coefficients."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_kernels.adapter import Adapter
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.solution import Solution

Solve = Callable[..., list[Solution]]


@dataclass(frozen=True)
class Rule:
    """One rule of the registry."""

    name: str
    title: str
    paper: str
    """arXiv number"""
    solve: Solve
    """(grams of one or more batches, **options) -> one Solution per batch"""
    travels: str
    """what a client sends, in words"""
    exact: str
    """whether the global update equals the ideal one, in words"""
    is_exact: bool
    """True where the error is rounding only"""
    heterogeneous: bool
    """clients may have different ranks"""
    sends: Literal["both", "b", "a"] = "both"
    """the factors a client sends up and receives down"""
    receives: Literal["global", "leading", "own"] = "global"
    """client k gets the global adapter, its leading r_k components, or shared A with its own B"""
    trains: Literal["both", "b"] = "both"
    """the factors a client trains"""
    after: Literal["continue", "merge"] = "continue"
    """how a round goes on by default: from the global adapter, or merged into the base"""
    joint: tuple[str, ...] = ()
    """options under which the modules compete, so that all batches are solved together"""
    validate: Callable[[Sequence[Adapter]], None] | None = None
    """checks that need the factors themselves"""

    @property
    def personal(self) -> bool:
        """Clients keep different models (their own B and heads); there is no merged global one."""
        return self.receives == "own"

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The rule's options with their defaults."""
        parameters = inspect.signature(self.solve).parameters
        return {name: item for name, item in parameters.items() if item.kind is item.KEYWORD_ONLY}

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Raise TypeError for an option the rule does not have."""
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise TypeError(f"rule {self.name!r} has no option {name!r}; its options: {known}")


def equal_rank(grams: Grams, rule: str) -> int:
    """The one rank of all clients, or an AdapterError that names who differs and where."""
    for who, rank in zip(grams.labels, grams.ranks, strict=True):
        if rank != grams.ranks[0]:
            raise unequal_rank(rule, who, grams.modules[0], rank, grams.labels[0], grams.ranks[0])
    return grams.ranks[0]


def unequal_rank(
    rule: str, who: str, module: str, rank: int, whose: str, expected: int
) -> AdapterError:
    """The error of a rule that averages factors of one rank."""
    return AdapterError(
        f"{who}, module {module}: rank {rank}, expected {expected} as in {whose}: {rule} averages "
        "factors of equal rank; use hetlora, flexlora, florist or flora for clients of different "
        "ranks"
    )
