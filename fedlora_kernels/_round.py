"""Round: the clients of one round, checked once, and what rules read of them, read once.

    round = flk.Round(clients, weights=[120, 80, 300])
    florist, flexlora = round.aggregate([flk.rules.FLoRIST(energy=0.9), "flexlora"])
    round.inspect().modules[name].sigma
    round.weighed("krum").aggregate("florist")

load -> stack -> gram -> rule (spectrum + rank | surrogate | nothing) -> combine -> report

Batches of modules are the outermost loop, so memory does not grow with the layers. Each step is
taken when something needs its result: a rule that only averages computes no Gram matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakSet

import torch

from fedlora_kernels import robust as robust_rules
from fedlora_kernels import rules
from fedlora_kernels._aggregation import Aggregation, Elsewhere, Work
from fedlora_kernels._inspect import ENERGIES, Inspection, inspection
from fedlora_kernels._processes import Processes
from fedlora_kernels.adapters import agreement
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.kinds import dora
from fedlora_kernels.adapters.peft_format import label
from fedlora_kernels.adapters.scratch import mapped
from fedlora_kernels.gram_space.batches import Batch, stack
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.updates import Updates, of_modules, products
from fedlora_kernels.gram_space.wide import grams_of
from fedlora_kernels.ops import checks
from fedlora_kernels.robust import Robust, Weighing
from fedlora_kernels.rules import Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KEPT = 1 << 28
"""Bytes of Gram matrices and spectra that a round keeps, 256 MiB; others are computed anew."""

LIVE = 12
"""So many arrays of a batch's G_B, at most, live while the batch is worked on."""


class Round:
    """The clients of one round.

    Args:
        adapters: the K clients, or their PEFT folders; they are not changed, and must not be while
            the round is in use.
        weights: the clients' weights (numbers of examples, say), scaled to sum to 1; equal when
            None.
        absent: what a client without a module counts as: "zero", a zero update, or "renormalize",
            as if it were not there.
        device: where the work is done; where the adapters are when None.
        precision: "exact" (float64 accumulation) or "fast" (float32 with promotion).
        same_base: whether the clients have one base model whatever their configs call it, local
            paths for example.
        magnitudes: "average" admits DoRA: the rule aggregates the directions, of which the report
            tells the errors, and the magnitudes become their mean; None refuses it.
        memory_limit: bytes of memory for the matrices and results of the modules that are worked on
            together, which are as few as it takes; files are mapped and do not count. Results are
            written to unnamed files as they are made, and mapped. One module is worked on however
            large it is. No limit when None.
        scratch: folder for those files; the system's temporary folder when None.
        group: a torch.distributed process group (gloo for factors on CPUs, NCCL for factors on
            GPUs) whose processes share the modules out. All of them make the same calls with the
            same arguments. Of clients given as folders each reads its own modules alone, so that
            every file is read once by all together.

    Raises:
        AdapterError: what the clients sent does not belong together; names client and module. In a
            group all processes raise what one of them found.
        ConnectionError: a process of the group ended, or did not answer within its timeout.
        ValueError: absent, precision or magnitudes is unknown, or memory_limit is under 1.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter | str | Path],
        *,
        weights: Sequence[float] | None = None,
        absent: str = "zero",
        device: torch.device | str | None = None,
        precision: str = "exact",
        same_base: bool = False,
        magnitudes: str | None = None,
        memory_limit: int | None = None,
        scratch: str | Path | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        self._processes = Processes(group)
        with self._processes.alike():
            if memory_limit is not None and memory_limit < 1:
                raise ValueError(f"memory_limit must be at least 1 byte, found {memory_limit}")
            self._memory_limit, self._scratch = memory_limit, scratch
            self.clients = tuple(
                adapter
                if isinstance(adapter, Adapter)
                else Adapter.load(adapter, numbers=self._processes.alone)
                for adapter in adapters
            )
            self.weighing: Weighing | None = None
            """how the clients count, where a robust rule weighed them"""
            self.weights = agreement.normalized(weights, self.clients)
            """w_k [K] float64"""
            agreement.check(self.clients, same_base=same_base)
            dora.check(self.clients, magnitudes, renormalizes=absent == "renormalize")
            checks.precision(precision)
            self._absent, self._device, self._precision = absent, device, precision
            self.renormalizes = absent == "renormalize"
            """whether clients without a module count as if they were not there"""
            self._made: WeakSet[Grams] = WeakSet()
            if not self.clients[0].vera:  # of VeRA, factors are made only for who asks for them
                _ = self.grams

    @cached_property
    def grams(self) -> list[Grams]:
        """The batches of modules, each with the Gram matrices that it computes on demand; of the
        modules that this process works on.
        """
        return self._stacked(self.clients, self.weights)

    @property
    def own(self) -> tuple[Adapter, ...]:
        """The clients, with the modules that this process works on."""
        if self._processes.alone or self.clients[0].vera:
            return self.clients
        modules = {module for grams in self.grams for module in grams.modules}
        return tuple(client.part(modules) for client in self.clients)

    @overload
    def aggregate(self, rule: str | Rule, **more: Any) -> Aggregation: ...

    @overload
    def aggregate(self, rule: Sequence[str | Rule], **more: Any) -> list[Aggregation]: ...

    def aggregate(
        self,
        rule: str | Rule | Sequence[str | Rule],
        *,
        carried: Any = None,
        uniform_rank: bool = False,
        dtype: torch.dtype | None = None,
        heads: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        robust: str | Robust | None = None,
        **options: Any,
    ) -> Aggregation | list[Aggregation]:
        """Combine the clients' adapters by one rule, or by several that share every Gram matrix.

        Args:
            rule: a rule (``flk.rules.FLoRIST(energy=0.9)``) or the name of one; a sequence of them
                gives a list of results.
            carried: ``result.carried`` of the last round, for a rule with memory.
            uniform_rank: one r and one lora_alpha tell the whole update, for servers that ignore
                PEFT's rank_pattern and alpha_pattern: every module is padded with zeros to one
                rank, and different scalings are folded into B.
            dtype: of the result's factors; the clients' own when None.
            heads: what becomes of the tensors beside the factors (modules_to_save, biases):
                "average", or "local" (they stay with their clients); None is the rule's own way,
                "local" where clients keep different models, else "average".
            progress: called after every group of modules with the number of modules that are done
                and that of all; in a group, of this process's modules.
            robust: a robust rule of ``flk.robust``, or the name of one, that weighs the clients
                first: see :meth:`weighed`.
            **options: of a rule given by name, see ``flk.rules.find(name).options()``.

        Raises:
            AdapterError: what the clients sent cannot be aggregated by this rule, and the message
                names the client and the module; or the result's dtype cannot hold the result.
            ValueError: the rule is unknown, an option is out of range, or the robust rule's weights
                do not reach this rule.
            TypeError: the rule has no such option.
            ConnectionError: a process of the group ended, or did not answer within its timeout.

        In a group process 0 has the results, with their reports, and ``carried`` is that of process
        0. Whatever is asked of a result in another process is a RuntimeError.
        """
        several = [rule] if isinstance(rule, (str, Rule)) else rule
        carried = self._processes.from_first(carried)
        with self._processes.alike():
            chosen = [rules.make(item, **options) for item in several]
            guard = None if robust is None else robust_rules.make(robust)
            if guard is not None:
                for item in chosen:  # before any work is done
                    guard.refuse(item)
        results: list[Aggregation]
        if guard is not None:
            results = self.weighed(guard).aggregate(
                chosen,
                carried=carried,
                uniform_rank=uniform_rank,
                dtype=dtype,
                heads=heads,
                progress=progress,
            )
            return results if several is rule else results[0]
        with self._processes.alike():
            works = [
                Work(self, item, carried, uniform_rank=uniform_rank, dtype=dtype, heads=heads)
                for item in chosen
            ]
        for work in works:
            work.prepare(self._processes)
        with self._processes.alike():
            reading = [work for work in works if work.reads]
            sharing = [work for work in reading if work.joined is None]
            passes = [(None, sharing), *((work.joined, [work]) for work in reading if work.joined)]
            todo = [(every, together) for every, together in passes if together]
            total = sum(len(g.modules) for every, _ in todo for g in every or self.grams)
            done = 0
            for every, together in todo:
                for grams in self.read(every):
                    for work in together:
                        work.take(grams)
                    done += len(grams.modules)
                    if progress is not None:
                        progress(done, total)
        for work in works:
            work.gather(self._processes)
        with self._processes.alike():
            results = [work.result() for work in works if self._processes.first]
        if not self._processes.first:
            results = [Elsewhere(self._processes.rank) for _ in works]
        return results if several is rule else results[0]

    @cached_property
    def updates(self) -> Updates:
        """The clients' updates as points, from their inner products over all modules.

        Raises:
            AdapterError: as :attr:`Grams.matrices` does, or a squared norm overflows float64.
        """
        every: Iterable[Grams] = self.grams
        if self._precision != "exact":  # a distance is a small difference of large Gram entries
            every = (grams_of(grams.batch) for grams in self.grams)
        with self._processes.alike():
            own = products(self.read(every), len(self.clients))
        return Updates.summed(self._processes.everywhere(own), self._labels)

    def client_products(self) -> dict[str, torch.Tensor]:
        """Module -> ``<dW_j, dW_k>`` of the clients' updates of this module, [K,K] float64 on the
        CPU; 0 where a client lacks the module. In a group, of all processes' modules.
        """
        found: dict[str, torch.Tensor] = {}
        with self._processes.alike():
            for grams in self.read():
                of_each = of_modules(grams, len(self.clients))
                found.update(zip(grams.modules, (x.clone() for x in of_each), strict=True))
        every = {name: x for part in self._processes.everywhere(found) for name, x in part.items()}
        return dict(sorted(every.items()))

    def weighed(self, robust: str | Robust, **options: Any) -> "Round":
        """The same clients as a robust rule weighs them, from the inner products of their updates.

        The Gram matrices that this round keeps serve the other one, too. An aggregation rule that
        computes Gram matrices has the inner products for nothing; one that only averages, or joins
        a carried adapter to the clients, takes one more pass over the adapters, and so does every
        one with ``precision="fast"``. What clients send beside their updates (heads, biases, the
        magnitudes of DoRA) is not looked at.

        Args:
            robust: a robust rule (``flk.robust.Krum(attackers=2)``) or the name of one.
            **options: of a robust rule given by name.

        Raises:
            AdapterError: there are too few clients for the robust rule, or their updates are not
                known (VeRA vectors without projections).
            ValueError: the robust rule is unknown, or an option is out of range; or this round was
                weighed already.
            TypeError: the robust rule has no such option.
        """
        chosen = robust_rules.make(robust, **options)
        if self.weighing is not None:
            raise ValueError(f"this round was weighed already, by {self.weighing.robust.name}")
        for who, client in zip(self._labels, self.clients, strict=True):
            if client.vera and not client.factors:
                raise AdapterError(
                    f"{who}: VeRA vectors without their projections, so its update is not known; "
                    "save adapters with save_projection=True, or leave robust out"
                )
        names = [client.name or who for who, client in zip(self._labels, self.clients, strict=True)]
        weighing = chosen.weigh(self.updates, self.weights, names)
        with self._processes.alike():
            for grams in self.grams:
                grams.batch.refuse_changes()
        made = copy(self)
        made.__dict__.pop("updates")
        made.weighing = weighing
        made.weights = self.weights.new_tensor(weighing.weights)
        made._made = WeakSet()
        made.grams = made._stacked(made.counted, made.weights)
        for own, known in zip(made.grams, self.grams, strict=True):
            own.adopt(known)
        return made

    @property
    def counted(self) -> tuple[Adapter, ...]:
        """The clients with their updates as they count: scaled where a robust rule says so."""
        if self.weighing is None or not self.weighing.robust.scales:
            return self.clients
        return tuple(
            client if scale == 1 else client.scaled(scale)
            for client, scale in zip(self.clients, self.weighing.scales, strict=True)
        )

    @property
    def _labels(self) -> list[str]:
        return [label(k, client.name) for k, client in enumerate(self.clients)]

    def inspect(self, *, energies: Sequence[float] = ENERGIES) -> Inspection:
        """Spectra of the ideal aggregate and similarities of the clients: see :func:`inspect`.

        Raises:
            ValueError: the round is shared with other processes.
        """
        if not self._processes.alone:
            raise ValueError("inspect() works in one process, found a round with group=")
        return inspection(self.clients, self.weights, self.read(), energies)

    def read(self, every: Iterable[Grams] | None = None) -> Iterator[Grams]:
        """The batches, the round's own when None, one after the other. What one computed is
        forgotten when the next is asked for, unless there is room for it in KEPT.
        """
        for grams in self.grams if every is None else every:
            yield grams
            grams.batch.forget()
            if not self.keeps(grams):
                grams.forget()

    def put_aside(self, made: dict[str, Factors]) -> dict[str, Factors]:
        """Factors of a result, in a file where memory is limited."""
        return made if self._memory_limit is None else mapped(made, self._scratch)

    def keeps(self, grams: Grams) -> bool:
        """Whether these matrices stay: all that the round's batches hold, those that rules with
        memory had it make included, fits KEPT together with them.
        """
        others = sum(other.nbytes for other in self._made if other is not grams)
        return others + grams.nbytes <= (KEPT if self._memory_limit is None else 0)

    def joined(self, more: Sequence[tuple[Adapter, float]]) -> list[Grams]:
        """The batches of the clients beside further adapters, whose weights stay as they are."""
        weights = self.weights.new_tensor([weight for _, weight in more])
        adapters = (*self.counted, *(adapter for adapter, _ in more))
        return self._stacked(adapters, torch.cat([self.weights, weights]), joined=len(more))

    def _stacked(
        self, adapters: Sequence[Adapter], weights: torch.Tensor, joined: int = 0
    ) -> list[Grams]:
        batches = stack(
            adapters,
            weights,
            absent=self._absent,
            device=self._device,
            joined=joined,
            gram_bytes=self._memory_limit and self._memory_limit // LIVE,
            share=self._processes.share,
        )
        made = [self._of(batch) for batch in batches]
        self._made.update(made)
        return made

    def _of(self, batch: Batch) -> Grams:
        """A batch's matrices, from its factors."""
        return grams_of(batch, self._precision)
