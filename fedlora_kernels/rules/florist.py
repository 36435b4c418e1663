"""FLoRIST (arXiv 2506.09199, MLSys 2026): the truncated SVD at a share of each module's energy.

    dW = U S V^T        p = smallest rank with sum_{i<=p} sigma_i^2 >= energy * ||dW||_F^2
    B = U_p S_p         A = V_p^T        (split="b"; "balanced" puts sqrt(S) on both, "a" S on A)

The paper decomposes the stacked B, the stacked A and a core; two Gram matrices and one
eigenproblem give the same factors. Singular values are not shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedlora_kernels.rules._rule import Rule, at_least_one, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.coefficients import Solution
    from fedlora_kernels.gram_space.grams import Grams, Spectrum

Split = Literal["b", "balanced", "a"]


@dataclass(frozen=True)
class FLoRIST(Rule):
    """The leading components, as many as hold a share of each module's energy."""

    title = "FLoRIST"
    paper = "2506.09199"
    exact = "best of its rank, rank by energy"
    heterogeneous = True
    bounded = True
    preferred = True

    energy: float = option(0.9, "share of the energy that each module keeps, in (0, 1]")
    rank: int | None = option(
        None, "a fixed rank in the place of energy, at most min(R, m, n); R: sum of client ranks"
    )
    max_rank: int | None = option(None, "the largest rank of a module; default: no limit")
    rank_budget: int | None = option(
        None,
        "the sum of all modules' ranks, in the place of energy; ranks go first to where the energy "
        "per parameter, sigma^2 / (m + n), is largest; every non-zero module gets at least one",
    )
    energies: Sequence[float] = option(
        (), "more energies to report ranks and errors for, from the same factorization"
    )
    split: Split = option("b", "which factor carries the singular values: b, balanced or a")
    spent: Mapping[str, int] | None = field(default=None, repr=False)
    """module -> the rank that rank_budget came to; set by :meth:`prepared`, no option"""

    def __post_init__(self) -> None:
        """Raises ValueError: an option is out of range, or rank and rank_budget are both given."""
        if self.split not in get_args(Split):
            expected = ", ".join(get_args(Split))
            raise ValueError(f"split must be one of {expected}, found {self.split!r}")
        at_least_one(rank=self.rank, max_rank=self.max_rank, rank_budget=self.rank_budget)
        if self.rank is not None and self.rank_budget is not None:
            raise ValueError("rank and rank_budget cannot both be given")
        for share in (self.energy, *self.energies):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"energy must lie in (0, 1], found {share}")

    def solve(self, grams: Grams) -> Solution:
        """The leading singular components of each module."""
        from fedlora_kernels.gram_space.coefficients import Solution, leading

        found = self._spectrum(grams)
        if self.spent is not None:
            ranks = found.sigma.new_tensor([self.spent[name] for name in grams.modules]).long()
        elif self.rank is not None:
            ranks = grams.same_rank(self._cap(grams))
        else:
            ranks = self._at(self.energy, grams, found)
        return Solution(
            leading(*found.split(self.split), ranks=ranks),
            sweep={share: self._at(share, grams, found) for share in self.energies},
            spectrum=found,
        )

    @property
    def joint(self) -> bool:
        """One budget for the whole model: its modules compete."""
        return self.rank_budget is not None

    def noted(self, grams: Grams) -> Mapping[str, Any]:
        """The energies per parameter of each module's ranks."""
        sigma = grams.spectrum.sigma[:, : self._cap(grams)].cpu()
        return dict(zip(grams.modules, sigma.square() / sum(grams.size), strict=True))

    def knowing(self, notes: Mapping[str, Any]) -> FLoRIST:
        """The budget spent. Greedy is optimal: within a module the values fall, so each is bought
        after the last.

        Raises:
            ValueError: the budget is less than rank 1 for each module whose update is not zero.
        """
        import torch

        assert self.rank_budget is not None
        counts = torch.tensor([len(worth) for worth in notes.values()])
        owners = torch.arange(len(notes)).repeat_interleave(counts)
        values = torch.cat(list(notes.values()))
        starts = counts.cumsum(0) - counts
        values[starts] = values[starts].where(values[starts] == 0, torch.inf)  # at least rank 1
        live = int((values == torch.inf).sum())
        if self.rank_budget < live:
            raise ValueError(
                f"rank_budget {self.rank_budget} is less than rank 1 for each of {live} modules"
            )
        order = values.argsort(descending=True, stable=True)[: self.rank_budget]
        bought = owners[order[values[order] > 0]].bincount(minlength=len(notes))
        return replace(self, spent=dict(zip(notes, bought.tolist(), strict=True)))

    @property
    def merging(self) -> FLoRIST:
        """All of the sum: every option looks at the sum of the products alone."""
        return FLoRIST(energy=1.0)

    def widest(self, ranks: Sequence[int], size: tuple[int, int]) -> int:
        """At most min(R, m, n), and no more than rank or max_rank."""
        caps = [cap for cap in (self.rank, self.max_rank) if cap is not None]
        return min(sum(ranks), *size, *caps)

    def _cap(self, grams: Grams) -> int:
        return self.widest(grams.ranks, grams.size)

    def _spectrum(self, grams: Grams) -> Spectrum:
        """As many singular values as the options ask for."""
        if self.energies or self.joint:
            return grams.spectrum
        if self.rank is not None:
            return grams.leading(max_rank=self._cap(grams))
        return grams.leading(self.energy, self._cap(grams))

    def _at(self, energy: float, grams: Grams, found: Spectrum) -> Tensor:
        """The ranks at a share of the energy: [L]."""
        from fedlora_kernels import ops
        from fedlora_kernels.ops import checks

        checks.resolvable(energy, grams.precision)
        return ops.select_rank(found.sigma, found.total_energy, energy, self._cap(grams))
