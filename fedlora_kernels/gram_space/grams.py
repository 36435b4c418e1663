"""Grams: all that a rule sees of the clients' factors, two R x R matrices per module.

G_B = B^T B    G_A = A A^T    D = diag(w_k s_k repeated r_k times)    dW = B D A
||dW||^2             = <D G_B D, G_A>
<dW_j, dW_k>         = s_j s_k <G_B^{jk}, G_A^{jk}>
||dW - B X Y A||^2   = <G_B E, E G_A>  with E = D - X Y      (the form that does not cancel)

The matrices are computed when something asks for one of them: a rule that only averages never does.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.gram_space.batches import Batch
from fedlora_kernels.ops._spectrum import magnitude, negligible, right_of_left
from fedlora_kernels.ops.product import product

TILE = 1 << 18
"""Entries of a matrix that are looked at together, 2 MiB: large matrices leave no copies."""


class Spectrum:
    """Singular values of L modules and the coefficients of their vectors (see ops.spectrum)."""

    sigma: Tensor
    """[L,R] or [L,min(m,n)], descending"""
    total_energy: Tensor
    """[L]"""

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """X [L,R,p] with B X = U S and Y [L,p,R] with Y A = V^T."""
        raise NotImplementedError

    @property
    def left(self) -> Tensor:
        """X."""
        return self.pair[0]

    @property
    def right(self) -> Tensor:
        """Y."""
        return self.pair[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the coefficients that are there."""
        return sum(tensor.nbytes for tensor in self.__dict__.get("pair", ()))

    def split(self, carrier: str) -> tuple[Tensor, Tensor]:
        """The coefficients X and Y with the singular values in B ("b"), in A ("a"), or their roots
        in both ("balanced").
        """
        if carrier == "b":
            return self.left, self.right
        moved = self.sigma if carrier == "a" else self.sigma.sqrt()
        inverse = (1 / moved).where(moved > 0, 0)
        count = self.left.shape[2]
        return self.left * inverse[:, None, :count], self.right * moved[:, :count, None]


class OfGrams(Spectrum):
    """From the R x R matrices."""

    def __init__(
        self, grams: "Grams", energy: float, max_rank: int | None, scale: Tensor | None
    ) -> None:
        scale = grams.scale if scale is None else scale
        self.sigma, self.total_energy, left, right, _ = ops.spectrum(
            grams.b, grams.a, scale, energy, max_rank
        )
        if grams.precision == "fast":
            right = right_of_left(self.sigma, left, grams.b, scale)
        self.pair = left, right


class Grams:
    """The Gram matrices of one batch of L modules, with the clients' weights and scalings."""

    def __init__(self, batch: Batch, precision: str = "exact") -> None:
        self.batch = batch
        self.precision = precision
        """how the Grams are accumulated"""
        self.modules = batch.modules
        self.ranks = batch.ranks
        self.size = batch.size
        """(m, n)"""
        self.weights = batch.weights
        """[K] float64"""
        self.scalings = batch.scalings
        """[L,K] float64"""
        self._matrices: tuple[Tensor, Tensor] | None = None
        self._spectra: dict[tuple[float, int | None], Spectrum] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The K clients as messages name them."""
        return self.batch.labels

    @property
    def scale(self) -> Tensor:
        """[L,R] float64, the diagonal of D"""
        return self.batch.scale

    @property
    def b(self) -> Tensor:
        """G_B [L,R,R] float64"""
        return self.matrices[0]

    @property
    def a(self) -> Tensor:
        """G_A [L,R,R] float64"""
        return self.matrices[1]

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """G_B and G_A, by the one pass over the batch's data.

        Raises:
            AdapterError: a client's factor holds NaN or Inf (files are checked when read, live
                adapters here), is too large to square, or was changed since the round was made.
        """
        if self._matrices is None:
            self.batch.refuse_changes()
            b, a = self._read()
            self._refuse_overflow(*(gram.diagonal(dim1=-2, dim2=-1) for gram in (b, a)))
            self._matrices = b, a
        return self._matrices

    def _read(self) -> tuple[Tensor, Tensor]:
        """G_B and G_A from the factors."""
        modules = len(self.modules)
        b, a = (
            ops.gram_list(factors, modules, rows=rows, precision=self.precision)
            for factors, rows in ((self.batch.list_b, False), (self.batch.list_a, True))
        )
        return b, a

    def _refuse_overflow(self, squares_b: Tensor, squares_a: Tensor) -> None:
        """NaN and Inf show on the diagonals [L,R]; where there is one, look for whose it is."""
        squares = squares_b * self.scale.square() * squares_a * self.stacked_rank**2
        if bool(squares.sum().isfinite() & (squares_b.sum() + squares_a.sum()).isfinite()):
            return
        for values, problem in (
            (squares_b, "B holds NaN, Inf or numbers too large to square"),
            (squares_a, "A holds NaN, Inf or numbers too large to square"),
            (squares, "scaling * B A is too large: its square overflows float64"),
        ):
            bad = (~values.isfinite()).double() @ self.membership
            if bool(bad.any()):
                module, client = (int(index) for index in bad.nonzero()[0])
                raise AdapterError(
                    f"{self.labels[client]}, module {self.modules[module]}: {problem}"
                )

    @property
    def computed(self) -> bool:
        """Whether the matrices are there."""
        return self._matrices is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the R x R matrices that are there."""
        held = [] if self._matrices is None else [*self._matrices]
        spectra = sum(found.nbytes for found in self._spectra.values())
        return spectra + sum(tensor.nbytes for tensor in held)

    def forget(self) -> None:
        """Let go of everything that was computed; it is computed anew for who asks again."""
        self._matrices = None
        self._spectra.clear()
        for name in ("energy", "noise", "client_products"):
            self.__dict__.pop(name, None)

    @property
    def spectrum(self) -> Spectrum:
        """All singular values."""
        return self.leading()

    def leading(self, energy: float = 1.0, max_rank: int | None = None) -> Spectrum:
        """At least the singular values that hold this share of the energy, or the first max_rank.

        The energy of the others is the difference to ``total_energy``.
        """
        asked = (energy, max_rank)
        if asked not in self._spectra:
            self._spectra[asked] = self.decomposed(energy, max_rank)
        return self._spectra[asked]

    def decomposed(
        self, energy: float = 1.0, max_rank: int | None = None, scale: Tensor | None = None
    ) -> Spectrum:
        """The same, computed anew, of B diag(scale) A for scale [L,R]; of B D A when None."""
        return OfGrams(self, energy, max_rank, scale)

    @property
    def stacked_rank(self) -> int:
        """R"""
        return sum(self.ranks)

    @property
    def full_rank(self) -> int:
        """min(R, m, n): no update has a higher rank."""
        return min(self.stacked_rank, *self.size)

    def same_rank(self, rank: int) -> Tensor:
        """The same rank for every module: [L] int64."""
        return torch.full((len(self.modules),), rank, device=self.batch.device)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """||dW - B X Y A||^2 for x [L,R,p] and y [L,p,R]: [L] float64.

        With E = D - X Y the two products G_B E and E G_A take R^2 p + 2 R^3 multiplications;
        through X and Y, without E, they take 4 R^2 p, which is less for p < 2 R / 3.
        """
        stacked_rank, rank = x.shape[1:]
        if 3 * rank < 2 * stacked_rank:
            b_x, y_a = product(self.b, x), product(y, self.a)
            total = torch.zeros_like(self.scale[:, 0])
            for rows in self._tiles():
                left = self.b[:, rows] * self.scale[:, None, :]
                left -= product(b_x[:, rows], y)
                right = self.scale[:, rows, None] * self.a[:, rows]
                right -= product(x[:, rows], y_a)
                total += left.mul_(right).sum((-2, -1))
            return total.clamp_min(0)
        gap = torch.diag_embed(self.scale) - product(x, y)
        return product(self.b, gap).mul_(product(gap, self.a)).sum((-2, -1)).clamp_min(0)

    def _tiles(self) -> Iterator[slice]:
        """The rows of the matrices, a tile at a time."""
        rank = self.stacked_rank
        step = max(1, TILE // rank)
        return (slice(start, start + step) for start in range(0, rank, step))

    @cached_property
    def energy(self) -> Tensor:
        """||dW||^2 = <D G_B D, G_A>, and 0 where the clients cancel to rounding: [L] float64."""
        squared = self.squared_norm(self.scale)
        return squared.where(squared > self.noise, 0)

    def squared_norm(self, diagonal: Tensor) -> Tensor:
        """||B diag(e) A||^2 = e^T (G_B o G_A) e for e [L,R]: [L] float64."""
        total = torch.zeros_like(diagonal[:, 0])
        for rows in self._tiles():
            products = self.b[:, rows] * self.a[:, rows]
            by_column = product(diagonal[:, None, rows], products)
            total += product(by_column, diagonal[:, :, None]).flatten()
        return total

    @cached_property
    def noise(self) -> Tensor:
        """What rounding leaves of ||dW||^2 where the clients cancel: [L] float64."""
        return negligible(self.stacked_rank) * magnitude(self.b, self.a, self.scale)

    @cached_property
    def client_products(self) -> Tensor:
        """<dW_j, dW_k> of the clients' own updates s_k B_k A_k: [L,K,K] float64."""
        return ops.client_products(*self.matrices, self.scalings, self.ranks)

    def adopt(self, other: "Grams") -> None:
        """Take over what another's pass over the same factors found, weights and scalings aside."""
        self._matrices = other._matrices

    @cached_property
    def membership(self) -> Tensor:
        """Which client each stacked rank belongs to: [R,K] of 0 and 1, float64."""
        return torch.nn.functional.one_hot(self.batch.owner, len(self.ranks)).double()
