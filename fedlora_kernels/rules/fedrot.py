"""FedRot-LoRA (arXiv 2602.23638, ICML 2026): clients rotated toward the last global adapter first.

    A = sum_k w_k R_k^T A_k        B = sum_k w_k B_k R_k

B_k R_k R_k^T A_k is the same update for every rotation R_k, but averages are not. R_k is the
rotation in SO(r) that brings A_k nearest to the last global A (Procrustes: the polar factor of
A_k A^T), or B_k to B in every other round, and goes only part of the way: the polar factor of
(1 - softness) I + softness R_k. The first round has nothing to rotate to and is FedIT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlora_kernels.rules._rule import Rule, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels._aggregation import Aggregation
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams


@dataclass(frozen=True)
class FedRot(Rule):
    """The averages of rotated factors. Rounds count from 0: B is brought near in odd rounds, A in
    even ones.
    """

    title = "FedRot-LoRA"
    paper = "2602.23638"
    exact = "product of rotated means, not exact"

    softness: float = option(0.5, "how far to rotate, in [0, 1]: 0 is FedIT, 1 rotates fully")
    rounds: int = field(default=0, repr=False)
    """how many rounds there were; set by :meth:`recalled`, no option"""

    def __post_init__(self) -> None:
        """Raises ValueError: softness is out of range."""
        if not 0 <= self.softness <= 1:
            raise ValueError(f"softness must lie in [0, 1], found {self.softness}")

    def solve(self, grams: Grams) -> Solution:
        """The means of both factors, each client's rotated.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module. Or the carried
                adapter has another rank.
        """
        from torch.nn.functional import pad

        from fedlora_kernels.gram_space.coefficients import Product, Solution, mean

        self.equal_rank(grams)
        averages = mean(grams)
        count = len(grams.batch.client_ranks)
        if count in (0, len(grams.ranks)):  # the last global adapter, or all clients, lack these
            return Solution(averages)
        rank = grams.ranks[0]
        self.carried_rank(grams)
        products = (grams.b if self.rounds % 2 else grams.a)[:, : count * rank, count * rank :]
        turned = self._rotations(products.unflatten(1, (count, rank)))
        scaled = (averages.scaling[:, None] * averages.q)[:, :count, None, None] * turned
        mixed = averages.p[:, :count, None, None] * turned
        x, y = (pad(side.flatten(1, 2), (0, 0, 0, rank)) for side in (scaled, mixed))
        ranks = grams.same_rank(rank)
        return Solution(Product(x, y.mT.contiguous(), ranks, averages.scaling))

    def _rotations(self, products: Tensor) -> Tensor:
        """R_k of the products A_k A^T or B_k^T B, [L,K,r,r]."""
        import torch

        from fedlora_kernels.ops.product import decomposed, product

        left, _, right = decomposed(torch.linalg.svd, products)
        flipped = torch.linalg.det(product(left, right)) < 0
        last = torch.ones_like(left[..., 0])
        last[..., -1] = torch.where(flipped, -1.0, 1.0)
        identity = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
        there = product(left * last[..., None, :], right)
        left, _, right = decomposed(
            torch.linalg.svd, (1 - self.softness) * identity + self.softness * there
        )
        # A client without an update has no direction to rotate.
        zero = (products == 0).all(-1).all(-1)[..., None, None]
        return identity.where(zero, product(left, right))

    def joins(self, carried: Any) -> Sequence[tuple[Adapter, float]]:
        """The last global adapter, with weight 0."""
        return () if carried is None else ((carried["adapter"], 0.0),)

    def recalled(self, carried: Any) -> FedRot:
        """The rule that knows how many rounds there were."""
        return self if carried is None else replace(self, rounds=carried["rounds"])

    def carry(self, result: Aggregation) -> Any:
        """The global adapter, and how many rounds there were."""
        before = 0 if result.recalled is None else result.recalled["rounds"]
        return {"adapter": result.adapter, "rounds": before + 1}
