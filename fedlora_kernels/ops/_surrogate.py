"""surrogate: FLoRA-NA's mixing weights, solved exactly in Gram space.

Find p, q in R^K that minimize, per module (arXiv 2509.26399; the solver is ours),

    f(p, q) = || sum_k w_k s_k B_k A_k - (sum_u q_u s_u B_u)(sum_v p_v A_v) ||_F^2

With the scalings folded into G_B this is bilinear least squares in K x K and r x r matrices:

    M_uv   = sum_k w_k <G_B^{ku}, G_A^{kv}>         K x K
    S_A(p) = sum_{vv'} p_v p_v' G_A^{vv'}           r x r, S_B(q) likewise
    f(p,q) = ||dW||^2 - 2 q^T M p + <S_B(q), S_A(p)>
    q-step : H_uu' = <G_B^{uu'}, S_A(p)>,  q = H^+ M p;   p-step: the same with roles exchanged

Alternating least squares can crawl along a valley, so each sweep also looks further along its own
direction and keeps the best point (with the looks 50 sweeps end within 1e-6 ||dW||^2 of 3000 plain
ones on all matrix families of the tests; without them up to 4e-3 above).

Two starts are followed and the better one is returned: FedIT's (p = q = w), which f then never
exceeds, and the client with the largest update, which escapes FedIT's one bad case (clients whose
factors cancel in the mean although their products agree).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedlora_kernels import reference
from fedlora_kernels.ops import checks
from fedlora_kernels.ops.operator import Operator
from fedlora_kernels.ops.product import decomposed, product

MAX_SWEEPS = 50
TOLERANCE = 1e-12

# How far beyond a sweep's end it looks, in sweeps; 0 is the end itself.
_LOOKS = (0.0, 2.0, 5.0, 15.0)

Surrogate = tuple[Tensor, Tensor, Tensor]


def surrogate(
    gram_b: Tensor,
    gram_a: Tensor,
    weights: Tensor,
    scale: Tensor,
    max_sweeps: int = MAX_SWEEPS,
    tol: float = TOLERANCE,
) -> Surrogate:
    """Mixing weights of the surrogate averages that come closest to the ideal update.

    Args:
        gram_b: B^T B of the unscaled factors, [L,R,R] float64, R = K r.
        gram_a: A A^T, [L,R,R] float64.
        weights: [K], the clients' weights.
        scale: [L,K], the clients' scalings.
        max_sweeps: at most so many pairs of steps.
        tol: a module is done when a sweep lowers f by no more than tol * ||dW||^2.

    Returns:
        p [L,K] for A, q [L,K] for the scaled B, ||p|| = ||q||; objective [L,max_sweeps+1]: f at
        FedIT's start, then after each sweep (never rising, the last value repeated).

    Raises:
        ValueError: shapes disagree, R is no multiple of K, max_sweeps < 1 or tol < 0.
        TypeError: a Gram matrix is not float64.
    """
    return SURROGATE(gram_b, gram_a, weights, scale, max_sweeps, tol)


def _check(
    gram_b: Tensor,
    gram_a: Tensor,
    weights: Tensor,
    scale: Tensor,
    max_sweeps: int = MAX_SWEEPS,
    tol: float = TOLERANCE,
) -> None:
    checks.grams(gram_b, gram_a)
    checks.dimensions("weights", weights, 1)
    checks.real("weights", weights)
    checks.real("scale", scale)
    checks.sizes("scale", scale, (gram_b.shape[0], weights.shape[0]))
    if weights.shape[0] == 0 or gram_b.shape[1] % weights.shape[0]:
        raise ValueError(
            f"the stacked rank {int(gram_b.shape[1])} must be a multiple of the number of clients, "
            f"found {int(weights.shape[0])} weights (surrogate averages need equal ranks)"
        )
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps must be at least 1, found {max_sweeps}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, found {tol}")


def _composed(
    gram_b: Tensor,
    gram_a: Tensor,
    weights: Tensor,
    scale: Tensor,
    max_sweeps: int = MAX_SWEEPS,
    tol: float = TOLERANCE,
) -> Surrogate:
    modules, clients = scale.shape
    weights, scale = weights.double(), scale.double()
    rank = gram_b.shape[1] // clients
    rows = scale.repeat_interleave(rank, dim=1)
    blocks_b = blocks(rows[:, :, None] * gram_b * rows[:, None, :], clients)
    blocks_a = blocks(gram_a, clients)
    cross = cross_products(blocks_b, blocks_a, weights)
    total = (weights * cross.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
    flat_b = blocks_b.reshape(modules, clients * clients, rank * rank)
    flat_a = blocks_a.reshape(modules, clients * clients, rank * rank)

    # p and q are [L,2,K]: FedIT's start, then the dominant client's.
    own = torch.einsum("lkkij,lkkij->lk", blocks_b, blocks_a).clamp_min(0).sqrt()
    start = starts(weights.expand(modules, clients), own)
    p, q, trace = alternate(Bilinear(total, cross, flat_b, flat_a), start, max_sweeps, tol)
    norm_p, norm_q = p.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
    balance = torch.where((norm_p > 0) & (norm_q > 0), (norm_p / norm_q).sqrt(), 1)
    return p / balance, q * balance, trace


class Bilinear(NamedTuple):
    """f(p, q) = total - 2 q^T M p + sum q_u q_u' p_v p_v' <b_uu', a_vv'> of L problems."""

    total: Tensor
    """||dW||^2, [L,1]"""
    cross: Tensor
    """M, [L,K,K]"""
    flat_b: Tensor
    """b_uu', [L,K*K,d]: the blocks of G_B, or anything with the same inner products"""
    flat_a: Tensor
    """a_vv', [L,K*K,d]"""


def starts(weights: Tensor, own: Tensor) -> Tensor:
    """FedIT's weights and the client alone whose weighted update is the largest, [L,2,K]."""
    dominant = torch.nn.functional.one_hot((weights * own).argmax(-1), weights.shape[-1]).double()
    return torch.stack([weights, dominant], dim=1)


def alternate(
    problem: Bilinear, start: Tensor, max_sweeps: int, tol: float, moves: Tensor | None = None
) -> Surrogate:
    """Alternating least squares from p = q = start [L,2,K]; the better end of each problem.

    ``moves`` [K,n] are the directions in which p and q may leave the start; any when None.
    Returns p [L,K], q [L,K] and f after every sweep [L,max_sweeps+1].
    """
    total, cross, flat_b, flat_a = problem
    p = q = start
    best = _objective(total, cross, flat_b, flat_a, p, q)
    trace = [best[:, 0]]
    active = torch.ones_like(best, dtype=torch.bool)
    for _ in range(max_sweeps):
        new_q = _step(flat_b, flat_a, p, cross, q, moves)
        new_p = _step(flat_a, flat_b, new_q, cross.mT, p, moves)
        new_p, new_q = _looks(p, new_p), _looks(q, new_q)
        value = _objective(total, cross, flat_b, flat_a, new_p.flatten(1, 2), new_q.flatten(1, 2))
        value, look = value.unflatten(1, (2, len(_LOOKS))).min(-1)
        new_p, new_q = _chosen(new_p, look), _chosen(new_q, look)
        better = active & (value < best)
        p = new_p.where(better[:, :, None], p)
        q = new_q.where(better[:, :, None], q)
        active = better & (best - value > tol * total)
        best = value.where(better, best)
        trace.append(torch.minimum(trace[-1], best.amin(-1)))
        if not best.is_cuda and not bool(active.any()):
            break
    trace.extend(trace[-1:] * (max_sweeps + 1 - len(trace)))
    end = best.argmin(-1)
    return _chosen(p, end), _chosen(q, end), torch.stack(trace, dim=1)


def _looks(before: Tensor, after: Tensor) -> Tensor:
    """Points on the line through a sweep's two ends, [L,2,looks,K]."""
    lengths = torch.tensor(_LOOKS, dtype=after.dtype, device=after.device)
    return after[:, :, None] + lengths[:, None] * (after - before)[:, :, None]


def _chosen(candidates: Tensor, index: Tensor) -> Tensor:
    """candidates[..., index, :] for candidates [..., n, K] and index [...]."""
    where = index[..., None, None].expand(*index.shape, 1, candidates.shape[-1])
    return candidates.gather(-2, where).squeeze(-2)


def blocks(gram: Tensor, clients: int) -> Tensor:
    """[L,R,R] as blocks between clients, [L,K,K,r,r]."""
    split: Tensor = gram.unflatten(2, (clients, -1)).unflatten(1, (clients, -1))
    return split.transpose(2, 3)


def cross_products(blocks_b: Tensor, blocks_a: Tensor, weights: Tensor) -> Tensor:
    """M_uv = sum_k w_k <G_B^{ku}, G_A^{kv}>, [L,K,K]."""
    weighted = blocks_b * weights[:, None, None, None]
    return product(weighted.transpose(1, 2).flatten(2), blocks_a.transpose(1, 2).flatten(2).mT)


def _quadratic(flat: Tensor, mixing: Tensor) -> Tensor:
    """S = sum_{vv'} p_v p_v' G^{vv'} for each start, [L,2,r*r]."""
    outer = mixing[:, :, :, None] * mixing[:, :, None, :]
    return product(outer.flatten(2), flat)


def _objective(
    total: Tensor, cross: Tensor, flat_b: Tensor, flat_a: Tensor, p: Tensor, q: Tensor
) -> Tensor:
    """f(p, q) for each start, [L,2]."""
    linear = (product(q, cross) * p).sum(-1)
    square = (_quadratic(flat_b, q) * _quadratic(flat_a, p)).sum(-1)
    return (total - 2 * linear + square).clamp_min(0)


def _step(
    flat: Tensor,
    other_flat: Tensor,
    other: Tensor,
    cross: Tensor,
    before: Tensor,
    moves: Tensor | None,
) -> Tensor:
    """The minimizer over one side's mixing with the other side's fixed, [L,2,K].

    H is scaled to a unit diagonal first (a client with B times c and A over c is the same client),
    then solved in the least-norm sense: duplicate clients make it singular, and eigenvalues under
    16 K eps of the largest are noise. Where only some moves are allowed, the step is among those.
    """
    modules, starts, clients = other.shape
    normal = product(_quadratic(other_flat, other), flat.mT).reshape(
        modules, starts, clients, clients
    )
    right = product(other, cross.mT)
    if moves is not None:
        right = product(right - product(normal, before[..., None])[..., 0], moves)
        normal = product(product(moves.mT, normal), moves)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    unit = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    normal = unit[..., :, None] * normal * unit[..., None, :]
    values, vectors = decomposed(torch.linalg.eigh, (normal + normal.mT) / 2)
    noise = 16 * clients * torch.finfo(torch.float64).eps * values[..., -1:]
    inverse = torch.where(values > noise, 1 / values, 0)
    along = product(vectors.mT, (unit * right)[..., None])
    solved = product(vectors, inverse[..., None] * along)
    step = unit * solved[..., 0]
    return step if moves is None else before + product(step, moves.mT)


def _fake(
    gram_b: Tensor,
    gram_a: Tensor,
    weights: Tensor,
    scale: Tensor,
    max_sweeps: int = MAX_SWEEPS,
    tol: float = TOLERANCE,
) -> Surrogate:
    modules, clients = scale.shape
    return (
        gram_b.new_empty((modules, clients)),
        gram_b.new_empty((modules, clients)),
        gram_b.new_empty((modules, max_sweeps + 1)),
    )


SURROGATE: Operator[Surrogate] = Operator(
    "surrogate(Tensor gram_b, Tensor gram_a, Tensor weights, Tensor scale, "
    f"SymInt max_sweeps={MAX_SWEEPS}, float tol={TOLERANCE}) -> "
    "(Tensor p, Tensor q, Tensor objective)",
    check=_check,
    composed=_composed,
    fake=_fake,
    reference=reference.surrogate,
)
