"""Report: how close each module's aggregate came to the ideal update, from the Grams alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.solution import Solution


@dataclass(frozen=True)
class ModuleReport:
    """One module."""

    rank: int
    """rank of what travels (FedEx: averages and residual together)"""
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
    floor = svd_floor(grams, ranks)
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


def svd_floor(grams: Grams, ranks: Tensor) -> Tensor:
    """sqrt(sum_{i>p} sigma_i^2 / ||dW||^2) at p = ranks, [L]: 0 without a spectrum at full rank."""
    if bool((ranks >= grams.full_rank).all()):
        return torch.zeros_like(ranks, dtype=torch.float64)
    sigma, _, _, _ = grams.spectrum
    beyond = torch.arange(sigma.shape[1], device=sigma.device)[None, :] >= ranks[:, None]
    return relative(sigma.square().where(beyond, 0).sum(-1), grams)


def relative(error: Tensor, grams: Grams) -> Tensor:
    """sqrt(error / ||dW||^2), [L]; beside a zero update 0 if error is rounding, else infinite."""
    total = grams.energy
    ratio = (error / total.where(total > 0, 1)).sqrt()
    return torch.where(total > 0, ratio, torch.where(error > grams.noise, torch.inf, 0.0))


class Swept(NamedTuple):
    """One batch at one energy of the curve."""

    ranks: Tensor
    """[L]"""
    errors: Tensor
    """[L], the SVD floor at these ranks"""
    parameters: int


def swept(grams: Grams, solution: Solution) -> dict[float, Swept]:
    """Rank and error of one batch over the energies that the rule was asked for."""
    return {
        share: Swept(
            ranks.cpu(),
            svd_floor(grams, ranks).cpu(),
            int(ranks.clamp_min(1).sum()) * sum(grams.size),
        )
        for share, ranks in solution.sweep.items()
    }


def curve(batches: Sequence[Mapping[float, Swept]]) -> list[CurvePoint]:
    """Rank against error over all batches, one point per energy."""
    points = []
    for share in batches[0] if batches else ():
        parts = [batch[share] for batch in batches]
        ranks, errors = torch.cat([x.ranks for x in parts]), torch.cat([x.errors for x in parts])
        parameters = sum(part.parameters for part in parts)
        mean_rank = float(ranks.double().mean())
        points.append(CurvePoint(share, mean_rank, float(errors.mean()), parameters))
    return points
