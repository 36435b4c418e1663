"""Round: the clients of one round, checked once, and what rules read of them, read once.

    round = flk.Round(clients, weights=[120, 80, 300])
    florist, flexlora = round.aggregate([flk.rules.FLoRIST(energy=0.9), "flexlora"])
    round.inspect().modules[name].sigma

load -> stack -> gram -> rule (spectrum + rank | surrogate | nothing) -> combine -> report

Batches of modules are the outermost loop, so memory does not grow with the layers. Each step is
taken when something needs its result: a rule that only averages computes no Gram matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload
from weakref import WeakSet

import torch

from fedlora_kernels import rules
from fedlora_kernels._aggregation import Aggregation, Work
from fedlora_kernels._inspect import ENERGIES, Inspection, inspection
from fedlora_kernels.adapters import agreement
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.scratch import mapped
from fedlora_kernels.gram_space.batches import Batch, stack
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.wide import Wide
from fedlora_kernels.ops import checks
from fedlora_kernels.rules import Rule

KEPT = 1 << 28
"""Bytes of Gram matrices and spectra that a round keeps, 256 MiB; others are computed anew."""

LIVE = 12
"""So many arrays of a batch's G_B, at most, live while the batch is worked on."""


class Round:
    """The clients of one round.

    Args:
        adapters: the K clients; they are not changed, and must not be while the round is in use.
        weights: the clients' weights (numbers of examples, say), scaled to sum to 1; equal when
            None.
        absent: what a client without a module counts as: "zero", a zero update, or "renormalize",
            as if it were not there.
        device: where the work is done; where the adapters are when None.
        precision: "exact" (float64 accumulation) or "fast" (float32 with promotion).
        same_base: whether the clients have one base model whatever their configs call it, local
            paths for example.
        memory_limit: bytes of memory for the matrices and results of the modules that are worked on
            together, which are as few as it takes; files are mapped and do not count. Results are
            written to unnamed files as they are made, and mapped. One module is worked on however
            large it is. No limit when None.
        scratch: folder for those files; the system's temporary folder when None.

    Raises:
        AdapterError: what the clients sent does not belong together; names client and module.
        ValueError: absent or precision is unknown, or memory_limit is under 1.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        *,
        weights: Sequence[float] | None = None,
        absent: str = "zero",
        device: torch.device | str | None = None,
        precision: str = "exact",
        same_base: bool = False,
        memory_limit: int | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit must be at least 1 byte, found {memory_limit}")
        self._memory_limit, self._scratch = memory_limit, scratch
        self.clients = tuple(adapters)
        self.weights = agreement.normalized(weights, self.clients)
        """w_k [K] float64"""
        agreement.check(self.clients, same_base=same_base)
        checks.precision(precision)
        self._absent, self._device, self._precision = absent, device, precision
        self.renormalizes = absent == "renormalize"
        """whether clients without a module count as if they were not there"""
        self._made: WeakSet[Grams] = WeakSet()
        if not self.clients[0].vera:  # of VeRA, factors are made only for who asks for them
            _ = self.grams

    @cached_property
    def grams(self) -> list[Grams]:
        """The batches of modules, each with the Gram matrices that it computes on demand."""
        return self._stacked(self.clients, self.weights)

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
                and that of all.
            **options: of a rule given by name, see ``flk.rules.find(name).options()``.

        Raises:
            AdapterError: what the clients sent cannot be aggregated by this rule, and the message
                names the client and the module; or the result's dtype cannot hold the result.
            ValueError: the rule is unknown, or an option is out of range.
            TypeError: the rule has no such option.
        """
        several = [rule] if isinstance(rule, (str, Rule)) else rule
        chosen = [rules.make(item, **options) for item in several]
        works = [
            Work(self, item, carried, uniform_rank=uniform_rank, dtype=dtype, heads=heads)
            for item in chosen
        ]
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
        results = [work.result() for work in works]
        return results if several is rule else results[0]

    def inspect(self, *, energies: Sequence[float] = ENERGIES) -> Inspection:
        """Spectra of the ideal aggregate and similarities of the clients: see :func:`inspect`."""
        return inspection(self.clients, self.weights, self.read(), energies)

    def read(self, every: Sequence[Grams] | None = None) -> Iterator[Grams]:
        """The batches, the round's own when None, one after the other. What one computed is
        forgotten when the next is asked for, unless there is room for it in KEPT.
        """
        for grams in self.grams if every is None else every:
            yield grams
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
        adapters = (*self.clients, *(adapter for adapter, _ in more))
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
        )
        made = [self._of(batch) for batch in batches]
        self._made.update(made)
        return made

    def _of(self, batch: Batch) -> Grams:
        """A batch's matrices, from its factors."""
        return (Wide if batch.wide else Grams)(batch, self._precision)
