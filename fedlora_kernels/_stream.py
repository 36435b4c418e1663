"""Stream: clients that arrive one by one, in bounded memory, durable.

    stream = flk.Stream("florist", state="round-7", energy=0.9)
    stream.add("uploads/site-1", 120)        when it returns, the client is on the disk
    stream.add("uploads/site-2", 80)
    result = stream.result()                 as often as asked for

A process that is killed loses nothing that ``add`` returned for: a new Stream on the same state
goes on.
"""

from pathlib import Path
from typing import Any, NoReturn

import torch

from fedlora_kernels import robust as robust_rules
from fedlora_kernels import rules
from fedlora_kernels._aggregation import Aggregation, refuse_kinds
from fedlora_kernels._delivery import HEADS
from fedlora_kernels._round import Round
from fedlora_kernels.adapters import agreement, extras, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.finite import all_finite
from fedlora_kernels.adapters.kinds import dora
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.arrivals import blocks, durable, folders
from fedlora_kernels.arrivals.journal import Entry, Journal
from fedlora_kernels.arrivals.sums import Sums
from fedlora_kernels.gram_space.batches import ABSENT, stack
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.report import ModuleReport, Report
from fedlora_kernels.robust import Robust
from fedlora_kernels.rules import Rule

MEMORY_LIMIT = 1 << 30
"""Bytes: 1 GiB."""

SHARES = 4
"""Of the limit, what one step takes: what is written, and what it is made from, live together."""


class Stream:
    """The clients of one round, added as they arrive, and the result of those that came.

    A rule that only averages (:attr:`Rule.averages`) keeps running sums in float64 and nothing
    else of a client. Other rules keep the clients, in their folders or as copies, and their Gram
    matrices: the blocks of a new client against those before it are made when it is added. The
    result is that of :func:`aggregate` up to rounding, in whatever order the clients came.

    Several streams, of one process or several, may add to one state.

    Args:
        rule: a rule of ``flk.rules``, or the name of one.
        state: a folder for what is kept; a stream that is there already goes on.
        memory_limit: bytes of memory for sums, Gram matrices and what is made of them; files are
            mapped and do not count. One module is worked on however large it is.
        copy: keep a copy of every client in the state, where the rule needs clients again.
            Otherwise their folders must stay as they are. An adapter in memory is always copied.
        absent: what a client without a module counts as: "zero" or "renormalize", see
            :class:`Round`.
        heads: what becomes of the tensors beside the factors, "average" or "local"; None is the
            rule's own way, see :meth:`Round.aggregate`. Only heads that are averaged must agree.
        device: where the work is done; where the adapters are when None.
        same_base: see :class:`Round`.
        magnitudes: "average" admits DoRA, see :class:`Round`; None refuses it.
        robust: a robust rule of ``flk.robust``, or the name of one, that weighs the clients that
            came before each result, see :meth:`Round.weighed`. It needs the clients, so not with a
            rule of which only sums are kept.
        **options: of a rule given by name, see ``flk.rules.find(name).options()``.

    Raises:
        ValueError: the rule is unknown, an option is out of range, the state is of a stream of
            another rule, options, ``absent``, ``heads``, ``magnitudes`` or ``robust``; or
            ``robust`` does not go with the rule.
        TypeError: the rule has no such option.
        FileExistsError: the state is a file, or a folder of other things.
    """

    def __init__(
        self,
        rule: str | Rule,
        *,
        state: str | Path,
        memory_limit: int = MEMORY_LIMIT,
        copy: bool = False,
        absent: str = "zero",
        heads: str | None = None,
        device: torch.device | str | None = None,
        same_base: bool = False,
        magnitudes: str | None = None,
        robust: str | Robust | None = None,
        **options: Any,
    ) -> None:
        self.rule = rules.make(rule, **options)
        """the rule with its options"""
        if absent not in ABSENT:
            raise ValueError(f"absent must be one of {', '.join(ABSENT)}, found {absent!r}")
        if memory_limit < 1:
            raise ValueError(f"memory_limit must be at least 1 byte, found {memory_limit}")
        self.robust = None if robust is None else robust_rules.make(robust)
        """the robust rule with its options"""
        if self.robust is not None:
            self.robust.refuse(self.rule)
            if self.rule.averages:
                raise ValueError(
                    f"a stream of rule {self.rule.name!r} keeps only sums, and robust rule "
                    f"{self.robust.name!r} needs the inner products of all clients; use aggregate "
                    "or Round with robust=, or a rule that does not only average"
                )
        self._heads = heads or self.rule.heads
        if self._heads not in HEADS:
            raise ValueError(f"heads must be one of {', '.join(HEADS)}, found {heads!r}")
        self._state = Path(state).resolve()
        self._memory_limit, self._copy = memory_limit, copy
        self._absent, self._device, self._magnitudes = absent, device, magnitudes
        self._same_base = same_base
        self._room = max(1, memory_limit // SHARES)
        settings = {
            "rule": repr(self.rule),
            "absent": absent,
            "heads": self._heads,
            "magnitudes": magnitudes,
            "robust": None if self.robust is None else repr(self.robust),
        }
        self._journal = Journal(self._state, settings)
        self._clients: list[Adapter] = []
        """of a rule that needs them again, mapped; as many as were asked for"""
        with self._journal.held():
            pass

    def __len__(self) -> int:
        """How many clients the stream has."""
        with self._journal.held():
            return len(self._journal.entries)

    def __contains__(self, client: object) -> bool:
        """Whether a client is known by this name (``client=``), or as this folder."""
        with self._journal.held():
            names = (("client", str(client)), ("folder", str(Path(str(client)).resolve())))
            return any(self._journal.find(name) is not None for name in names)

    def add(
        self, adapter: Adapter | str | Path, weight: float = 1.0, *, client: str | int | None = None
    ) -> None:
        """One client more. When this returns, the client is on the disk.

        Args:
            adapter: the client's adapter, or its PEFT folder.
            weight: the client's weight (its number of examples, say).
            client: what the client is known by; its folder when None. An adapter in memory without
                it counts as new.

        Raises:
            AdapterError: the client is in the stream already, cannot be read, does not belong
                to those before it, or cannot be aggregated by this rule. The stream is as before.
        """
        folder = adapter.source if isinstance(adapter, Adapter) else Path(adapter).resolve()
        name = adapter.name if isinstance(adapter, Adapter) else str(adapter)
        if client is not None:
            name = str(client)
        with self._journal.held():
            index = len(self._journal.entries)
            who = label(index, name)
            where = None if folder is None else str(folder)
            entry = Entry(
                None if client is None else str(client),
                where,
                name,
                agreement.checked(weight, who),
            )
            self._journal.refuse_known(entry)
            if self.rule.averages:
                self._add_to_sums(entry, adapter, index, who)
            else:
                self._add_beside(entry, adapter, index, who)

    def result(
        self,
        *,
        carried: Any = None,
        uniform_rank: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Aggregation:
        """The aggregate of the clients that came so far; more may be added afterwards.

        The arguments are those of :meth:`Round.aggregate`. Of a rule that only averages, no client
        is kept: the report has ranks alone (and NaN), and ``result.delivery.received(client)``
        takes the place of ``result.client_adapter(k)``.

        Raises:
            AdapterError: no clients, or all weights are zero; the clients cannot be aggregated
                by this rule; a folder changed since it was added; the result's dtype cannot hold
                the result.
        """
        settings: dict[str, Any] = {
            "carried": carried,
            "uniform_rank": uniform_rank,
            "dtype": dtype,
            "heads": self._heads,
        }
        with self._journal.held():
            entries = list(self._journal.entries)
            if self.rule.averages:
                mean = self._sums().mean(self.rule, self._absent, dtype)
                round_ = Round(
                    [mean],
                    absent=self._absent,
                    device=self._device,
                    magnitudes=self._magnitudes,
                )
                return Averaged(round_.aggregate(self.rule, **settings))
            clients = self._kept()
        if not entries:
            agreement.normalized(None, clients)
        for index, entry in enumerate(entries):
            if entry.stamp:
                assert entry.folder is not None
                folders.refuse_changed(Path(entry.folder), entry.stamp, self._journal.label(index))
        return blocks.Arrived(
            clients,
            weights=[entry.weight for entry in entries],
            blocks=[self._blocks(index) for index in range(len(entries))],
            memory_limit=self._memory_limit,
            scratch=self._state,
            absent=self._absent,
            device=self._device,
            same_base=self._same_base,
            magnitudes=self._magnitudes,
        ).aggregate(self.rule, robust=self.robust, **settings)

    def _refuse_stranger(self, before: Adapter | None, client: Adapter, who: str) -> None:
        """Refuse a client that does not belong to those before it, or that the rule cannot
        aggregate.

        Raises:
            AdapterError: names the client and the module.
        """
        _refuse_non_finite(client, who)
        pair = [client.named(_NEW)]
        if before is not None:
            pair.insert(0, before.named(_BEFORE))
        try:
            agreement.check(pair, same_base=self._same_base)
            dora.check(pair, self._magnitudes, renormalizes=self._absent == "renormalize")
            if self._heads == "average":
                extras.check(pair)
            refuse_kinds(pair, self.rule)
            self.rule.validate(pair)
            if client.trained:
                for batch in stack(pair, torch.ones(len(pair), dtype=torch.float64)):
                    if not self.rule.heterogeneous:
                        self.rule.equal_rank(Grams(batch))
        except AdapterError as error:
            said = str(error).replace(label(len(pair) - 1, _NEW), who)
            raise AdapterError(said.replace(label(0, _BEFORE), "the clients before it")) from None

    # ---- a rule that only averages -------------------------------------------------------------

    def _add_to_sums(
        self, entry: Entry, adapter: Adapter | str | Path, index: int, who: str
    ) -> None:
        loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        sums = self._sums()
        self._refuse_stranger(sums.before(self.rule), loaded, who)
        made = self._state / f"sums.{index + 1}"
        sums.plus(loaded, entry.weight, self.rule, made, self._room, who, heads=self._heads)
        self._journal.append(entry)
        durable.cleared(other for other in self._state.glob("sums.*") if other != made)

    def _sums(self) -> Sums:
        count = len(self._journal.entries)
        return Sums.read(self._state / f"sums.{count}") if count else Sums()

    # ---- a rule that needs its clients again ---------------------------------------------------

    def _add_beside(
        self, entry: Entry, adapter: Adapter | str | Path, index: int, who: str
    ) -> None:
        """The client, where it lies or copied, and its Gram blocks against those before."""
        clients = self._kept()
        in_place = not (self._copy or isinstance(adapter, Adapter))
        if in_place:
            assert entry.folder is not None
            for other, known in enumerate(self._journal.entries):
                if known.stamp and known.folder == entry.folder:
                    raise AdapterError(
                        f"{who} is the same folder as {self._journal.label(other)}; a stream with "
                        "copy=True keeps copies"
                    )
            entry = Entry(**{**vars(entry), "stamp": folders.stamp(Path(entry.folder))})
        loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        self._refuse_stranger(_together(clients), loaded, who)
        if not in_place:
            with durable.made(self._copies(index)) as place:
                loaded.write(place)
            try:
                written = Adapter.load(self._copies(index))
            except AdapterError as error:  # of an adapter that was never in a folder
                found = str(error).replace(str(self._copies(index)), who)
                raise AdapterError(found) from None
            folders.refuse_other_scalings(written, loaded, who)
            loaded = written
        loaded = loaded.named(entry.name)
        with durable.made(self._blocks(index)) as place:
            row = blocks.row(loaded, clients, device=self._device, room=self._room)
            durable.write_tensors(place, row, self._room)
        self._journal.append(entry)
        self._clients.append(loaded)

    def _kept(self) -> list[Adapter]:
        """The clients, mapped."""
        for index in range(len(self._clients), len(self._journal.entries)):
            entry = self._journal.entries[index]
            where = self._copies(index)
            if entry.stamp:
                assert entry.folder is not None
                where = Path(entry.folder)
                folders.refuse_changed(where, entry.stamp, self._journal.label(index))
            self._clients.append(folders.load(where, entry.name))
        return list(self._clients)

    def _copies(self, index: int) -> Path:
        return self._state / "clients" / str(index)

    def _blocks(self, index: int) -> Path:
        return self._state / "blocks" / str(index)


class Averaged(Aggregation):
    """The result of a stream that kept sums and no clients."""

    note = "the clients were not kept, so no errors and norms are known"

    def __init__(self, of_the_mean: Aggregation) -> None:
        super().__init__(of_the_mean.delivery, (), of_the_mean.curve, of_the_mean._work)

    @property
    def report(self) -> Report:
        """Module -> its rank; every other number is NaN, since the clients were not kept."""
        unknown = float("nan")
        return Report(
            {
                module: ModuleReport(rank, unknown, unknown, unknown, unknown)
                for module, rank in sorted(self.adapter.ranks.items())
            }
        )

    def client_adapter(self, k: int) -> NoReturn:
        """Refused: the stream did not keep the client.

        Raises:
            AdapterError: always; the message says what to use.
        """
        raise AdapterError(
            f"client {k}: this stream keeps sums, not clients; "
            "use result.delivery.received(client) with the client's adapter"
        )


def _together(clients: list[Adapter]) -> Adapter | None:
    """The first client's tensors, and the modules that it lacks as the first has them that does."""
    if not clients:
        return None
    factors = {}
    for other in reversed(clients):
        factors.update(other.trained)
    first = clients[0]
    config = first.config
    for other in clients:
        config = peft_format.completed(config, other.config)
    return Adapter(factors, config, extras=first.extras, vera=first.vera)


_NEW, _BEFORE = "\0new", "\0before"
"""how the checks of a pair call the two, until the message is put together"""


def _refuse_non_finite(client: Adapter, who: str) -> None:
    """Files were looked at when they were read; tensors in memory are looked at here."""
    for module, pair in client.trained.items():
        if pair.version == pair.finite_at:
            continue
        for name, tensor in pair.tensors.items():
            if not all_finite(tensor):
                raise AdapterError(f"{who}, module {module}: {name} holds NaN or Inf")
    for name, tensor in client.averaged().items():
        if not all_finite(tensor):
            raise AdapterError(f"{who}, tensor {name}: holds NaN or Inf")
