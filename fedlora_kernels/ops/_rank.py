"""select_rank: how many singular values carry the wanted share of the energy.

lambda_i = sigma_i^2 at or under R eps lambda_1 counts as 0 here too, beside what spectrum and
stacked_svd have set to zero already (docs/kernels.md). The rank is the smallest p with

    sum_{i<=p} lambda_i >= (energy - 4 R eps) total_energy

or else the number of values that count, and never 0 unless the update is 0 (FLoRIST, arXiv
2506.09199, section 4; the same meaning as a float rank in PEFT's conversion).
"""

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.ops import checks
from fedlora_kernels.ops._spectrum import negligible
from fedlora_kernels.ops.operator import Operator


def select_rank(
    sigma: Tensor, total_energy: Tensor, energy: float, max_rank: int | None = None
) -> Tensor:
    """Rank per module at a share of its energy.

    Args:
        sigma: [L,R] float64, descending; trailing zeros where not computed.
        total_energy: [L] float64, the sum of all sigma^2.
        energy: in (0, 1].
        max_rank: cap, at least 1.

    Returns:
        [L] int64 on sigma's device; 0 where the update is zero.

    Raises:
        ValueError: shapes disagree, energy is outside (0, 1] or max_rank is under 1.
        TypeError: sigma or total_energy is not float64.
    """
    return SELECT_RANK(sigma, total_energy, energy, max_rank)


def _check(sigma: Tensor, total_energy: Tensor, energy: float, max_rank: int | None = None) -> None:
    checks.dimensions("sigma", sigma, 2)
    checks.double("sigma", sigma)
    checks.double("total_energy", total_energy)
    checks.sizes("total_energy", total_energy, sigma.shape[:1])
    checks.energy(energy)
    checks.max_rank(max_rank)


def _composed(
    sigma: Tensor, total_energy: Tensor, energy: float, max_rank: int | None = None
) -> Tensor:
    floor = negligible(sigma.shape[1])
    squares = sigma.square()
    squares = squares.where(squares > floor * squares[:, :1], 0)
    short = squares.cumsum(-1) < (energy - 4 * floor) * total_energy[:, None]
    ranks = torch.minimum(short.sum(-1) + 1, (squares > 0).sum(-1))
    return ranks if max_rank is None else ranks.clamp_max(max_rank)


def _fake(
    sigma: Tensor, total_energy: Tensor, energy: float, max_rank: int | None = None
) -> Tensor:
    return sigma.new_empty((sigma.shape[0],), dtype=torch.int64)


SELECT_RANK: Operator[Tensor] = Operator(
    "select_rank(Tensor sigma, Tensor total_energy, float energy, SymInt? max_rank=None) -> Tensor",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.select_rank,
)
