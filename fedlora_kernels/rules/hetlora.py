"""HetLoRA (arXiv 2401.06432): factors zero-padded to the largest rank and averaged.

    A = sum_k v_k [A_k ; 0]    B = sum_k v_k [s_k B_k | 0]    v_k ~ ||dW_k||_F, dW_k of all modules

As published, a client has one weight for its whole adapter, and its number of examples n_k does not
count. Client k takes the first r_k rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class HetLoRA(Rule):
    """The padded averages. Where every update is zero, clients count equally (or by n_k, where
    that is asked for). A client of weight 0 counts as absent.
    """

    title = "HetLoRA"
    paper = "2401.06432"
    exact = "padded averages, not exact"
    heterogeneous = True
    receives = "leading"
    of_holders = True

    norm_weighted: bool = option(
        True,
        "weight a client by the norm of its update (the paper's sparsity-weighted aggregation), "
        "and not by its own weight; otherwise plain zero-padding, with the clients' own weights",
    )
    per_module: bool = option(
        False, "take the norm of each module by itself, instead of one norm over all modules"
    )
    example_weighted: bool = option(
        False, "multiply the norm by the client's own weight, which the paper does not do"
    )
    norms: Mapping[int, float] | None = field(default=None, repr=False)
    """client -> its weight times the norm, over all modules; set by :meth:`prepared`, no option"""

    @property
    def averages(self) -> bool:
        """A client's norm is known when it is read, but a result holds no sum of the norms."""
        return not self.norm_weighted

    @property
    def merging(self) -> HetLoRA | None:
        """Itself, where it averages: zeros beside a mean are the mean of zeros."""
        return self if self.averages else None

    def solve(self, grams: Grams) -> Solution:
        """The coefficients that pad and average."""
        from fedlora_kernels.gram_space.coefficients import Solution, padded

        weights = self._weights(grams)
        per_rank_b = (weights * grams.scalings) @ grams.membership.T  # [L,R]
        # Clients without a module count as B = 0: only B's weights sum to less than 1. Where B is
        # zero, A is still a mean of the clients', so that the module can be trained.
        of_a = weights.where(weights.sum(-1, keepdim=True) > 0, grams.weights)
        total = of_a.sum(-1, keepdim=True)
        per_rank_a = (of_a / total.where(total > 0, 1)) @ grams.membership.T
        return Solution(padded(grams, per_rank_b, per_rank_a))

    @property
    def reweighs(self) -> bool:
        """By the norms of their updates."""
        return self.norm_weighted

    @property
    def joint(self) -> bool:
        """One norm over all modules."""
        return self.norm_weighted and not self.per_module

    @property
    def note(self) -> str:
        """What became of the clients' own weights."""
        if not self.norm_weighted or self.example_weighted:
            return ""
        return (
            "the clients' weights (numbers of examples) were not used, except that a client of "
            "weight 0 is left out: each client counts by the norm of its update"
        )

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """Of each module, client -> its share of all weights and its squared norm."""
        shares = grams.batch.shares.tolist()
        return {
            module: dict(zip(grams.batch.clients, zip(shares, squares, strict=True), strict=True))
            for module, squares in zip(grams.modules, _squared_norms(grams).tolist(), strict=True)
        }

    def knowing(self, notes: Mapping[str, Any]) -> HetLoRA:
        """The clients' weights, which sum to 1 over all clients of the round."""
        squares: dict[int, list[float]] = {}
        own: dict[int, float] = {}
        for found in notes.values():
            for k, (share, square) in found.items():
                squares.setdefault(k, []).append(square)
                own[k] = share if self.example_weighted else float(share > 0)
        norms = {k: own[k] * math.sqrt(math.fsum(found)) for k, found in squares.items()}
        if not sum(norms.values()) > 0:
            norms = own
        total = sum(norms.values())
        return replace(self, norms={k: norm / (total or 1.0) for k, norm in norms.items()})

    def _weights(self, grams: Grams) -> Tensor:
        """v_k of every module, [L,K]."""
        if not self.norm_weighted:
            return grams.weights.expand_as(grams.scalings)
        if self.norms is None:
            return self._by_module(grams)
        weights = grams.weights.new_tensor([self.norms[k] for k in grams.batch.clients])
        if grams.batch.renormalized and bool(weights.sum() > 0):
            weights = weights / weights.sum()
        return weights.expand_as(grams.scalings)

    def _by_module(self, grams: Grams) -> Tensor:
        """The same with the norms of each module, scaled to the sum of the clients' weights."""
        own = grams.weights if self.example_weighted else (grams.weights > 0).double()
        weighted = own * _squared_norms(grams).sqrt()
        weighted = weighted.where(weighted.sum(-1, keepdim=True) > 0, own)
        total = weighted.sum(-1, keepdim=True)
        return weighted / total.where(total > 0, 1) * grams.weights.sum()


def _squared_norms(grams: Grams) -> Tensor:
    """||s_k B_k A_k||^2, [L,K]."""
    return grams.client_products.diagonal(dim1=-2, dim2=-1).clamp_min(0)
