"""Wide: one module whose stacked rank R is about min(m, n) or more.

R x R matrices would be larger than the update dW = B D A itself, so the work is done in the space
of dW's smaller side, of d = min(m, n) dimensions:

    dW = sum over runs of clients of (B D)_run A_run     [m,n] float64, widened a run at a time
    S  = dW^T dW (n <= m) or dW dW^T                     leading eigenvectors V or U (leading.py)
    U = dW V Sigma^-1    or    V = dW^T U Sigma^-1
    X = D A V    Y = Sigma^-1 U^T B D                    B X = U Sigma    Y A = V^T

So rules see coefficients of the stacked factors as everywhere else, and errors come from dW without
cancellation: ||dW - (B X)(Y A)||^2. The R x R matrices are made only for a rule that asks for them.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from fedlora_kernels.gram_space.batches import Batch
from fedlora_kernels.gram_space.grams import Grams, Spectrum
from fedlora_kernels.gram_space.leading import leading_eigenpairs
from fedlora_kernels.ops._spectrum import negligible

RUN = 512
"""Columns of B and rows of A that are widened at once: 32 MiB for 4096 x 4096, and float64 products
of this depth run at the full rate."""

ROWS = 256
"""Of an update that are looked at together: 8 MiB of 4096 columns."""


class Wide(Grams):
    """The same as :class:`Grams` of a batch of one module, from the dense update."""

    @cached_property
    def _accumulated(self) -> tuple[Tensor, Tensor]:
        """dW [m,n] and D_i^2 ||b_i||^2 ||a_i||^2 summed over the R terms, both float64.

        Raises:
            AdapterError: as :attr:`matrices` does.
        """
        self.batch.refuse_changes()
        scale = self.scale[0]
        total = torch.zeros(self.size, dtype=torch.float64, device=scale.device)
        squares_b, squares_a = torch.zeros_like(scale), torch.zeros_like(scale)
        for place, b, a in self._runs():
            squares_b[place], squares_a[place] = b.square().sum(0), a.square().sum(1)
            total.addmm_(b.mul_(scale[place]), a)
        self._refuse_overflow(squares_b[None], squares_a[None])
        return total, (squares_b * scale.square() * squares_a).sum()

    @property
    def update(self) -> Tensor:
        """dW, [m,n] float64."""
        return self._accumulated[0]

    def _runs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The stack in runs of clients: places, B [m,c] and A [c,n] in float64, to be changed at
        will. The next run lies where this one does.
        """
        device, ends = self.batch.device, list(accumulate(self.ranks))
        spaces = [torch.empty(0, dtype=torch.float64, device=device) for _ in range(2)]
        first = start = 0
        for last, end in enumerate(ends):
            if end - start >= RUN or end == ends[-1]:
                pairs = self.batch.pairs[first : last + 1]
                b = torch.cat([pair.b.to(device) for pair in pairs], 1)
                a = torch.cat([pair.a.to(device) for pair in pairs])
                wide_b, wide_a = (
                    space.resize_(factor.shape).copy_(factor)
                    for space, factor in zip(spaces, (b, a), strict=True)
                )
                yield slice(start, end), wide_b, wide_a
                first, start = last + 1, end

    def decomposed(
        self, energy: float = 1.0, max_rank: int | None = None, scale: Tensor | None = None
    ) -> Spectrum:
        """The leading singular values of dW, or of B diag(scale) A; vectors when asked for."""
        return OfUpdate(self, energy, max_rank, scale)

    @property
    def computed(self) -> bool:
        """Whether the update is there."""
        return "_accumulated" in self.__dict__ or super().computed

    @property
    def nbytes(self) -> int:
        """Bytes of the update and the matrices that are there."""
        return super().nbytes + (self.update.nbytes if "_accumulated" in self.__dict__ else 0)

    def forget(self) -> None:
        """Let go of the update, too."""
        super().forget()
        self.__dict__.pop("_accumulated", None)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """||dW - (B X)(Y A)||^2 for x [1,R,p] and y [1,p,R]: [1] float64."""
        b_x, y_a = self.applied(x[0], y[0])
        squares = [
            torch.addmm(self.update[rows], b_x[rows], y_a, alpha=-1).square_().sum()
            for rows in (slice(start, start + ROWS) for start in range(0, self.size[0], ROWS))
        ]
        return torch.stack(squares).sum()[None]

    def applied(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """B X [m,p] and Y A [p,n]."""
        b_x = x.new_zeros(self.size[0], x.shape[1])
        y_a = y.new_zeros(y.shape[0], self.size[1])
        for place, b, a in self._runs():
            b_x.addmm_(b, x[place])
            y_a.addmm_(y[:, place], a)
        return b_x, y_a

    def squared_norm(self, diagonal: Tensor) -> Tensor:
        """||B diag(e) A||^2 for e [1,R]: [1] float64."""
        return self.product(diagonal[0]).square_().sum()[None]

    def product(self, diagonal: Tensor) -> Tensor:
        """B diag(e) A for e [R]: [m,n] float64."""
        total = torch.zeros_like(self.update)
        for place, b, a in self._runs():
            total.addmm_(b.mul_(diagonal[place]), a)
        return total

    @cached_property
    def client_products(self) -> Tensor:
        """<dW_j, dW_k>, [1,K,K], a run of clients against a run at a time: no R x R matrix.

        Raises:
            AdapterError: as :attr:`matrices` does.
        """
        self.batch.refuse_changes()
        membership = self.membership
        squares_b, squares_a = torch.zeros_like(self.scale[0]), torch.zeros_like(self.scale[0])
        found = membership.new_zeros(len(self.ranks), len(self.ranks))
        for place, b, a in self._runs():
            squares_b[place], squares_a[place] = b.square().sum(0), a.square().sum(1)
            for before, other_b, other_a in self._runs():
                block = (b.mT @ other_b).mul_(a @ other_a.mT)
                found += membership[place].mT @ block @ membership[before]
                if before == place:
                    break
        self._refuse_overflow(squares_b[None], squares_a[None])
        whole = found.tril() + found.tril(-1).mT
        return self.scalings[:, :, None] * whole * self.scalings[:, None, :]

    @cached_property
    def energy(self) -> Tensor:
        """||dW||^2, and 0 where the clients cancel to rounding: [1] float64."""
        squared: Tensor = torch.linalg.vector_norm(self.update).square()[None]
        return squared.where(squared > self.noise, 0)

    @cached_property
    def noise(self) -> Tensor:
        """What rounding leaves of ||dW||^2 where the clients cancel: [1] float64."""
        return negligible(self.stacked_rank) * self._accumulated[1][None]


def grams_of(batch: Batch, precision: str = "exact") -> Grams:
    """A batch's matrices, or what stands for them where the dense update is less work."""
    return (Wide if batch.wide else Grams)(batch, precision)


class OfUpdate(Spectrum):
    """Singular values from the smaller side of the dense update."""

    def __init__(
        self, wide: Wide, energy: float, max_rank: int | None, scale: Tensor | None
    ) -> None:
        self._wide = wide
        self._scale = wide.scale[0] if scale is None else scale[0]
        self._update = wide.update if scale is None else wide.product(self._scale)
        self.total_energy = torch.linalg.vector_norm(self._update).square()[None]
        rows, dimension = wide.size[0] < wide.size[1], min(wide.size)
        values, vectors = leading_eigenpairs(
            self._update.mT if rows else self._update,
            energy - 4 * negligible(dimension),
            max_rank or dimension,
        )
        # Where clients cancel, lambda_1 itself is rounding of the much larger terms.
        least = torch.maximum(negligible(wide.stacked_rank) * values[:1], wide.noise)
        count = int((values > least).sum())
        self.sigma = values.new_zeros(1, dimension)
        self.sigma[0, :count] = values[:count].sqrt()
        self._vectors = vectors[:, :count].clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the eigenvectors, too."""
        return super().nbytes + self._vectors.nbytes

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """X [1,R,p] and Y [1,p,R]."""
        inverse = 1 / self.sigma[0, : self._vectors.shape[1]]
        if self._wide.size[0] < self._wide.size[1]:
            left = self._vectors
            right = (left.mT @ self._update).mT * inverse  # rows are faster, as in leading.py
        else:
            right = self._vectors
            left = self._update @ right * inverse
        x = right.new_empty(self._scale.shape[0], right.shape[1])
        y = torch.empty_like(x.mT)
        for place, b, a in self._wide._runs():
            x[place] = self._scale[place, None] * (a @ right)
            y[:, place] = inverse[:, None] * (left.mT @ b) * self._scale[place]
        return x[None], y[None]
