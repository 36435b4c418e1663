"""Correctness: what must hold of an output before its time is printed.

Everything is compared in float64 through QR decompositions or the dense update, never through Gram
matrices, which are what is being measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.stand.inputs import Stacks
from fedlora_kernels import reference

Pair = tuple[Tensor, Tensor]
"""One module's B_g [m,p] and A_g [p,n], scaling included."""

PRODUCT = 1e-6
"""Relative error allowed to fp32 products, and to bf16 ones times BF16."""

FAST = 64 * torch.finfo(torch.float32).eps
"""What float32 accumulation owes, relative to the lengths of the vectors multiplied."""

EXACT = 1e-11
"""What float64 accumulation owes at a stacked rank of 2048: R * eps = 5e-13, and room."""

ENERGY_EXACT = 1e-9
"""What a float64 factorization of Gram matrices owes to an error's square."""

OUTPUT_EPS = {
    torch.float64: PRODUCT,
    torch.float32: PRODUCT,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
}
"""Relative error allowed to a product of factors of a dtype: each is rounded once."""


@dataclass(frozen=True)
class Check:
    """One number that must not exceed another; NaN does not pass."""

    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the number may be printed."""
        return self.error <= self.tolerance


def distances(stacks: Stacks, pairs: Sequence[Pair]) -> Tensor:
    """||dW - B_g A_g||_F of every module, [L] float64, accurate to eps ||dW||.

    With E = [B D | -B_g] [A ; A_g] and both factors' triangles from QR, ||E|| = ||R_1 R_2^T||.
    """
    found = []
    for index, (b_g, a_g) in enumerate(pairs):
        b, a = stacks.b[index].double(), stacks.a[index].double()
        left = torch.cat([b * stacks.scale[index], -b_g.double()], dim=1)
        right = torch.cat([a, a_g.double()])
        if left.shape[1] >= min(left.shape[0], right.shape[1]):
            found.append(torch.linalg.matrix_norm(left @ right))
            continue
        upper_left = torch.linalg.qr(left, mode="r")[1]
        upper_right = torch.linalg.qr(right.mT, mode="r")[1]
        found.append(torch.linalg.matrix_norm(upper_left @ upper_right.mT))
    return torch.stack(found)


def svd_floors(stacks: Stacks, ranks: Sequence[int]) -> Tensor:
    """sqrt(sum_{i>p} sigma_i^2) of every module, [L] float64."""
    squares = stacks.sigma.square()
    tails = [row[rank:].sum().sqrt() for row, rank in zip(squares, ranks, strict=True)]
    return torch.stack(tails)


def near_optimal(
    stacks: Stacks, pairs: Sequence[Pair], tolerance: float | None = None
) -> list[Check]:
    """(||dW - B_g A_g|| - SVD floor at the pair's rank) / ||dW||, the worst module's."""
    floors = svd_floors(stacks, [a_g.shape[0] for _, a_g in pairs])
    excess = (distances(stacks, pairs) - floors) / stacks.total_energy.sqrt()
    bound = OUTPUT_EPS[stacks.case.dtype] if tolerance is None else tolerance
    return [Check("error above the SVD floor / |dW|", float(excess.max()), bound)]


def exact_product(stacks: Stacks, pairs: Sequence[Pair]) -> list[Check]:
    """||dW - B_g A_g|| / ||dW||, the worst module's."""
    error = distances(stacks, pairs) / stacks.total_energy.sqrt()
    return [Check("error / |dW|", float(error.max()), OUTPUT_EPS[stacks.case.dtype])]


def expected_ranks(stacks: Stacks, energy: float, max_rank: int | None) -> Tensor:
    """The float64 reference's ranks, [L]."""
    return reference.select_rank(stacks.sigma, stacks.total_energy, energy, max_rank)


def same_ranks(
    stacks: Stacks, ranks: Sequence[int], energy: float, max_rank: int | None
) -> list[Check]:
    """The largest difference to the float64 reference's ranks, which must be none."""
    expected = expected_ranks(stacks, energy, max_rank).cpu()
    difference = (torch.tensor(list(ranks)) - expected).abs().max()
    return [Check("ranks beside the float64 reference", float(difference), 0.0)]


def threshold_gap(stacks: Stacks, energy: float) -> float:
    """How far the nearest cumulative share of energy is from the threshold, over all modules."""
    shares = stacks.sigma.square().cumsum(-1) / stacks.total_energy[:, None]
    return float((shares - energy).abs().min())


def same_gram(found: Tensor, x: Tensor, rows: bool, tolerance: float) -> Check:
    """max |G_ij - reference| / (|x_i| |x_j|)."""
    expected = reference.gram(x, rows)
    norms = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (found.double() - expected).abs() / (norms[:, :, None] * norms[:, None, :])
    return Check("entry error / vector lengths", float(error.max()), tolerance)


def same_tensor(found: Tensor, expected: Tensor, tolerance: float) -> Check:
    """||found - expected||_F / ||expected||_F, the worst module's."""
    found, expected = (x.cpu().double().flatten(1) for x in (found, expected))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return Check("error / norm", float(error.max()), tolerance)


def same_singular_values(stacks: Stacks, sigma: Tensor, kept: Tensor | None = None) -> Check:
    """max |sigma_i^2 - reference| / ||dW||^2 over each module's leading ``kept`` [L] values."""
    count = min(sigma.shape[1], stacks.sigma.shape[1])
    error = (sigma[:, :count].square() - stacks.sigma[:, :count].square()).abs()
    if kept is not None:
        error = error.where(torch.arange(count, device=error.device) < kept[:, None], 0)
    worst = (error / stacks.total_energy[:, None]).max()
    return Check("sigma^2 error / |dW|^2", float(worst), EXACT)
