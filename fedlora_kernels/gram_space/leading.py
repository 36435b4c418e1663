"""Leading eigenpairs of one large positive semidefinite matrix S [d,d], proved to be the leading.

    V = [Q_1 Q_2 ...],  Q_1 random,  Q_{j+1} R_j = S Q_j - V V^T S Q_j     block Krylov space
    H = V^T S V = W diag(theta) W^T                                        Ritz values

Ritz values never exceed the eigenvalues. When p of them hold the energy that is wanted, or are as
many as are wanted, and their residuals are small, either of two bounds proves that no larger
eigenvalue was missed:

    trace(S) - sum_{i<=p} theta_i <= theta_p                      the known trace
    mu I - (S - V_p Theta_p V_p^T) has a Cholesky factorization   all its eigenvalues are positive

with mu a rounding above theta_p. The second takes d^3 / 3 multiplications and needs no gap behind
theta_p. Where neither holds before a quarter of the dimension, the whole matrix is decomposed.
"""

import torch
from torch import Tensor

from fedlora_kernels.ops._spectrum import negligible

SMALL = 256
"""Up to this dimension the whole decomposition takes milliseconds."""

BLOCK = 32
"""Columns of a block: twice the commonest LoRA rank, which is what one shared A contributes."""

CONVERGED = 1e-9
"""Residual over theta_1; theta errs by its square."""

ATTEMPTS = 4
"""Cholesky factorizations at most: together a tenth of the whole decomposition."""


def leading_eigenpairs(matrix: Tensor, wanted: float, cap: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [p] descending and eigenvectors [d,p] of a symmetric matrix [d,d] float64.

    Args:
        matrix: positive semidefinite to rounding.
        wanted: the sum of eigenvalues after which no more are needed.
        cap: how many are needed at most.
    """
    size = len(matrix)
    trace = float(matrix.trace())
    # The residuals cannot tell the last 1e-9 of the energy apart.
    part = cap <= size // 4 or wanted < (1 - CONVERGED) * trace
    if size > SMALL and part and trace > 0:
        found = _krylov(matrix, trace, wanted, min(cap, size))
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _krylov(matrix: Tensor, trace: float, wanted: float, cap: int) -> tuple[Tensor, Tensor] | None:
    """Certified pairs, or None."""
    size = len(matrix)
    limit = size // 4 // BLOCK * BLOCK
    basis, image = (matrix.new_empty(size, limit) for _ in range(2))
    inner = matrix.new_zeros(limit, limit)
    generator = torch.Generator().manual_seed(0)  # the same bits in every run
    block = torch.randn(size, BLOCK, generator=generator, dtype=matrix.dtype).to(matrix.device)
    attempts = 0
    for begin in range(0, limit, BLOCK):
        end = begin + BLOCK
        space = basis[:, :begin]
        for _ in range(2 if begin else 1):  # what is left after the first pass may be rounding
            block = torch.linalg.qr(block - space @ (space.mT @ block)).Q
        basis[:, begin:end] = block
        image[:, begin:end] = block = matrix @ block
        inner[:end, begin:end] = basis[:, :end].mT @ block
        inner[begin:end, :end] = inner[:end, begin:end].mT
        reached = float(inner.diagonal()[:end].sum()) >= wanted
        if not (reached or end >= 2 * cap):
            continue
        theta, rotation = torch.linalg.eigh(inner[:end, :end])
        theta, rotation = theta.flip(0), rotation.flip(1)
        short = int((theta.cumsum(0) < wanted).sum())
        count = min(cap, short + 1)
        if count > end:
            continue
        theta, rotation = theta[:count], rotation[:, :count]
        vectors = basis[:, :end] @ rotation
        residual = torch.linalg.vector_norm(image[:, :end] @ rotation - vectors * theta, dim=0)
        if float(residual.max()) > CONVERGED * float(theta[0]):
            continue
        if _all_known(trace, theta, size) or _none_missed(matrix, theta, vectors):
            return theta, vectors
        attempts += 1
        if attempts == ATTEMPTS:
            break
    return None


def _all_known(trace: float, theta: Tensor, size: int) -> bool:
    """Whether what the trace leaves is no more than the last Ritz value."""
    return trace - float(theta.sum()) <= float(theta[-1]) + negligible(size) * trace


def _none_missed(matrix: Tensor, theta: Tensor, vectors: Tensor) -> bool:
    """Whether S without these pairs has no eigenvalue above the last of them."""
    size = len(matrix)
    above = float(theta[-1]) * (1 + 10 * CONVERGED) + 4 * negligible(size) * float(theta[0])
    rest = torch.addmm(matrix, vectors * theta, vectors.mT, alpha=-1).neg_()
    rest.diagonal().add_(above)
    return int(torch.linalg.cholesky_ex(rest).info) == 0
