"""Every robust rule on dense updates, as the papers write it.

All functions take the clients' updates as the rows of points [K,P] (all modules, flattened,
float64) and return weights [K] that sum to 1. Weights that are given are w_k > 0, [K].
"""

import torch
from torch import Tensor


def products(points: Tensor) -> Tensor:
    """<dW_j, dW_k>, entry by entry: [K,K]."""
    return torch.stack([torch.stack([(x * y).sum() for y in points]) for x in points])


def clip(points: Tensor, norm: float | None = None) -> Tensor:
    """The factors (not weights) min(1, limit / ||dW_k||); without norm, the limit is the lower
    median of the norms.
    """
    norms = [float(point.norm()) for point in points]
    limit = sorted(norms)[(len(norms) - 1) // 2] if norm is None else norm
    return points.new_tensor([min(1.0, limit / size) if size else 1.0 for size in norms])


def krum(points: Tensor, attackers: int) -> Tensor:
    """All weight for the client with the smallest sum of K - f - 2 squared distances."""
    return multi_krum(points, torch.ones(len(points), dtype=points.dtype), attackers, 1)


def multi_krum(points: Tensor, weights: Tensor, attackers: int, keep: int) -> Tensor:
    """The given weights of the ``keep`` best clients."""
    scores = []
    for k, point in enumerate(points):
        squares = sorted(float((point - q).square().sum()) for j, q in enumerate(points) if j != k)
        scores.append(sum(squares[: len(points) - attackers - 2]))
    return _nearest(scores, weights, keep)


def geometric_median(points: Tensor, weights: Tensor) -> Tensor:
    """w_k / ||z - dW_k||, scaled to sum to 1, at the z of :func:`median_point`."""
    far = (points - median_point(points, weights)).norm(dim=1)
    found: Tensor = weights / far.clamp_min(1e-12 * float(far.max()) or 1.0)
    return found.div_(found.sum())


def median_point(points: Tensor, weights: Tensor) -> Tensor:
    """argmin over z of sum_k w_k ||z - dW_k||, [P]: the best of the points, or what L-BFGS finds in
    the plane through them, from their mean.
    """
    best: Tensor = min(
        points, key=lambda point: float((weights * (points - point).norm(dim=1)).sum())
    )
    if bool((points == best).all()):
        return best
    basis = torch.linalg.qr((points - best).mT)[0]
    flat = (points - best) @ basis
    flat = flat / flat.norm(dim=1).median().clamp_min(1e-300)
    z = flat.mean(0).requires_grad_()
    solver = torch.optim.LBFGS(
        [z],
        max_iter=5000,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def total() -> Tensor:
        solver.zero_grad()
        value: Tensor = (weights * (flat - z).norm(dim=1)).sum()
        value.backward()
        return value

    solver.step(total)
    size = (points - best).norm(dim=1).median().clamp_min(1e-300)
    found: Tensor = best + size * (basis @ z.detach())

    def far(point: Tensor) -> float:
        return float((weights * (points - point).norm(dim=1)).sum())

    return found if far(found) < far(best) else best


def trimmed(points: Tensor, weights: Tensor, attackers: int, by: str) -> Tensor:
    """The given weights of all but the f farthest, from the geometric median or by the lower median
    of the distances to the others.
    """
    if by == "center":
        z = median_point(points, weights)
        far = [float((point - z).norm()) for point in points]
    else:
        far = []
        for k, point in enumerate(points):
            others = sorted(float((point - q).norm()) for j, q in enumerate(points) if j != k)
            far.append(others[(len(others) - 1) // 2])
    return _nearest(far, weights, len(points) - attackers)


def _nearest(scores: list[float], weights: Tensor, keep: int) -> Tensor:
    kept = sorted(range(len(scores)), key=scores.__getitem__)[:keep]
    found = torch.zeros_like(weights)
    found[kept] = weights[kept]
    return found / found.sum()
