"""FedSVD (arXiv 2505.12805): FFA-LoRA whose fixed A is chosen anew by the server every round.

    (sum_k w_k s_k B_k) A_0 = U S V^T        B = U S        A = V^T

The clients hold one A and train B alone; the mean is exact. What comes back has orthonormal rows of
A, which stay fixed for the next round. The decomposition works on two r x r matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.rules._rule import Rule

if TYPE_CHECKING:
    from fedlora_kernels.adapters.adapter import Adapter
    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams
    from fedlora_kernels.rules.ffa import FFA


@dataclass(frozen=True)
class FedSVD(Rule):
    """The singular components of the mean B times the common A."""

    title = "FedSVD"
    paper = "2505.12805"
    travels = "B up; B and A down"
    exact = "exact"
    sends = "b"
    returns = "both"
    trains = "b"

    @property
    def merging(self) -> FFA:
        """The mean of B beside the common A, which is decomposed at the root alone."""
        from fedlora_kernels.rules.ffa import FFA

        return FFA()

    def solve(self, grams: Grams) -> Solution:
        """The singular components, as coefficients of the mean B and the first client's A.

        Raises:
            AdapterError: clients' ranks differ; names the client and the module.
        """
        import torch

        from fedlora_kernels.gram_space.coefficients import Mixture, Product, Solution
        from fedlora_kernels.ops.product import decomposed, product

        self.equal_rank(grams)
        rank = grams.ranks[0]
        first = torch.zeros_like(grams.scalings)
        first[:, 0] = 1
        ones = torch.ones_like(grams.scalings[:, 0])
        mean = Mixture(grams.weights * grams.scalings, first, ones, rank)
        # Rows of A of length 1 first: A and B of one rank may be of very different size.
        inner = product(product(mean.y, grams.a), mean.y.mT)
        length = inner.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = (1 / length).where(length > 0, 0)
        x, y = mean.x * length[:, None, :], inverse[:, :, None] * mean.y
        # A = T V_A^T and B T = U S W^T: A's own directions stay where B is zero, so that the next
        # round can train them.
        values, basis = decomposed(
            torch.linalg.eigh, inverse[:, :, None] * inner * inverse[:, None, :]
        )
        values = values.where(values > 4 * rank * torch.finfo(values.dtype).eps, 0)
        root = values.sqrt()
        into = basis * root[:, None, :]
        back = basis.mT * (1 / root).where(root > 0, 0)[:, :, None]
        x = product(x, into)
        _, turned = decomposed(torch.linalg.eigh, product(product(x.mT, grams.b), x))
        turned = turned.flip(-1)
        y = product(product(turned.mT, back), y)
        return Solution(Product(product(x, turned), y, grams.same_rank(rank)))

    def validate(self, adapters: Sequence[Adapter]) -> None:
        """Refuse clients whose A differs from the first client's.

        Raises:
            AdapterError: names the client, the module and the client it differs from.
        """
        self.common_a(adapters)
