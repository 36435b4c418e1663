"""Blocks: the Gram matrices of the clients that came, a block row for each that comes.

    G_B[k, j] = B_k^T B_j    G_A[k, j] = A_k A_j^T    j <= k, float64, modules of both

The new client's row is made when it arrives, so the matrices of a whole round are there when the
last one has come. A module that is wide by then needs no more of them: the result is made from the
factors themselves.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fedlora_kernels._round import Round
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.arrivals.durable import read_tensors
from fedlora_kernels.gram_space.batches import Batch, is_wide, stack
from fedlora_kernels.gram_space.grams import Grams

B, A = "B ", "A "
"""what the names of the blocks start with; the module's own name follows"""


class Arrived(Round):
    """A round whose Gram matrices are put together from blocks.

    Args:
        adapters: the K clients, in the order in which they came.
        weights: their weights.
        blocks: the folders of their block rows.
        memory_limit, scratch, absent, device, same_base, magnitudes: see :class:`Round`.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        *,
        weights: Sequence[float],
        blocks: Sequence[Path],
        memory_limit: int,
        scratch: Path,
        absent: str,
        device: torch.device | str | None,
        same_base: bool,
        magnitudes: str | None,
    ) -> None:
        self._folders = blocks
        self._memory = torch.empty(0, dtype=torch.float64)
        super().__init__(
            adapters,
            weights=weights,
            absent=absent,
            device=device,
            same_base=same_base,
            memory_limit=memory_limit,
            scratch=scratch,
            magnitudes=magnitudes,
        )

    @cached_property
    def _blocks(self) -> list[Mapping[str, Tensor]]:
        """Of every client, mapped."""
        return [read_tensors(folder) for folder in self._folders]

    def _of(self, batch: Batch) -> Grams:
        if batch.wide or batch.clients[-1] >= len(self._folders):  # with what a rule carried over
            return super()._of(batch)
        return Joined(batch, self)

    def matrices(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """G_B and G_A of a batch, [L,R,R] each, until those of another batch are asked for: they
        lie where the last ones did, since touching new memory takes as long as filling it.
        """
        stacked_rank = sum(batch.ranks)
        size = (2, len(batch.modules), stacked_rank, stacked_rank)
        if self._memory.numel() < prod(size):
            self._memory = torch.empty(prod(size), dtype=torch.float64)
        whole = self._memory[: prod(size)].view(size)

        def put(name: str, matrix: Tensor) -> None:
            start = 0
            for k, rank in zip(batch.clients, batch.ranks, strict=True):
                end = start + rank
                row = self._blocks[k][name]
                matrix[start:end, :end] = row
                matrix[:start, start:end] = row[:, :start].mT
                start = end

        names = [side + module for side in (B, A) for module in batch.modules]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            deque(threads.map(put, names, whole.flatten(0, 1)), maxlen=0)
        b, a = whole.to(batch.device)
        return b, a


class Joined(Grams):
    """Gram matrices that were made block by block."""

    def __init__(self, batch: Batch, arrived: Arrived) -> None:
        super().__init__(batch)
        self._arrived = arrived

    def _read(self) -> tuple[Tensor, Tensor]:
        return self._arrived.matrices(self.batch)


def row(
    client: Adapter,
    before: Sequence[Adapter],
    *,
    device: torch.device | str | None,
    room: int,
) -> Iterator[tuple[str, Tensor]]:
    """The block row of a client: by side and module [r_k, sum_{j<=k} r_j] float64.

    Args:
        client: the new one.
        before: those that came before it.
        device: where the work is done; where the client's factors are when None.
        room: bytes of widened factors that may be held at once, or those of one client's module.

    Raises:
        AdapterError: a factor holds NaN or Inf, or is too large to square.
    """
    new, older = Widened(), Widened()
    for batch in stack([client], torch.ones(1, dtype=torch.float64), device=device, gram_bytes=0):
        own = Grams(batch)
        (module,), (pair,) = batch.modules, batch.pairs
        others = [one.factors[module] for one in before if module in one.factors]
        if is_wide(sum(other.rank for other in others) + pair.rank, batch.size):
            continue
        sides = (
            (B, own.b[0], pair.b.mT, [other.b.mT for other in others]),
            (A, own.a[0], pair.a, [other.a for other in others]),
        )
        for side, corner, rows, all_before in sides:
            wide = new([rows], batch.device)
            parts = [wide @ older(part, batch.device).mT for part in _runs(all_before, room)]
            yield side + module, torch.cat([*parts, corner], 1).cpu()


class Widened:
    """Factors in float64, one under the other, in one piece of memory for all modules: pieces of
    their own, freed between the small blocks that stay, would leave holes that add up.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)

    def __call__(self, factors: Sequence[Tensor], device: torch.device) -> Tensor:
        """[sum r, d] float64 of factors [r, d], until the next call."""
        count = sum(factor.shape[0] for factor in factors)
        size = (count, factors[0].shape[1])
        if self._memory.numel() < size[0] * size[1] or self._memory.device != device:
            self._memory = torch.empty(size[0] * size[1], dtype=torch.float64, device=device)
        together = self._memory[: size[0] * size[1]].view(size)
        start = 0
        for factor in factors:
            together[start : start + factor.shape[0]].copy_(factor)
            start += factor.shape[0]
        return together


def _runs(factors: Sequence[Tensor], room: int) -> Iterator[list[Tensor]]:
    """Runs of factors that fit the room in float64; one factor is a run however large it is."""
    run: list[Tensor] = []
    held = 0
    for factor in factors:
        size = 8 * factor.numel()
        if run and held + size > room:
            yield run
            run, held = [], 0
        run.append(factor)
        held += size
    if run:
        yield run
