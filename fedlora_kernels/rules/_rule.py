"""Rule: what an aggregation rule states about itself, and its function from Grams to coefficients.

A rule is a frozen dataclass in a file of its own. Its fields are its options, made by
:func:`option`; its class attributes say what travels under it; ``solve`` answers one batch.
Everybody else (registry, command line, harness, tables) asks the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedlora_kernels._options import Named, Option, option
from fedlora_kernels.adapters.error import AdapterError

if TYPE_CHECKING:
    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels._processes import Processes
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.adapters.factors import Factors
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


__all__ = ["Option", "Rule", "at_least_one", "option"]


@dataclass(frozen=True)
class Rule(Named):
    """An aggregation rule. Subclasses live in ``rules/<name>.py``."""

    noun = "rule"
    title: ClassVar[str]
    paper: ClassVar[str]
    """arXiv number, or a DOI"""
    published: ClassVar[str] = ""
    """year and month, 2507 say, where ``paper`` is a DOI"""
    travels: ClassVar[str] = "A and B"
    """what a client sends, in words"""
    exact: ClassVar[str]
    """how the global update stands to the ideal one, in words"""
    heterogeneous: ClassVar[bool] = False
    """clients may have different ranks"""
    sends: ClassVar[Literal["both", "b", "a"]] = "both"
    """the factors a client sends up, and receives down where ``returns`` says nothing else"""
    returns: ClassVar[Literal["both", "b", "a", "as sent"]] = "as sent"
    """the factors a client receives"""
    receives: ClassVar[Literal["global", "leading", "own"]] = "global"
    """client k gets the global adapter, its leading r_k components, or shared A with its own B"""
    trains: ClassVar[Literal["both", "b", "alternate"]] = "both"
    """the factors a client trains; "alternate" is B in odd rounds, A in even ones"""
    after: ClassVar[Literal["continue", "merge"]] = "continue"
    """what a round starts from by default: the global adapter, or the base with it merged in"""
    residual: ClassVar[bool] = False
    """of a rule that merges: only a residual is merged, and clients go on from the adapter"""
    separable: ClassVar[bool] = False
    """each factor is averaged by itself, so that one held fixed comes out as it went in"""
    of_holders: ClassVar[bool] = False
    """a mean is over the clients that have the module; the others do not count there"""
    bounded: ClassVar[bool] = False
    """:meth:`widest` is a bound; the rank itself depends on the data"""
    preferred: ClassVar[bool] = False
    """the command line takes this rule where none is named"""
    personal: ClassVar[bool]
    """clients keep different models (their own B and heads); there is no merged global one"""
    combination: ClassVar[str] = ""
    """what PEFT calls it, as a ``combination_type`` of add_weighted_adapter; may be empty"""
    aggregates: ClassVar[tuple[str, ...]] = ("LORA",)
    """the adapter kinds that it can aggregate, as PEFT's peft_type"""

    @classmethod
    def start(cls) -> str:
        """What the next round starts from, in words."""
        if cls.personal:
            return "each client's own adapter"
        if cls.residual:
            return "the global adapter; its residual is merged into the base"
        return "the base, merged" if cls.after == "merge" else "the global adapter"

    @classmethod
    def link(cls) -> str:
        """The address of the paper."""
        return (
            f"https://doi.org/{cls.paper}"
            if cls.published
            else f"https://arxiv.org/abs/{cls.paper}"
        )

    @classmethod
    def comes_back(cls) -> str:
        """The factors a client receives: "both", "b" or "a"."""
        return cls.sends if cls.returns == "as sent" else cls.returns

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.personal = cls.receives == "own"

    def solve(self, grams: Grams) -> Solution:
        """The coefficients of one batch of modules.

        Raises:
            AdapterError: the clients cannot be aggregated by this rule; names client and module.
        """
        raise NotImplementedError(f"rule {self.name!r} defines no solve()")

    @property
    def note(self) -> str:
        """What the reader of a report must know beside its numbers, in a sentence; may be empty."""
        return ""

    @property
    def averages(self) -> bool:
        """Whether the result is nothing but the weighted means of the clients' factors, by the
        weights as given. A mean of means is the mean of all, so running sums are enough for it.
        """
        return False

    @property
    def reweighs(self) -> bool:
        """Whether clients count by something else than their weights, of which only 0 matters."""
        return False

    @property
    def merging(self) -> Rule | None:
        """How a node of a tree of servers merges its clients into one (:func:`merge`): the rule
        after which this rule makes of the nodes' results, by their summed weights, what it makes of
        all clients. None where the result depends on more of the clients than a node could keep.
        """
        return None

    # ---- what depends on all modules -----------------------------------------------------------

    @property
    def joint(self) -> bool:
        """Whether a module's coefficients depend on the others, so that every batch is read before
        one can be solved.
        """
        return False

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """Where :attr:`joint`, what :meth:`knowing` needs of one batch, by the modules' names or by
        any other name. Notes of one name, of several batches, are added up by ``+``.

        Processes that share the modules out send each other their notes, so that these should be
        small, and their sum the same in any order.
        """
        raise NotImplementedError(f"rule {self.name!r} defines no noted()")

    def knowing(self, notes: Mapping[str, Any]) -> Rule:
        """Where :attr:`joint`, the rule that knows the notes of all batches, sorted by name."""
        raise NotImplementedError(f"rule {self.name!r} defines no knowing()")

    def prepared(self, every: Iterable[Grams], processes: Processes | None = None) -> Rule:
        """Where :attr:`joint`, the rule with what it needs to know of all batches.

        Args:
            every: the batches; those of this process.
            processes: with whom the modules are shared; one process when None.

        Raises:
            AdapterError: the clients cannot be aggregated by this rule; names client and module.
        """
        from fedlora_kernels._processes import Processes

        together = processes or Processes()
        own: dict[str, Any] = {}
        notes: dict[str, Any] = {}
        with together.alike():
            _add(own, map(self.noted, every))
        _add(notes, together.everywhere(own))
        return self.knowing(dict(sorted(notes.items())))

    def validate(self, adapters: Sequence[Adapter]) -> None:
        """Checks that need the factors themselves.

        Raises:
            AdapterError: names the client and the module.
        """

    # ---- memory between rounds -----------------------------------------------------------------

    def joins(self, carried: Any) -> Sequence[tuple[Adapter, float]]:
        """What a rule with memory adds to the round: adapters with their weights, beside the
        clients' normalized ones. ``carried`` is what :meth:`carry` returned, None at first.

        Raises:
            TypeError: something is carried, and the rule has no memory.
        """
        if carried is not None:
            raise TypeError(f"rule {self.name!r} has no memory, found carried={carried!r}")
        return ()

    def recalled(self, carried: Any) -> Rule:
        """The rule with what else it needs to know of ``carried``, the number of rounds say."""
        return self

    def carry(self, result: Aggregation) -> Any:
        """What the next round's ``carried`` is: None for a rule without memory."""
        return None

    # ---- what others ask -----------------------------------------------------------------------

    @property
    def heads(self) -> Literal["average", "local"]:
        """What becomes of the tensors beside the factors (heads, biases) where the caller does
        not say: each client keeps its own under a personal rule, else they are averaged.
        """
        return "local" if self.personal else "average"

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """The rank of what travels down for one module, a residual included.

        Args:
            ranks: of the clients, r_k.
            size: (m, n) of the module.
        """
        return max(ranks)

    def equal_rank(self, grams: Grams) -> None:
        """Refuse clients of different ranks; what a rule with memory joins may have any.

        Raises:
            AdapterError: names who differs and where.
        """
        for who, rank in zip(grams.labels, grams.batch.client_ranks, strict=False):
            if rank != grams.ranks[0]:
                raise self.unequal_rank(
                    who, grams.modules[0], rank, grams.labels[0], grams.ranks[0]
                )

    def carried_rank(self, grams: Grams) -> None:
        """Refuse a carried adapter of another rank than the clients'.

        Raises:
            AdapterError: names the module.
        """
        if grams.ranks[-1] != grams.ranks[0]:
            raise AdapterError(
                f"{grams.labels[-1]}, module {grams.modules[0]}: rank {grams.ranks[-1]}, expected "
                f"{grams.ranks[0]} as in {grams.labels[0]}; leave carried= out"
            )

    def common_a(self, adapters: Sequence[Adapter]) -> None:
        """Refuse clients whose A differs from the first client's (they trained or drew their own).

        Raises:
            AdapterError: names the client, the module and the client it differs from.
        """
        first: dict[str, Factors] = {}
        for adapter in adapters:
            for module, factors in adapter.factors.items():
                owner = first.setdefault(module, factors)
                if owner is not factors and not factors.same_a(owner):
                    self._refuse_other_a(adapters)

    def _refuse_other_a(self, adapters: Sequence[Adapter]) -> None:
        """Say which A differs: a rank, anywhere, before an entry."""
        from fedlora_kernels.adapters.peft_format import label

        def who(index: int) -> str:
            return label(index, adapters[index].name)

        first: dict[str, int] = {}
        shared = [
            (index, owner, module)
            for index, adapter in enumerate(adapters)
            for module in adapter.factors
            if (owner := first.setdefault(module, index)) != index
        ]
        for index, owner, module in shared:
            rank, common = (adapters[k].factors[module].rank for k in (index, owner))
            if rank != common:
                raise self.unequal_rank(who(index), module, rank, who(owner), common)
        for index, owner, module in shared:
            if not adapters[index].factors[module].same_a(adapters[owner].factors[module]):
                raise AdapterError(
                    f"{who(index)}, module {module}: A differs from {who(owner)}'s; {self.name} "
                    "expects one fixed A in all clients (only B is trained)"
                )

    def unequal_rank(
        self, who: str, module: str, rank: int, whose: str, expected: int
    ) -> AdapterError:
        """The error of a rule that averages factors of one rank."""
        *some, last = (kind.name for kind in Rule.kinds() if kind.heterogeneous)
        return AdapterError(
            f"{who}, module {module}: rank {rank}, expected {expected} as in {whose}: {self.name} "
            f"averages factors of equal rank; use {', '.join(some)} or {last} for clients of "
            "different ranks"
        )


def _add(notes: dict[str, Any], more: Iterable[Mapping[str, Any]]) -> None:
    for found in more:
        for name, note in found.items():
            notes[name] = notes[name] + note if name in notes else note


def at_least_one(**values: int | None) -> None:
    """Raise ValueError for an option that is given and under 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
