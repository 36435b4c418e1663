"""Grams: all that a rule sees of the clients' factors, two R x R matrices per module.

G_B = B^T B    G_A = A A^T    D = diag(w_k s_k repeated r_k times)    dW = B D A
||dW||^2             = <D G_B D, G_A>
<dW_j, dW_k>         = s_j s_k <G_B^{jk}, G_A^{jk}>
||dW - B X Y A||^2   = <G_B E, E G_A>  with E = D - X Y      (the form that does not cancel)
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.ops.spectrum import magnitude, negligible, right_of_left
from fedlora_kernels.stack import Batch


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of one batch of L modules, with the clients' weights and scalings."""

    modules: tuple[str, ...]
    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    size: tuple[int, int]
    """(m, n)"""
    weights: Tensor
    """[K] float64"""
    scalings: Tensor
    """[L,K] float64"""
    scale: Tensor
    """[L,R] float64, the diagonal of D"""
    b: Tensor
    """G_B [L,R,R] float64"""
    a: Tensor
    """G_A [L,R,R] float64"""
    precision: str = "exact"
    """how the Grams were accumulated"""

    @classmethod
    def of(cls, batch: Batch, precision: str = "exact") -> "Grams":
        """The one pass over a batch's data."""
        modules = len(batch.modules)
        return cls(
            modules=batch.modules,
            labels=batch.labels,
            ranks=batch.ranks,
            size=(batch.list_b[0].shape[0], batch.list_a[0].shape[1]),
            weights=batch.weights,
            scalings=batch.scalings,
            scale=batch.scale,
            b=ops.gram_list(batch.list_b, modules, rows=False, precision=precision),
            a=ops.gram_list(batch.list_a, modules, rows=True, precision=precision),
            precision=precision,
        )

    def check(self) -> None:
        """Refuse what no float64 Gram matrix holds.

        NaN and Inf in live adapters (files are checked when read) show on the diagonals.

        Raises:
            AdapterError: names the first such client and module.
        """
        b, a = (gram.diagonal(dim1=-2, dim2=-1) for gram in (self.b, self.a))
        squares = b * self.scale.square() * a * b.shape[1] ** 2
        for values, problem in (
            (b, "B holds NaN, Inf or numbers too large to square"),
            (a, "A holds NaN, Inf or numbers too large to square"),
            (squares, "the square of scaling B A overflows float64"),
        ):
            bad = (~values.isfinite()).double() @ self.membership
            if bool(bad.any()):
                module, client = (int(index) for index in bad.nonzero()[0])
                raise AdapterError(
                    f"{self.labels[client]}, module {self.modules[module]}: {problem}"
                )

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sigma [L,R], ||dW||^2 [L], left [L,R,R], right [L,R,R] (see ops.spectrum)."""
        sigma, total_energy, left, right, _ = ops.spectrum(self.b, self.a, self.scale)
        if self.precision == "fast":
            right = right_of_left(sigma, left, self.b, self.scale)
        return sigma, total_energy, left, right

    @property
    def full_rank(self) -> int:
        """min(R, m, n): no update has a higher rank."""
        return min(sum(self.ranks), *self.size)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """||dW - B X Y A||^2 for x [L,R,p] and y [L,p,R]: [L] float64.

        With E = D - X Y the two products G_B E and E G_A take R^2 p + 2 R^3 multiplications;
        through X and Y, without E, they take 4 R^2 p, which is less for p < 2 R / 3.
        """
        stacked_rank, rank = x.shape[1:]
        if 3 * rank < 2 * stacked_rank:
            scaled_b = self.b * self.scale[:, None, :]
            scaled_a = self.scale[:, :, None] * self.a
            left = torch.baddbmm(scaled_b, self.b @ x, y, alpha=-1)
            right = torch.baddbmm(scaled_a, x, y @ self.a, alpha=-1)
        else:
            gap = torch.baddbmm(torch.diag_embed(self.scale), x, y, alpha=-1)
            left, right = self.b @ gap, gap @ self.a
        return (left * right).sum((-2, -1)).clamp_min(0)

    @cached_property
    def energy(self) -> Tensor:
        """||dW||^2 = <D G_B D, G_A>, and 0 where the clients cancel to rounding: [L] float64."""
        squared = self.squared_norm(self.scale)
        return squared.where(squared > self.noise, 0)

    def squared_norm(self, diagonal: Tensor) -> Tensor:
        """||B diag(e) A||^2 = e^T (G_B o G_A) e for e [L,R]: [L] float64."""
        return (diagonal[:, None, :] @ self.products @ diagonal[:, :, None]).flatten()

    @cached_property
    def products(self) -> Tensor:
        """<b_i a_i, b_j a_j> of the R rank-1 terms, G_B o G_A: [L,R,R] float64."""
        return self.b * self.a

    @cached_property
    def noise(self) -> Tensor:
        """What rounding leaves of ||dW||^2 where the clients cancel: [L] float64."""
        return negligible(self.b.shape[1]) * magnitude(self.b, self.a, self.scale)

    @cached_property
    def client_products(self) -> Tensor:
        """<dW_j, dW_k> of the clients' own updates s_k B_k A_k: [L,K,K] float64."""
        membership = self.membership
        products = membership.T @ self.products @ membership
        return self.scalings[:, :, None] * products * self.scalings[:, None, :]

    @property
    def membership(self) -> Tensor:
        """Which client each stacked rank belongs to: [R,K] of 0 and 1, float64."""
        owner = torch.arange(len(self.ranks), device=self.b.device).repeat_interleave(
            torch.tensor(self.ranks, device=self.b.device)
        )
        return torch.nn.functional.one_hot(owner, len(self.ranks)).double()
