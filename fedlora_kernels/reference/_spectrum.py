"""Singular values and vectors of B D A from the two Gram matrices alone."""

import torch

from fedlora_kernels.reference._rank import counted


def root(gram: torch.Tensor) -> torch.Tensor:
    """Return F with F^T F = gram, for one positive semidefinite matrix of any grading.

    The columns are brought to unit length first (C = N^-1 gram N^-1 with N^2 the diagonal), because
    the SVD of C is accurate relative to each column while that of the Gram matrix is accurate
    relative to the longest column only:  C = U S U^T,  F = S^(1/2) U^T N.

    Args:
        gram: [R, R] float64.

    Returns:
        [R, R] float64.
    """
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    cosines = inverse[:, None] * gram * inverse
    _, values, vectors = torch.linalg.svd((cosines + cosines.mT) / 2)
    factor: torch.Tensor = values.sqrt()[:, None] * vectors * norms
    return factor


def spectrum(
    gram_b: torch.Tensor,
    gram_a: torch.Tensor,
    scale: torch.Tensor,
    energy: float = 1.0,
    max_rank: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular value decomposition of dW = B D A in the coordinates of the stacks.

    Any F_B, F_A with F_B^T F_B = G_B and F_A^T F_A = G_A differ from B and A^T by orthonormal
    columns only, so the core F_B D F_A^T = U_c Sigma V_c^T has the singular values of dW, and

        left  = D F_A^T V_c            B left  = U Sigma
        right = Sigma^+ U_c^T F_B D    right A = V^T

    Accuracy: a Gram matrix in float64 resolves singular values down to sqrt(eps) of the largest of
    its columns brought to unit length.  Components that count as zero (``rank.counted``) are below
    that: they are zero here.

    Args:
        gram_b: [L, R, R] float64, B^T B.
        gram_a: [L, R, R] float64, A A^T.
        scale: [L, R], the diagonal of D.
        energy: taken for the operator's signature; the reference computes every component.
        max_rank: likewise.

    Returns:
        sigma [L, R] descending, total_energy [L] = ||dW||^2, left [L, R, R], right [L, R, R], all
        float64, and info [L] int64, zero.
    """
    del energy, max_rank
    scale = scale.double()
    sigmas, totals, lefts, rights = [], [], [], []
    for module_gram_b, module_gram_a, diagonal in zip(gram_b, gram_a, scale, strict=True):
        factor_b, factor_a = root(module_gram_b), root(module_gram_a)
        core = (factor_b * diagonal) @ factor_a.mT
        core_left, sigma, core_right = torch.linalg.svd(core)
        terms = module_gram_b.diagonal() * diagonal.square() * module_gram_a.diagonal()
        sigma = counted(sigma, terms)
        kept = sigma > 0
        inverse = torch.where(kept, 1 / sigma, torch.zeros_like(sigma))
        sigmas.append(sigma)
        totals.append(core.square().sum())
        lefts.append(diagonal[:, None] * (factor_a.mT @ core_right.mT) * kept)
        rights.append(inverse[:, None] * (core_left.mT @ factor_b) * diagonal)
    info = torch.zeros(len(sigmas), dtype=torch.int64, device=scale.device)
    return (
        torch.stack(sigmas),
        torch.stack(totals),
        torch.stack(lefts),
        torch.stack(rights),
        info,
    )
