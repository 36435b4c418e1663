"""Updates: the clients' updates as points of one space, of which only inner products are known.

    G_jk   = <dW_j, dW_k> = sum over modules of s_j s_k sum((B_j^T B_k) * (A_j A_k^T))    [K,K]
    d_jk^2 = G_jj + G_kk - 2 G_jk                                         squared distances
    x_k    = dW_k - dW_c with c the medoid                                centered points
    H_jk   = <x_j, x_k> = G_jk - G_jc - G_ck + G_cc
    ||sum_j p_j dW_j - dW_k||^2 = H_kk - 2 (H p)_k + p^T H p              where p sums to 1

The difference cancels where clients are close: with u the rounding of float64, the error of d_jk^2
is at most a small multiple of R u (N_j + N_k)^2, N_k = s_k sum_i ||b_ki|| ||a_ki|| >= ||dW_k||, so
distances under about 1e-7 of the norms are rounding, and count as 0 (:data:`ROUNDING`). The
centered points keep a far client's size out of the distances between the others: its H_kk is
large, and its products with the others are as exact as its own distance allows.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from operator import add

import numpy as np
import torch
from torch import Tensor

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.gram_space.exact_sum import ExactSum
from fedlora_kernels.gram_space.grams import Grams

ROUNDING = 256 * torch.finfo(torch.float64).eps
"""d_jk^2 at or under this share of G_jj + G_kk counts as 0: 2.4e-7 of the norms. Squared norms that
differ by no larger share count as equal."""


def of_modules(grams: Grams, clients: int) -> Tensor:
    """<dW_j, dW_k> of each module, [L,K,K] on the CPU; 0 where a client lacks the modules."""
    found = grams.client_products.cpu()
    if len(grams.batch.clients) == clients:
        return found
    present = torch.tensor(grams.batch.clients)
    whole = found.new_zeros(len(found), clients, clients)
    whole[:, present[:, None], present[None, :]] = found
    return whole


def products(every: Iterable[Grams], clients: int) -> ExactSum:
    """G [K,K], summed over the modules of these batches; the same bits in any order.

    Raises:
        AdapterError: as :attr:`Grams.matrices` does.
    """
    total = ExactSum(torch.zeros(clients, clients, dtype=torch.float64))
    for grams in every:
        total += ExactSum(of_modules(grams, clients)).over()
    return total


class Updates:
    """The clients' updates s_k B_k A_k over all modules; a module that is absent is a zero update.

    Args:
        products: G, [K,K] float64 on the CPU.
        labels: the clients as messages name them.

    Raises:
        AdapterError: a squared norm overflows float64; names the client.
    """

    def __init__(self, products: Tensor, labels: Sequence[str]) -> None:
        self.products, self.labels = products, tuple(labels)
        for who, square in zip(self.labels, products.diagonal().tolist(), strict=True):
            if not square < torch.finfo(torch.float64).max / 16:
                raise AdapterError(f"{who}: the square of its update's norm overflows float64")

    @classmethod
    def summed(cls, parts: Iterable[ExactSum], labels: Sequence[str]) -> "Updates":
        """From the sums of :func:`products` over parts of the modules.

        Raises:
            AdapterError: a squared norm overflows float64.
        """
        total = reduce(add, parts).value
        return cls((total + total.mT) / 2, labels)

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, clients: Sequence[int]) -> "Updates":
        """Some of the clients."""
        if len(clients) == len(self):
            return self
        chosen = torch.tensor(clients)
        return Updates(self.products[chosen][:, chosen], [self.labels[k] for k in clients])

    @cached_property
    def norms(self) -> Tensor:
        """||dW_k||, [K]."""
        return self.products.diagonal().clamp_min(0).sqrt()

    def longer(self, limit: Tensor) -> Tensor:
        """Whether ||dW_k|| is above the limit, by more than rounding: [K] bool."""
        found: Tensor = self.norms > (1 + ROUNDING) ** 0.5 * limit
        return found

    @cached_property
    def squared_distances(self) -> Tensor:
        """d_jk^2, [K,K]; exactly 0 on the diagonal and where only rounding is left."""
        squares = self.products.diagonal()
        sums = squares[:, None] + squares[None, :]
        found = sums - 2 * self.products
        found = found.where(found > ROUNDING * sums, 0)
        return found.fill_diagonal_(0)

    @cached_property
    def medians(self) -> Tensor:
        """Of every client the median of its distances to the others, [K]: the lower one of two."""
        if len(self) == 1:
            return torch.zeros(1, dtype=torch.float64)
        others = self.squared_distances.sort(-1).values[:, 1:]  # the first is its own, 0
        return others[:, (len(self) - 2) // 2].sqrt()

    @cached_property
    def medoid(self) -> int:
        """The client whose median distance to the others is the smallest; of equals the first."""
        return int(self.medians.argmin())

    @cached_property
    def centered(self) -> Tensor:
        """H, [K,K]: the inner products of the points around the medoid."""
        row = self.products[self.medoid]
        found = self.products - row[:, None] - row[None, :] + row[self.medoid]
        squares = self.squared_distances[self.medoid]
        # Where a distance is rounding, so are the products with it.
        found = found.where((squares[:, None] > 0) & (squares[None, :] > 0), 0)
        return found.diagonal_scatter(squares)

    def distances(self, mix: Tensor) -> Tensor:
        """||sum_j p_j dW_j - dW_k|| for p [K] that sums to 1: [K]."""
        products = self.centered @ mix
        squares = self.centered.diagonal() - 2 * products + mix @ products
        return squares.clamp_min(0).sqrt()

    def cosines(self, mix: Tensor) -> Tensor:
        """<sum_j p_j dW_j, dW_k> over both norms, [K]; NaN where either is zero."""
        products = self.products @ mix
        scale = (mix @ products).clamp_min(0).sqrt() * self.norms
        return (products / scale.where(scale > 0, torch.nan)).clamp(-1, 1)

    def geometric_median(
        self, weights: Tensor, *, tol: float = 1e-9, smoothing: float = 1e-6, max_steps: int = 1000
    ) -> Tensor:
        """p, [K] and summing to 1: z = sum_k p_k dW_k minimizes sum_k w_k ||z - dW_k||.

        Weiszfeld's iteration, with distances no smaller than ``smoothing`` times the scale:

            z = sum_k p_k dW_k    p_k ~ w_k / max(||z - dW_k||, smoothing * scale)

        The scale is the medoid's median distance to the others (its smallest positive one where
        that is 0). The sum falls with every step; the iteration stops when z moves by no more than
        ``tol`` times the scale, at the latest after ``max_steps`` steps.

        Args:
            weights: w_k >= 0, [K], with a positive sum.
            tol: see above.
            smoothing: see above.
            max_steps: see above.
        """
        scale = float(self.medians[self.medoid])
        scale = scale or _smallest_positive(self.centered.diagonal()) ** 0.5
        if scale == 0:  # all are equal
            return weights / weights.sum()
        # In NumPy, whose calls on so few numbers take a fifth of the time.
        given, products = weights.numpy(), self.centered.numpy()
        squares = products.diagonal()
        least, near = (smoothing * scale) ** 2, (tol * scale) ** 2
        mix = given / np.sqrt(np.maximum(squares, scale * scale))  # no far client sets the start
        mix /= mix.sum()
        image = products @ mix
        for _ in range(max_steps):
            moved = given / np.sqrt(np.maximum(squares - 2 * image + mix @ image, least))
            moved /= moved.sum()
            change = moved - mix
            image_of_change = products @ change
            mix, image = moved, image + image_of_change
            if change @ image_of_change <= near:
                break
        return torch.from_numpy(mix)


def _smallest_positive(values: Tensor) -> float:
    positive = values[values > 0]
    return float(positive.min()) if len(positive) else 0.0
