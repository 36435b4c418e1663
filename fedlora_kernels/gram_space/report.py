"""Report: how close each module's aggregate came to the ideal update, from the Grams alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.gram_space.coefficients import Solution
from fedlora_kernels.gram_space.grams import Grams, Spectrum
from fedlora_kernels.ops._spectrum import negligible

if TYPE_CHECKING:
    from fedlora_kernels.robust import Weighing


@dataclass(frozen=True)
class ModuleReport:
    """One module."""

    rank: int
    """rank of what travels (of the adapter and its residual together, where a rule has one)"""
    energy: float
    """captured share of ||dW||^2: 1 - relative_error^2"""
    relative_error: float
    """||dW - update||_F / ||dW||_F"""
    svd_floor: float
    """the same for the best update of this rank: sqrt(sum_{i>rank} sigma_i^2) / ||dW||_F"""
    norm: float
    """||dW||_F"""


class Report(dict[str, ModuleReport]):
    """Module name -> :class:`ModuleReport`, with means over the modules."""

    note: str = ""
    """what the rule says about its result beside the numbers (:attr:`Rule.note`)"""
    weighing: "Weighing | None" = None
    """how much each client counted, where a robust rule weighed them"""

    @property
    def relative_error(self) -> float:
        """Mean relative error."""
        return self._mean("relative_error")

    @property
    def svd_floor(self) -> float:
        """Mean SVD floor."""
        return self._mean("svd_floor")

    @property
    def energy(self) -> float:
        """Mean captured energy."""
        return self._mean("energy")

    @property
    def mean_rank(self) -> float:
        """Mean rank."""
        return self._mean("rank")

    def _mean(self, field: str) -> float:
        values = [float(getattr(row, field)) for row in self.values()]
        return sum(values) / len(values) if values else float("nan")

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers for JSON; None for what is not finite (an error beside a zero update)."""
        return {
            module: {
                name: value if math.isfinite(value) else None for name, value in asdict(row).items()
            }
            for module, row in self.items()
        }


@dataclass(frozen=True)
class CurvePoint:
    """One point of FLoRIST's curve of rank against error."""

    energy: float
    mean_rank: float
    relative_error: float
    """mean over the modules"""
    parameters: int
    """sum of rank * (m + n)"""


def report(grams: Grams, solution: Solution) -> Report:
    """The report of one batch, from its Grams and coefficients."""
    total = grams.energy
    error = relative(solution.error(grams), grams)
    ranks = solution.ranks
    floor = svd_floor(grams, ranks, solution.spectrum)
    columns = zip(
        ranks.tolist(), error.tolist(), floor.tolist(), total.sqrt().tolist(), strict=True
    )
    return Report(
        {
            module: ModuleReport(rank, 1 - relative_error**2, relative_error, best, norm)
            for module, (rank, relative_error, best, norm) in zip(
                grams.modules, columns, strict=True
            )
        }
    )


SHARE = 1e-6
"""From this share of ||dW||^2 on, the energy beyond a rank is a difference of ten digits."""


def svd_floor(grams: Grams, ranks: Tensor, found: Spectrum | None = None) -> Tensor:
    """sqrt(sum_{i>p} sigma_i^2 / ||dW||^2) at p = ranks, [L]: 0 without a spectrum at full rank.

    Args:
        grams: of the modules.
        ranks: p, [L].
        found: the leading singular values, p of them at least, if they are known. What lies beyond
            is ||dW||^2 without their squares; where that is less than a share of SHARE, all
            singular values are computed and the small ones summed. At R eps ||dW||^2 it is 0.
    """
    cut = ranks < grams.full_rank
    if not bool(cut.any()):
        return torch.zeros_like(ranks, dtype=torch.float64)
    found = found or grams.leading(max_rank=max(1, int(ranks.max())))
    total = found.total_energy
    beyond = total - _squares(found.sigma, ranks, beyond=False)
    beyond = beyond.where(beyond > negligible(grams.stacked_rank) * total, 0)
    beyond = beyond.where(cut, 0)  # each module by itself, whatever others are in the batch
    small = (beyond < SHARE * total) & (beyond > 0)
    if bool(small.any()):
        beyond = _squares(grams.spectrum.sigma, ranks, beyond=True).where(small, beyond)
    return relative(beyond, grams)


def _squares(sigma: Tensor, ranks: Tensor, *, beyond: bool) -> Tensor:
    """The sum of sigma_i^2 over i > p, or over i <= p: [L]."""
    places = torch.arange(sigma.shape[1], device=sigma.device)[None, :]
    chosen = (places >= ranks[:, None]) == beyond
    return sigma.square().where(chosen, 0).sum(-1)


def relative(error: Tensor, grams: Grams) -> Tensor:
    """sqrt(error / ||dW||^2), [L]; beside a zero update 0 if error is rounding, else infinite."""
    total = grams.energy
    ratio = (error / total.where(total > 0, 1)).sqrt()
    return torch.where(total > 0, ratio, torch.where(error > grams.noise, torch.inf, 0.0))


class Swept(NamedTuple):
    """One batch at one energy of the curve."""

    modules: tuple[str, ...]
    """L names"""
    ranks: Tensor
    """[L]"""
    errors: Tensor
    """[L], the SVD floor at these ranks"""
    parameters: int


def swept(grams: Grams, solution: Solution) -> dict[float, Swept]:
    """Rank and error of one batch over the energies that the rule was asked for."""
    return {
        share: Swept(
            grams.modules,
            ranks.cpu(),
            svd_floor(grams, ranks, grams.spectrum).cpu(),
            int(ranks.clamp_min(1).sum()) * sum(grams.size),
        )
        for share, ranks in solution.sweep.items()
    }


def curve(batches: Sequence[Mapping[float, Swept]]) -> list[CurvePoint]:
    """Rank against error over all batches, one point per energy. The modules are added up in the
    order of their names, so that the grouping changes no bit.
    """
    points = []
    for share in batches[0] if batches else ():
        parts = [batch[share] for batch in batches]
        names = [name for part in parts for name in part.modules]
        order = sorted(range(len(names)), key=names.__getitem__)
        ranks, errors = torch.cat([x.ranks for x in parts]), torch.cat([x.errors for x in parts])
        parameters = sum(part.parameters for part in parts)
        mean_rank = float(ranks.double().mean())
        points.append(CurvePoint(share, mean_rank, float(errors[order].mean()), parameters))
    return points
