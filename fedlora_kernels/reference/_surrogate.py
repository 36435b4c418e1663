"""FLoRA-NA's coefficients: the nearest surrogate of the mean update inside the clients' spans."""

import torch

from fedlora_kernels.reference._spectrum import root

_EPS = torch.finfo(torch.float64).eps
_STEPS = 300


def surrogate(
    gram_b: torch.Tensor,
    gram_a: torch.Tensor,
    weights: torch.Tensor,
    scale: torch.Tensor,
    max_sweeps: int = 50,
    tol: float = 1e-12,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return p and q minimizing the distance between a product of averages and dW.

    With the scalings folded into B (B~_u = s_u B_u) and R = K r:

        f(p, q) = || sum_k w_k B~_k A_k - (sum_u q_u B~_u) (sum_v p_v A_v) ||_F^2

    The operators alternate least squares in Gram space.  Here factors with the given Gram matrices
    are written out and the dense residual is minimized over p and q jointly by a damped Newton
    method, once from p = q = w (FedIT) and once from the client with the largest w_k ||B~_k A_k||_F
    alone; the smaller result counts.  f can have several local minima: compare objectives, never p
    and q.

    Args:
        gram_b: [L, R, R] float64, of the stacked B without scalings.
        gram_a: [L, R, R] float64.
        weights: [K].
        scale: [L, K], the clients' scalings s_k.
        max_sweeps: length of the trace of the objective.
        tol: taken for the operator's signature; the reference runs until it no longer moves.

    Returns:
        p [L, K] and q [L, K] with equal norms, float64; objective [L, max_sweeps + 1] float64,
        FedIT's value first, then the minimum.

    Source: FLoRA-NA (arXiv 2509.26399), the nearly accurate surrogate matrices; the paper leaves
    the solver open.
    """
    del tol
    modules, clients = scale.shape
    weights, scale = weights.double(), scale.double()
    p = torch.empty(modules, clients, dtype=torch.float64, device=gram_b.device)
    q = torch.empty_like(p)
    objective = torch.empty(modules, max_sweeps + 1, dtype=torch.float64, device=gram_b.device)
    for module in range(modules):
        stacked_b, stacked_a = root(gram_b[module]), root(gram_a[module])
        # Blocks of unit norm; the norms go into the coefficients, so that no start is badly scaled.
        blocks_b = torch.stack(stacked_b.chunk(clients, dim=1)) * scale[module, :, None, None]
        blocks_a = torch.stack(stacked_a.chunk(clients, dim=1)).mT
        norms_b, norms_a = _norms(blocks_b), _norms(blocks_a)
        blocks_b = blocks_b / norms_b[:, None, None]
        blocks_a = blocks_a / norms_a[:, None, None]
        updates = (weights * norms_b * norms_a)[:, None, None] * (blocks_b @ blocks_a)
        target = updates.sum(dim=0)
        magnitude = torch.linalg.matrix_norm(updates).sum()
        best_q, best_p = weights * norms_b, weights * norms_a
        objective[module] = _residual(blocks_b, blocks_a, target, best_q, best_p).square().sum()
        if magnitude > 0:
            alone = torch.zeros_like(best_q)
            dominant = torch.linalg.matrix_norm(updates).argmax()
            alone[dominant] = 1.0
            product = blocks_b[dominant] @ blocks_a[dominant]
            share = (product * target).sum() / product.square().sum()
            for start_q, start_p in ((best_q, best_p), (alone * share, alone)):
                end_q, end_p, value = _minimize(
                    blocks_b, blocks_a, target, start_q, start_p, magnitude
                )
                if value < objective[module, 1]:
                    best_q, best_p = end_q, end_p
                    objective[module, 1:] = value
        module_q, module_p = best_q / norms_b, best_p / norms_a
        balance = (module_p.norm() / module_q.norm()).sqrt()
        if not bool(torch.isfinite(balance)) or balance == 0:
            balance = torch.ones_like(balance)
        q[module], p[module] = module_q * balance, module_p / balance
    return p, q, objective


def _norms(blocks: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of [K, ., .], 1 where a block is zero."""
    norms = torch.linalg.matrix_norm(blocks)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _residual(
    blocks_b: torch.Tensor,
    blocks_a: torch.Tensor,
    target: torch.Tensor,
    q: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """Return target - (sum_u q_u B_u) (sum_v p_v A_v) as a dense matrix."""
    product: torch.Tensor = (q[:, None, None] * blocks_b).sum(0) @ (
        p[:, None, None] * blocks_a
    ).sum(0)
    return target - product


def _minimize(
    blocks_b: torch.Tensor,
    blocks_a: torch.Tensor,
    target: torch.Tensor,
    q: torch.Tensor,
    p: torch.Tensor,
    magnitude: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Damped Newton on the dense residual divided by ``magnitude``, from (q, p).

    With residual E, Jacobian J of the product, and products of single blocks B_u A_v, half the
    gradient is -J^T E and half the Hessian J^T J with <E, B_u A_v> subtracted where q_u meets p_v.
    Negative curvature is followed downhill (absolute eigenvalues); the damping also takes care of
    the one direction in which the product does not move (q -> c q, p -> p / c).
    """
    unit = magnitude.sqrt()
    balance = (p.norm() / q.norm()).sqrt()
    q, p = q * balance / unit, p / balance / unit
    target = target / magnitude
    clients = len(q)
    residual = _residual(blocks_b, blocks_a, target, q, p)
    value = residual.square().sum()
    damping, idle = 1e-3, 0
    for _ in range(_STEPS):
        mean_b = (q[:, None, None] * blocks_b).sum(0)
        mean_a = (p[:, None, None] * blocks_a).sum(0)
        jacobian = torch.cat([blocks_b @ mean_a, mean_b @ blocks_a]).flatten(1)
        gradient = jacobian @ residual.flatten()
        hessian = jacobian @ jacobian.mT
        mixed = (blocks_b.mT @ residual).flatten(1) @ blocks_a.flatten(1).mT
        hessian[:clients, clients:] -= mixed
        hessian[clients:, :clients] -= mixed.mT
        curvature, directions = torch.linalg.eigh(hessian)
        curvature = curvature.abs()
        if curvature.max() == 0 or idle == 3 or damping > 1e12:
            break
        slopes = directions.mT @ gradient / (curvature + damping * curvature.max())
        step = directions @ slopes
        next_q, next_p = q + step[:clients], p + step[clients:]
        next_residual = _residual(blocks_b, blocks_a, target, next_q, next_p)
        next_value = next_residual.square().sum()
        if next_value < value:
            idle = idle + 1 if value - next_value <= 4 * _EPS * value else 0
            q, p, residual, value = next_q, next_p, next_residual, next_value
            damping = max(damping / 10, 1e-15)
        else:
            damping *= 4
    return q * unit, p * unit, value * magnitude.square()
