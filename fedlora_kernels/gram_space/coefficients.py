"""What a rule returns: the coefficients X, Y of ``B_g = B X`` and ``A_g = Y A``, in three forms.

Each form knows X and Y, scaling included (for the error, in Gram space), and how to make the
factors from a batch with the operator that reads the data once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.gram_space.batches import Batch
from fedlora_kernels.gram_space.grams import Grams, Spectrum

Side = Tensor | Sequence[Tensor]
"""One factor of every module: stacked [L,...], or one by one."""


class Coefficients(Protocol):
    """A pair of factors as a function of the stacked factors; the update is scaling * B_g A_g."""

    @property
    def ranks(self) -> Tensor:
        """Rank per module, [L] int64."""

    @property
    def scaling(self) -> Tensor:
        """[L] float64."""

    @property
    def x(self) -> Tensor:
        """scaling * X, [L,R,p]."""

    @property
    def y(self) -> Tensor:
        """Y, [L,p,R]."""

    def computed(self, sends: str) -> str:
        """The factors that are computed, "both", "a" or "b"; the other is zero or copied."""

    def factors(self, batch: Batch, sends: str = "both") -> tuple[Side, Side]:
        """B_g [m,p] and A_g [p,n] of every module in the batch's dtype.

        Args:
            batch: the clients' factors.
            sends: the factors that travel, "both", "a" or "b" (see :attr:`Rule.sends`).
        """


@dataclass(frozen=True)
class Product:
    """Dense coefficients: X [L,R,p] and Y [L,p,R], zero beyond each module's rank."""

    x: Tensor
    y: Tensor
    ranks: Tensor
    common: Tensor | None = None
    """the clients' scaling, [L], which x contains and the factors leave out"""

    @property
    def scaling(self) -> Tensor:
        """The clients' common one, or 1: the scalings are inside X and Y."""
        if self.common is not None:
            return self.common
        return torch.ones_like(self.ranks, dtype=torch.float64)

    def computed(self, sends: str) -> str:
        """Both."""
        return "both"

    def factors(self, batch: Batch, sends: str = "both") -> tuple[Side, Side]:
        """combine."""
        x = self.x if self.common is None else self.x / self.common[:, None, None]
        return ops.combine_list(batch.list_b, batch.list_a, x, self.y)


@dataclass(frozen=True)
class Mixture:
    """Averages of equal-rank factors: B_g = sum_k q_k B_k and A_g = sum_k p_k A_k."""

    q: Tensor
    """[L,K]"""
    p: Tensor
    """[L,K]"""
    scaling: Tensor
    """[L]"""
    rank: int

    @property
    def ranks(self) -> Tensor:
        """The clients' rank, for every module."""
        return torch.full_like(self.scaling, self.rank, dtype=torch.int64)

    @property
    def x(self) -> Tensor:
        """scaling * q kron I_r: [L,R,r]."""
        return torch.kron((self.scaling[:, None] * self.q)[:, :, None], self._identity)

    @property
    def y(self) -> Tensor:
        """p^T kron I_r: [L,r,R]."""
        return torch.kron(self.p[:, None, :], self._identity)

    @property
    def _identity(self) -> Tensor:
        return torch.eye(self.rank, dtype=self.q.dtype, device=self.q.device)

    def computed(self, sends: str) -> str:
        """Those that travel."""
        return sends

    def factors(self, batch: Batch, sends: str = "both") -> tuple[Side, Side]:
        """weighted_sum of the factors that travel. Where only A does, B is zero, since every client
        keeps its own; where only B does, A is the first client's own tensor, the same in all.
        """
        if sends == "a":
            b: Side = [
                torch.zeros(batch.size[0], self.rank, dtype=batch.dtype, device=batch.device)
                for _ in batch.modules
            ]
        else:
            b = ops.weighted_sum_list(batch.list_b, self.q)
        if sends == "b":
            return b, batch.first_a
        return b, ops.weighted_sum_list(batch.list_a, self.p)


@dataclass(frozen=True)
class Stacked:
    """The stack itself: B_g = B and A_g = D A."""

    terms: Tensor
    """[L,K], what the diagonal of D holds, once per client"""
    owner: Tensor
    """[R], which client each stacked rank belongs to"""

    @property
    def scale(self) -> Tensor:
        """[L,R], the diagonal of D."""
        return self.terms[:, self.owner]

    @property
    def ranks(self) -> Tensor:
        """R."""
        modules, device = self.terms.shape[0], self.terms.device
        return torch.full((modules,), self.owner.shape[0], dtype=torch.int64, device=device)

    @property
    def scaling(self) -> Tensor:
        """1: the scalings are inside A."""
        return torch.ones_like(self.terms[:, 0])

    @property
    def x(self) -> Tensor:
        """I."""
        return torch.diag_embed(torch.ones_like(self.scale))

    @property
    def y(self) -> Tensor:
        """D."""
        return torch.diag_embed(self.scale)

    def computed(self, sends: str) -> str:
        """A; B is the clients' own."""
        return "a"

    def factors(self, batch: Batch, sends: str = "both") -> tuple[list[Tensor], list[Tensor]]:
        """B as it is; each A_k scaled and rounded once: a weighted_sum of one term."""
        step, b = len(batch.clients), batch.list_b
        starts = range(0, len(b), step)
        stacked_b = [torch.cat(b[start : start + step], dim=1) for start in starts]
        groups = {
            rank: [k for k, own in enumerate(batch.ranks) if own == rank] for rank in batch.ranks
        }
        a = batch.list_a
        scaled = list(a)
        for members in groups.values():  # the operator takes factors of one shape
            places = [start + k for start in starts for k in members]
            sums = ops.weighted_sum_list(
                [a[place] for place in places], self.terms[:, members].reshape(-1, 1)
            )
            if len(groups) == 1:
                return stacked_b, list(sums.unflatten(0, (-1, step)).flatten(1, 2))
            for place, row in zip(places, sums, strict=True):
                scaled[place] = row
        return stacked_b, [torch.cat(scaled[start : start + step]) for start in starts]


@dataclass(frozen=True)
class Solution:
    """A rule's answer for one batch."""

    adapter: Coefficients
    residual: Product | None = None
    """what the clients merge into the base beside the adapter, of a rule with a residual"""
    kept: Product | None = None
    """what the server keeps for the next round, where the rule has memory of that kind"""
    sweep: Mapping[float, Tensor] = field(default_factory=dict)
    """energy -> ranks [L], when the rule was asked for a whole curve"""
    spectrum: Spectrum | None = None
    """the singular values that the rule went by, where it used some"""

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """X [L,R,p] and Y [L,p,R] of the whole update B X Y A, residual included."""
        parts = [self.adapter] if self.residual is None else [self.adapter, self.residual]
        return torch.cat([part.x for part in parts], 2), torch.cat([part.y for part in parts], 1)

    def error(self, grams: Grams) -> Tensor:
        """||dW - B X Y A||^2, [L] float64; the stack itself differs from D on the diagonal only."""
        if isinstance(self.adapter, Stacked) and self.residual is None:
            return grams.squared_norm(grams.scale - self.adapter.scale)
        return grams.error(*self.pair)

    @property
    def ranks(self) -> Tensor:
        """Rank of what travels, residual included: [L]."""
        if self.residual is None:
            return self.adapter.ranks
        return self.adapter.ranks + self.residual.ranks


def mean(grams: Grams) -> Mixture:
    """The weighted means of both factors, different scalings folded into B.

    A client without a module counts as B = 0, so only B's weights shrink. The clients' ranks must
    be equal, see :meth:`Rule.equal_rank`.
    """
    scaling, folded = common_scaling(grams)
    total = grams.weights.sum()
    p = grams.weights / total if total > 0 else grams.weights
    return Mixture(
        q=grams.weights * folded,
        p=p.expand_as(folded).contiguous(),
        scaling=scaling,
        rank=grams.ranks[0],
    )


def common_scaling(grams: Grams) -> tuple[Tensor, Tensor]:
    """Each module's scaling for an averaging rule, [L], and the factors to fold into B, [L,K].

    Clients of one scaling keep it; different scalings are folded into B and the result's is 1.
    """
    first = grams.scalings[:, :1]
    if grams.batch.one_scaling:
        return first[:, 0], torch.ones_like(grams.scalings)
    equal = (grams.scalings == first).all(-1) & (first[:, 0] != 0)
    scaling = torch.where(equal, first[:, 0], 1.0)
    return scaling, grams.scalings / scaling[:, None]


def padded(grams: Grams, b: Tensor, a: Tensor) -> Product:
    """Factors of any ranks added up position by position, as if padded with zeros to the largest.

    Args:
        grams: of the modules.
        b: [L,R], what every stacked column of B is multiplied with.
        a: [L,R], the same for the rows of A.
    """
    widest = max(grams.ranks)
    place = torch.nn.functional.one_hot(positions(grams), widest).double()  # [R,p]
    return Product(
        x=b[:, :, None] * place,
        y=(a[:, :, None] * place).mT.contiguous(),
        ranks=grams.same_rank(widest),
    )


def holders(grams: Grams) -> Tensor:
    """w_k over the weights of all clients that have the rank position, once per stacked rank: [R].

    A client of rank r_k has the positions 1 to r_k. Where all of a position's clients have weight
    0, it is 0.
    """
    here = positions(grams)
    ranks = torch.tensor(grams.ranks, device=here.device)
    total = (ranks[None, :] > here[:, None]).double() @ grams.weights
    return grams.weights[grams.batch.owner] / total.where(total > 0, 1)


def positions(grams: Grams) -> Tensor:
    """The position of every stacked rank within its client: [R] int64."""
    device = grams.batch.device
    return torch.cat([torch.arange(rank, device=device) for rank in grams.ranks])


def between(x: Tensor, y: Tensor, begin: int, ends: Tensor) -> Product:
    """The columns of X and rows of Y from ``begin`` to each module's end, which may be before."""
    return leading(x[:, :, begin:], y[:, begin:], (ends - begin).clamp_min(0))


def leading(x: Tensor, y: Tensor, ranks: Tensor) -> Product:
    """The first ranks[l] columns of X and rows of Y, in a Product as wide as the largest rank."""
    width = max(1, int(ranks.max()))
    if (spare := width - x.shape[2]) > 0:  # nothing is left, or fewer than were asked for
        x = torch.nn.functional.pad(x, (0, spare))
        y = torch.nn.functional.pad(y, (0, 0, 0, spare))
    keep = torch.arange(width, device=ranks.device)[None, :] < ranks[:, None]
    return Product(
        x[:, :, :width].where(keep[:, None, :], 0), y[:, :width].where(keep[:, :, None], 0), ranks
    )
