"""Aggregation: one rule at work on a round, a batch at a time, and what comes of it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fedlora_kernels._delivery import Delivery
from fedlora_kernels._processes import Processes
from fedlora_kernels.adapters import extras, folder, peft_format
from fedlora_kernels.adapters.adapter import WRITTEN, Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.finite import finite
from fedlora_kernels.adapters.kinds import dora, vera
from fedlora_kernels.adapters.kinds.embedding import EMBEDDING
from fedlora_kernels.adapters.kinds.kind import Kind
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.gram_space.batches import Batch
from fedlora_kernels.gram_space.coefficients import Coefficients, Mixture, Side, Solution
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.report import (
    CurvePoint,
    ModuleReport,
    Report,
    Swept,
    curve,
    report,
    swept,
)
from fedlora_kernels.robust import Weighing
from fedlora_kernels.rules import Rule

if TYPE_CHECKING:
    from fedlora_kernels._round import Round


class Aggregation:
    """The result of one aggregation."""

    note: str | None = None
    """what the report cannot say, if anything"""

    def __init__(
        self, delivery: Delivery, clients: Sequence[Adapter], curve: list[CurvePoint], work: "Work"
    ) -> None:
        self.delivery = delivery
        """what travels back to the clients"""
        self.clients = clients
        """the adapters that were aggregated"""
        self.curve = curve
        """FLoRIST's rank against error, one point per entry of ``energies``"""
        self._work = work

    @property
    def kept(self) -> Adapter | None:
        """What the server keeps for the next round, where the rule has memory of that kind."""
        return self._work.kept

    @property
    def rule(self) -> Rule:
        """The rule with its options."""
        return self.delivery.rule

    @property
    def adapter(self) -> Adapter:
        """The global adapter (FedSA: the shared A, with B = 0)."""
        return self.delivery.adapter

    @property
    def residual(self) -> Adapter | None:
        """What the clients merge into the base beside the adapter, of a rule with a residual."""
        return self.delivery.residual

    @cached_property
    def unmerged(self) -> Adapter:
        """The whole update as one adapter, for a base that nothing should be merged into: the
        global adapter's factors and the residual's side by side.

        Raises:
            AdapterError: the adapter's dtype cannot hold them under one scaling; names the module.
        """
        if self.residual is None:
            return self.adapter
        rest = self.residual.factors
        factors = {
            name: item.plus(rest[name]) if name in rest else item
            for name, item in self.adapter.factors.items()
        }
        for name, item in factors.items():
            if not finite([item.b, item.a]):
                raise AdapterError(
                    f"module {name}: adapter and residual together overflow {item.b.dtype}; give "
                    "a wider dtype= (--dtype)"
                )
        config = _ranked(self.adapter.config, factors, rslora=False)
        return Adapter(factors, config, extras=self.adapter.extras)

    @property
    def heads(self) -> str:
        """Whether the tensors beside the factors were averaged, or stay with their clients."""
        return self.delivery.heads

    @property
    def recalled(self) -> Any:
        """What the last round had carried, as this one was given it."""
        return self._work.carried

    @cached_property
    def carried(self) -> Any:
        """What the next round takes as ``carried``: None for a rule without memory."""
        return self.rule.carry(self)

    @property
    def weighing(self) -> Weighing | None:
        """How much each client counted, where a robust rule weighed them."""
        return self._work.weighing

    @cached_property
    def report(self) -> Report:
        """Module -> rank, energy, relative_error, svd_floor.

        Where a robust rule weighed the clients, the ideal update is that of its weights.

        Computed when first asked for. Rules that only average compute no Gram matrices; theirs are
        computed then, in one more pass over the clients' adapters.

        Raises:
            AdapterError: a client's tensor was changed in place since; names client and module.
        """
        return self._work.report()

    @property
    def shared(self) -> dict[str, Tensor]:
        """The state that travels back to every client."""
        return self.delivery.returned(self.adapter)

    def client_adapter(self, k: int) -> Adapter:
        """What client k receives, ready to run: see :meth:`Delivery.received`.

        Raises:
            AdapterError: the client's dtype cannot hold the update at the client's own scaling.
        """
        client = self.clients[k]
        return self.delivery.received(client, label(k, client.name))

    @property
    def bytes_up(self) -> list[int]:
        """Bytes that client k sent."""
        return list(map(self.delivery.bytes_up, self.clients))

    @property
    def bytes_down(self) -> list[int]:
        """Bytes that client k receives, a residual included."""
        return list(map(self.delivery.bytes_down, self.clients))

    def save(self, path: str | Path) -> None:
        """Write the global adapter as a PEFT folder, with report.json beside it, residual/ for
        a rule that has one, and clients/K/ where clients receive different adapters; all in one
        step.

        Raises:
            FileExistsError: the path is a file, or a non-empty folder that is no adapter.
        """
        with folder.replaced(Path(path), WRITTEN) as made:
            self.adapter.write(made)
            described: dict[str, Any] = {"rule": self.rule.name}
            if note := self.note or self.report.note:
                described["note"] = note
            if self.weighing is not None:
                described["robust"] = self.weighing.as_dict()
            described["modules"] = self.report.as_dict()
            text = json.dumps(described, indent=2)
            (made / "report.json").write_text(text + "\n", encoding="utf-8")
            if self.residual is not None:
                (made / "residual").mkdir()
                self.residual.write(made / "residual")
            if self.delivery.differs:
                for k in range(len(self.clients)):
                    (made / "clients" / str(k)).mkdir(parents=True)
                    self.client_adapter(k).write(made / "clients" / str(k))


class Elsewhere(Aggregation):
    """The result of an aggregation, in a process of a group that does not have it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __getattr__(self, name: str) -> NoReturn:
        """Refused: nothing of the result is here.

        Raises:
            RuntimeError: always; the message says where it is.
        """
        raise RuntimeError(
            f"the result is in process 0 of the group, and this is process {self._rank}: use it "
            "where torch.distributed.get_rank(group) is 0"
        )


class Work:
    """One rule at work on a round: a batch at a time in, the result out.

    Args:
        round_: the clients.
        rule: what to do with them.
        carried, uniform_rank, dtype, heads: see :meth:`Round.aggregate`.

    Raises:
        AdapterError: the rule cannot aggregate these clients.
        ValueError: heads is unknown, or the rule does not use the weights of the round's robust
            rule.
    """

    def __init__(
        self,
        round_: "Round",
        rule: Rule,
        carried: Any,
        *,
        uniform_rank: bool,
        dtype: torch.dtype | None,
        heads: str | None,
    ) -> None:
        self._round, self._rule = round_, rule
        self._uniform_rank, self._dtype = uniform_rank, dtype
        self._heads = heads or rule.heads
        clients = round_.clients
        refuse_kinds(clients, rule)
        if round_.weighing is not None:
            round_.weighing.robust.refuse(rule)
        rule.validate(round_.own)
        if self._heads == "average":
            extras.check(clients)
        more = rule.joins(carried)
        self.joined = round_.joined(more) if more else None
        """the batches with what the rule carried over from the last round, if anything"""
        self.carried = carried
        """what the last round carried"""
        self._prepared = rule.recalled(carried)
        self._factors: dict[str, Factors] = {}
        self._residuals: dict[str, Factors] = {}
        self._kept: dict[str, Factors] = {}
        self._swept: list[dict[float, Swept]] = []
        self._averaged = True
        """whether all factors are averages of the clients' factors"""
        self._reports: list[Report | tuple[Grams, Solution | None]] = []
        """of each batch the rows, or what it takes to compute them"""

    @property
    def weighing(self) -> Weighing | None:
        """How much each client counts, where a robust rule weighed them."""
        return self._round.weighing

    @property
    def reads(self) -> bool:
        """Whether there are batches to take: VeRA's vectors are averaged as they are."""
        return not self._round.clients[0].vera

    def prepare(self, processes: Processes) -> None:
        """What the rule must know of all batches before it can solve one."""
        if self._rule.joint:
            self._prepared = self._prepared.prepared(self._round.read(self.joined), processes)

    def take(self, grams: Grams) -> None:
        """One batch: the rule's coefficients, then its factors, and the rows of the report where
        the Gram matrices that they need will not be kept.
        """
        grams.batch.refuse_changes()
        solution = self._prepared.solve(grams)
        aside = self._round.put_aside
        made = _factors(grams.batch, solution.adapter, self._rule.comes_back(), self._dtype)
        self._factors.update(aside(dict(made)))
        self._averaged &= isinstance(solution.adapter, Mixture)
        if solution.residual is not None:
            made = _factors(grams.batch, solution.residual, "both", self._dtype)
            self._residuals.update(aside(dict(made)))
        if solution.kept is not None:  # errors add up over the rounds: float32 at least
            wide = torch.promote_types(grams.batch.dtype, torch.float32)
            self._kept.update(aside(dict(_factors(grams.batch, solution.kept, "both", wide))))
        if solution.sweep:
            self._swept.append(swept(grams, solution))
        if not grams.computed:
            self._reports.append((grams, None))
        elif self._round.keeps(grams):
            self._reports.append((grams, solution))
        else:
            self._reports.append(report(grams, solution))

    @property
    def kept(self) -> Adapter | None:
        """What solutions keep for the next round."""
        if not self._kept:
            return None
        config = _config(self._round.clients, self._kept, rslora=False)
        return Adapter(dict(sorted(self._kept.items())), peft_format.headless(config))

    def gather(self, processes: Processes) -> None:
        """What all processes made, and their rows of the report, in process 0."""
        if processes.alone:
            return
        with processes.alike():
            self._reports = [self._rows()]
        for made in (self._factors, self._residuals, self._kept):
            for name, pair in processes.gathered(made):
                made.update(self._round.put_aside({name: pair}))
        for rank, (sweep, averaged, reports) in enumerate(
            processes.everywhere((self._swept, self._averaged, self._reports))
        ):
            if processes.first and rank > 0:
                self._swept += sweep
                self._averaged &= averaged
                self._reports += reports

    def report(self) -> Report:
        """The rows of all modules, by name."""
        rows = {**_unreported(self._round.clients), **self._rows()}
        complete = Report(sorted(rows.items()))
        notes = (self._rule.note, *_notes(self._round.clients, self._rule))
        complete.note = "; ".join(filter(None, notes))
        complete.weighing = self._round.weighing
        return complete

    def _rows(self) -> Report:
        """The rows of the modules that were taken, of VeRA those of all that have factors."""
        rows = Report()
        for item in self._reports or [(grams, None) for grams in self._round.grams]:
            if isinstance(item, Report):
                rows.update(item)
                continue
            grams, solution = item
            rows.update(report(grams, solution or self._prepared.solve(grams)))
            grams.batch.forget()
            if not self._round.keeps(grams):
                grams.forget()
        return rows

    def result(self) -> Aggregation:
        """The global adapter of all batches that were taken."""
        rule, clients = self._rule, self._round.clients
        known = {name: item.kind for client in clients for name, item in client.trained.items()}
        tied = peft_format.tied(
            clients[0].config,
            self._factors,
            {name for name, kind in known.items() if kind == EMBEDDING},
        )
        made = self._with_biases()
        if dora.used(clients) and not rule.personal:  # there they stay with B
            made = dora.averaged(made, clients, self._round.weights)
        factors = _finished(made, known, self._uniform_rank, tied)
        average = self._heads == "average"
        beside = extras.average(clients, self._round.weights) if average else {}
        residual = None
        if self._residuals:
            rest = _finished(self._residuals, known, self._uniform_rank, tied)
            residual = Adapter(rest, peft_format.headless(_config(clients, rest, rslora=False)))
        if clients[0].vera:
            config = clients[0].config if beside else peft_format.headless(clients[0].config)
            adapter = Adapter(
                {},
                config,
                vera=vera.mean(clients, self._round.weights),
                extras={**beside, **vera.projections(clients[0])},
            )
        else:
            flags = {bool(client.config.get("use_rslora")) for client in clients}
            config = _config(clients, factors, rslora=self._averaged and flags == {True})
            if not average and any(client.extras for client in clients):  # they stay there
                config = peft_format.headless(config)
            adapter = Adapter(factors, config, extras=beside)
        delivery = Delivery(rule, adapter, residual, self._heads)
        return Aggregation(delivery, clients, curve(self._swept), self)

    def _with_biases(self) -> dict[str, Factors]:
        """The factors, with sum_k w_k s_k bias_k over their own scaling where clients have biases;
        a module without one adds zeros. A bias is of B: where clients keep their B, theirs stays.
        """
        clients, made = self._round.clients, self._factors
        known = (item for client in clients if made for item in client.factors.values())
        if all(item.bias is None for item in known):
            return made
        biased, weights = {}, self._round.weights.tolist()
        for name, item in made.items():
            total = item.b.new_zeros(item.b.shape[0], dtype=torch.float64)
            weight = 0.0
            for client, share in zip(self._round.counted, weights, strict=True):
                own = client.factors.get(name)
                if own is None:
                    continue
                weight += share
                if own.bias is not None:
                    total += share * own.scaling * own.bias.to(total)
            if self._round.renormalizes and weight > 0:
                total /= weight
            if self._rule.personal or item.scaling == 0:
                total = torch.zeros_like(total)
            bias = (total / (item.scaling or 1.0)).to(item.b.dtype)
            biased[name] = replace(item, bias=bias)
            if not finite([bias]):
                raise AdapterError(
                    f"module {name}: the mean of lora_bias overflows {item.b.dtype}; give a "
                    "wider dtype= (--dtype)"
                )
        return biased


def refuse_kinds(clients: Sequence[Adapter], rule: Rule) -> None:
    """Refuse adapters of a kind that the rule cannot aggregate."""
    for index, client in enumerate(clients):
        if client.vera and "VERA" not in rule.aggregates:
            able = [kind.name for kind in Rule.kinds() if "VERA" in kind.aggregates]
            raise AdapterError(
                f"{label(index, client.name)}: VeRA vectors, which rule {rule.name!r} cannot "
                f"aggregate; use {', '.join(able)}"
            )
        if dora.used([client]) and rule.after == "merge":
            able = [kind.name for kind in Rule.kinds() if kind.after != "merge"]
            raise AdapterError(
                f"{label(index, client.name)}: found DoRA, and rule {rule.name!r} adds updates to "
                "the base, which with DoRA rescales the whole weight instead; use "
                f"{', '.join(able)}"
            )


def _notes(clients: Sequence[Adapter], rule: Rule) -> Iterator[str]:
    """What a report says of the clients' adapters."""
    if dora.used(clients):
        yield dora.NOTE
    if clients[0].vera and clients[0].factors:
        yield (
            "VeRA: PEFT cuts the projection to each module's input width, which the file does not "
            "tell; norms and errors count its full width, and are too large for narrower modules"
        )
    if rule.after == "merge":
        for index, client in enumerate(clients):
            if client.quantized is not None:
                yield (
                    f"{label(index, client.name)}, {client.quantized}: merging into a quantized "
                    "base rounds the update; merge into a copy in 16 or 32 bits, or keep the "
                    "update as an adapter beside the base (result.unmerged)"
                )


def _unreported(clients: Sequence[Adapter]) -> Report:
    """Rows of VeRA modules whose projections were not saved: the rank is all that is known."""
    unknown = math.nan
    return Report(
        {
            module: ModuleReport(rank, unknown, unknown, unknown, unknown)
            for module, rank in ({} if clients[0].trained else clients[0].ranks).items()
        }
    )


def _factors(
    batch: Batch, part: Coefficients, sends: str, dtype: torch.dtype | None
) -> Iterator[tuple[str, Factors]]:
    """combine | weighted_sum over the batch, each module cut to its own rank (at least 1)."""
    if dtype is not None:  # summed in a dtype that holds both, rounded once
        batch = replace(batch, dtype=torch.promote_types(batch.dtype, dtype))
    b_g, a_g = part.factors(batch, sends)
    if dtype is not None:
        b_g, a_g = ([factor.to(dtype) for factor in side] for side in (b_g, a_g))
    computed = part.computed(sends)
    for name, side in (("b", b_g), ("a", a_g)):
        is_computed = computed in ("both", name)
        if is_computed or dtype is not None:
            _refuse_overflow(batch, side)
        # The others are zero or copies: what was sent is looked at, unless that was done before.
        if not (is_computed or batch.seen_finite):
            sent = batch.list_b if name == "b" else batch.list_a
            if not finite(sent):
                batch.refuse_non_finite()
    ranks, scalings = part.ranks.tolist(), part.scaling.tolist()
    for module, rank, scaling, b, a in zip(batch.modules, ranks, scalings, b_g, a_g, strict=True):
        if rank < a.shape[0]:
            b, a = b[:, : max(1, rank)].contiguous(), a[: max(1, rank)].contiguous()
        yield module, Factors(b, a, scaling)


def _refuse_overflow(batch: Batch, factors: Side) -> None:
    """A finite sum has finite terms; only where the sum is not, look for what is at fault."""
    if finite((factors,) if isinstance(factors, Tensor) else factors):
        return
    for module, factor in zip(batch.modules, factors, strict=True):
        if not bool(factor.isfinite().all()):
            batch.refuse_non_finite()
            raise AdapterError(
                f"module {module}: the aggregate overflows {factor.dtype}; "
                "give a wider dtype= (--dtype)"
            )


def _finished(
    made: Mapping[str, Factors], known: Mapping[str, Kind], uniform_rank: bool, tied: Set[str]
) -> dict[str, Factors]:
    """By name, each of its kind; with one rank and one scaling for all that share these: everything
    where that was asked for, the parameters of one module of experts; and one rank for modules
    that a loader ties.

    Raises:
        AdapterError: a scaling folded into B overflows its dtype.
    """
    finished = {
        name: item if item.kind == known[name] else replace(item, kind=known[name])
        for name, item in sorted(made.items())
    }
    groups: dict[str | None, list[str]] = {}
    for name, item in finished.items():
        group = None if uniform_rank else item.kind.group(name)
        if uniform_rank or group is not None:
            groups.setdefault(group, []).append(name)
    for names in groups.values():
        scalings = {finished[name].scaling for name in names}
        common = scalings.pop() if len(scalings) == 1 else 1.0
        widest = max(finished[name].rank for name in names)
        for name in names:
            item = finished[name]
            if item.scaling != common:
                item = item.rescaled(common)
                if not finite([item.b]):
                    raise AdapterError(
                        f"module {name}: B times its scaling {finished[name].scaling:g} overflows "
                        f"{item.b.dtype}; give a wider dtype= (--dtype)"
                    )
            finished[name] = item.padded(widest)
    of_tied = [name for name in tied if name in finished]
    for name in of_tied:
        finished[name] = finished[name].padded(max(finished[other].rank for other in of_tied))
    return finished


def _config(
    clients: Sequence[Adapter], factors: Mapping[str, Factors], *, rslora: bool
) -> peft_format.Config:
    configs = [client.config for client in clients]
    targets = [name for name, item in factors.items() if item.kind.targeted]
    beside = {
        "lora_bias": any(item.bias is not None for item in factors.values()),
        "use_dora": any(item.magnitude is not None for item in factors.values()),
    }
    stated = {
        field: found
        for field, found in beside.items()
        if found or any(field in config for config in configs)
    }
    return _ranked(
        {**peft_format.merged(configs), **stated},
        factors,
        rslora=rslora,
        targets=None
        if all(client.factors.keys() == factors.keys() for client in clients)
        and peft_format.same_targets(configs, targets)
        else targets,
    )


def _ranked(
    start: peft_format.Config,
    factors: Mapping[str, Factors],
    *,
    rslora: bool,
    targets: Sequence[str] | None = None,
) -> peft_format.Config:
    """A config with the factors' ranks and scalings, see :func:`peft_format.result_config`."""
    named = [(key, item) for name, item in factors.items() for key in item.kind.named(name)]
    return peft_format.result_config(
        start,
        {key: item.rank for key, item in named},
        {key: item.scaling for key, item in named},
        rslora,
        targets=targets,
    )
