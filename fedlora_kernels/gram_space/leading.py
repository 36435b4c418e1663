"""Leading eigenpairs of a large Gram matrix S = F^T F, F [c,d], proved to be the leading.

    V = [Q_1 Q_2 ...],  Q_1 random,  Q_{j+1} R_j = S Q_j - V V^T S Q_j     block Krylov space
    H = V^T S V = W diag(theta) W^T                          k Ritz values, one for each column of V

Ritz values never exceed the eigenvalues. When p of them hold the energy that is wanted, or are as
many as are wanted, and their residuals are small, either of two bounds proves that no larger
eigenvalue was missed:

    trace(S) - sum_{i<=k} theta_i + theta_{p+1} <= theta_p        the known trace, ||F||^2
    mu I - (S - V_p Theta_p V_p^T) has a Cholesky factorization   all its eigenvalues are positive

The first is about S without the p pairs, whose trace is known and whose Ritz values are the other
k - p: no eigenvalue of it is larger than what is left of the trace beside all of those but the
largest. In the second, mu is a rounding above theta_p. It takes d^3 / 3 multiplications, needs no
gap behind theta_p, and is what S is formed for; the products S Q are F^T (F Q) until then. Where
neither holds before a quarter of the dimension, the whole matrix is decomposed.
"""

from functools import cached_property

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.ops._spectrum import negligible

SMALL = 256
"""Up to this dimension the whole decomposition takes milliseconds."""

BLOCK = 32
"""Columns of a block: twice the commonest LoRA rank, which is what one shared A contributes."""

CONVERGED = 1e-9
"""Residual over theta_1; theta errs by its square."""

ATTEMPTS = 4
"""Cholesky factorizations at most: together a tenth of the whole decomposition."""


class Square:
    """S = F^T F, [d,d]: formed when something asks for its entries."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self.trace = float(torch.linalg.vector_norm(factor).square())

    def __len__(self) -> int:
        return self.factor.shape[1]

    @cached_property
    def matrix(self) -> Tensor:
        """S."""
        found: Tensor = ops.gram(self.factor[None], rows=False)
        return found[0]

    def of_rows(self, block: Tensor) -> Tensor:
        """Q S for rows Q [k,d]."""
        if "matrix" in self.__dict__:
            return block @ self.matrix
        return block @ self.factor.mT @ self.factor


def leading_eigenpairs(factor: Tensor, energy: float, cap: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [p] descending and eigenvectors [d,p] of S = F^T F.

    Args:
        factor: F, [c,d] float64 with c >= d.
        energy: the share of the trace after which no more are needed.
        cap: how many are needed at most.
    """
    square = Square(factor)
    size, wanted = len(square), energy * square.trace
    # The residuals cannot tell the last 1e-9 of the energy apart.
    part = cap <= size // 4 or energy < 1 - CONVERGED
    if size > SMALL and part and square.trace > 0:
        found = _krylov(square, wanted, min(cap, size))
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(square.matrix)
    return values.flip(0), vectors.flip(1)


def _krylov(square: Square, wanted: float, cap: int) -> tuple[Tensor, Tensor] | None:
    """Certified pairs, or None.

    Vectors are rows here: with them as columns, products take up to ten times as long on a CPU.
    """
    size = len(square)
    limit = size // 4 // BLOCK * BLOCK
    basis, image = (square.factor.new_empty(limit, size) for _ in range(2))
    inner = square.factor.new_zeros(limit, limit)
    generator = torch.Generator().manual_seed(0)  # the same bits in every run
    block = torch.randn(BLOCK, size, generator=generator, dtype=basis.dtype).to(basis.device)
    attempts = 0
    for begin in range(0, limit, BLOCK):
        end = begin + BLOCK
        space = basis[:begin]
        for _ in range(2 if begin else 1):  # what is left after the first pass may be rounding
            block = torch.linalg.qr((block - block @ space.mT @ space).mT).Q.mT
        basis[begin:end] = block
        image[begin:end] = block = square.of_rows(block)
        inner[begin:end, :end] = block @ basis[:end].mT
        inner[:end, begin:end] = inner[begin:end, :end].mT
        reached = float(inner.diagonal()[:end].sum()) >= wanted
        if not (reached or end >= 2 * cap):
            continue
        theta, rotation = torch.linalg.eigh(inner[:end, :end])
        theta, rotation = theta.flip(0), rotation.flip(1)
        short = int((theta.cumsum(0) < wanted).sum())
        count = min(cap, short + 1)
        if count > end:
            continue
        found, turn = theta[:count], rotation[:, :count].mT
        vectors = turn @ basis[:end]
        missed = turn @ image[:end] - found[:, None] * vectors
        residual = torch.linalg.vector_norm(missed, dim=1)
        if float(residual.max()) > CONVERGED * float(theta[0]):
            continue
        columns = vectors.mT
        if _all_known(square.trace, theta, count, size) or _none_missed(
            square.matrix, found, columns
        ):
            return found, columns
        attempts += 1
        if attempts == ATTEMPTS:
            break
    return None


def _all_known(trace: float, theta: Tensor, count: int, size: int) -> bool:
    """Whether what the trace leaves lets no eigenvalue be above the last of `count` pairs; theta
    are all Ritz values.
    """
    above = trace - float(theta[:count].sum()) - float(theta[count + 1 :].sum())
    return above <= float(theta[count - 1]) + negligible(size) * trace


def _none_missed(matrix: Tensor, theta: Tensor, vectors: Tensor) -> bool:
    """Whether S without these pairs has no eigenvalue above the last of them."""
    size = len(matrix)
    above = float(theta[-1]) * (1 + 10 * CONVERGED) + 4 * negligible(size) * float(theta[0])
    rest = torch.addmm(matrix, vectors * theta, vectors.mT, alpha=-1).neg_()
    rest.diagonal().add_(above)
    return int(torch.linalg.cholesky_ex(rest).info) == 0
