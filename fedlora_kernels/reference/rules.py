"""Every aggregation rule on one module, densely, as the papers write it.

All functions take the clients' factors as lists, B_k [m, r_k] in ``bs`` and A_k [r_k, n] in
``as_``, their scalings s_k and their weights w_k (sum 1), and return float64 updates [m, n]: one
for the rules with a global adapter, one for each client for the rules that personalize.
"""

from collections.abc import Sequence

import torch

from fedlora_kernels.reference._rank import select_rank
from fedlora_kernels.reference._surrogate import surrogate

Factors = Sequence[torch.Tensor]
Numbers = Sequence[float]


def ideal_update(bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers) -> torch.Tensor:
    """The ideal update dW = sum_k w_k s_k B_k A_k, what every rule approximates."""
    terms = zip(bs, as_, scalings, weights, strict=True)
    return torch.stack([w * s * (b.double() @ a.double()) for b, a, s, w in terms]).sum(dim=0)


def fedit(bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers) -> torch.Tensor:
    """(sum_k w_k s_k B_k) (sum_k w_k A_k): FedIT (arXiv 2305.05644), FedAvg of the factors.

    Scalings are folded into B; when all are equal that is the paper's average of B and of A.
    """
    return _mean(_scaled(bs, scalings), weights) @ _mean(as_, weights)


def ffa(bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers) -> torch.Tensor:
    """(sum_k w_k s_k B_k) A_0: FFA-LoRA (arXiv 2403.12313), A_0 frozen and common.

    Raises:
        ValueError: when the clients' A differ.
    """
    for client, a in enumerate(as_):
        if not torch.equal(a, as_[0]):
            raise ValueError(f"client {client}: A differs from client 0's, FFA-LoRA keeps A fixed")
    return _mean(_scaled(bs, scalings), weights) @ as_[0].double()


def fedsa(
    bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers
) -> tuple[torch.Tensor, ...]:
    """s_k B_k (sum_j w_j A_j) for each client k: FedSA-LoRA (arXiv 2410.01463)."""
    a = _mean(as_, weights)
    return tuple(b @ a for b in _scaled(bs, scalings))


def flora(bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers) -> torch.Tensor:
    """[B_1 | ... | B_K] [w_1 s_1 A_1 ; ...]: FLoRA (arXiv 2409.05976), stacking."""
    terms = zip(as_, scalings, weights, strict=True)
    return torch.cat(list(bs), dim=1).double() @ torch.cat(
        [w * s * a.double() for a, s, w in terms]
    )


def flexlora(
    bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers
) -> tuple[torch.Tensor, ...]:
    """The best rank-r_k approximation of dW for each client k: FlexLoRA (arXiv 2402.11505)."""
    update = ideal_update(bs, as_, scalings, weights)
    return tuple(truncate(update, b.shape[1]) for b in bs)


def florist(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    energy: float,
    max_rank: int | None = None,
) -> torch.Tensor:
    """FLoRIST (arXiv 2506.09199): three SVDs and an energy threshold.

    B = U_B S_B V_B^T, A = U_A S_A V_A^T with weights and scalings on A, P = S_B V_B^T U_A S_A
    = U_P S_P V_P^T, cut at p by the energy of S_P;  B_g = U_B U_P S_P,  A_g = V_P^T V_A^T.
    """
    terms = zip(as_, scalings, weights, strict=True)
    stacked_a = torch.cat([w * s * a.double() for a, s, w in terms])
    left_b, values_b, right_b = torch.linalg.svd(
        torch.cat(list(bs), dim=1).double(), full_matrices=False
    )
    left_a, values_a, right_a = torch.linalg.svd(stacked_a, full_matrices=False)
    core = values_b[:, None] * (right_b @ left_a) * values_a
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    rank = int(select_rank(values[None], values.square().sum()[None], energy, max_rank)[0])
    b_global = left_b @ left[:, :rank] * values[:rank]
    a_global = right[:rank] @ right_a
    return torch.matmul(b_global, a_global)


def flora_na(bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers) -> torch.Tensor:
    """(sum_u q_u s_u B_u) (sum_v p_v A_v) nearest to dW: FLoRA-NA (arXiv 2509.26399)."""
    b, a = torch.cat(list(bs), dim=1).double(), torch.cat(list(as_)).double()
    scale = torch.tensor([list(scalings)], dtype=torch.float64)
    p, q, _ = surrogate(
        (b.mT @ b)[None], (a @ a.mT)[None], torch.tensor(list(weights), dtype=torch.float64), scale
    )
    return _mean(_scaled(bs, scalings), q[0].tolist()) @ _mean(as_, p[0].tolist())


def flora_na_shared(
    modules: Sequence[tuple[Factors, Factors, Numbers, Numbers]],
    around: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    steps: int = 1000,
) -> tuple[torch.Tensor, ...]:
    """FLoRA-NA with one pair p, q for all modules, by Adam on the dense squared errors.

    Every module's update is (B_0 + sum_u q_u (s_u B_u - B_0)) (A_0 + sum_v p_v (A_v - A_0)), where
    ``around`` holds B_0 (its scaling inside) and A_0 of every module; zeros when None. The start
    is FedIT's p = q = w, the best point of all steps counts.
    """
    weights = torch.tensor(list(modules[0][3]), dtype=torch.float64)
    p, q = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    targets, stacks = [], []
    for index, (bs, as_, scalings, own) in enumerate(modules):
        b, a = torch.stack(_scaled(bs, scalings)), torch.stack([x.double() for x in as_])
        zero = (torch.zeros_like(b[0]), torch.zeros_like(a[0]))
        first, second = (x.double() for x in around[index]) if around is not None else zero
        targets.append(ideal_update(bs, as_, scalings, own))
        stacks.append((first, b - first, second, a - second))

    def updates() -> list[torch.Tensor]:
        return [
            (first + torch.einsum("k,kmr->mr", q, b)) @ (second + torch.einsum("k,krn->rn", p, a))
            for first, b, second, a in stacks
        ]

    total = float(sum(target.square().sum() for target in targets)) or 1.0
    optimizer = torch.optim.Adam([p, q], lr=1e-2)
    best, found = float("inf"), updates()
    for _ in range(steps):
        optimizer.zero_grad()
        made = updates()
        gaps = [target - update for target, update in zip(targets, made, strict=True)]
        loss = torch.stack([gap.square().sum() for gap in gaps]).sum() / total
        if loss.item() < best:
            best, found = loss.item(), made
        loss.backward()
        optimizer.step()
    return tuple(update.detach() for update in found)


def holders(weights: Numbers, ranks: Sequence[int], position: int) -> list[float]:
    """w_k over the weights of all clients whose rank reaches the position (from 1); 0 beyond."""
    there = [w if rank >= position else 0.0 for w, rank in zip(weights, ranks, strict=True)]
    return [w / (sum(there) or 1.0) for w in there]


def raflora(
    bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers
) -> tuple[torch.Tensor, ...]:
    """raFLoRA (arXiv 2602.13486): rank partitions weighted by their holders, then FlexLoRA's SVD.

    The partition (l, h] between successive client ranks adds up sum_k w_k s_k B_k[:, l:h] A_k[l:h]
    over the clients with r_k >= h, their weights scaled to sum to 1. Client k receives the best
    rank-r_k approximation of the sum.
    """
    ranks = [b.shape[1] for b in bs]
    update = torch.zeros(bs[0].shape[0], as_[0].shape[1], dtype=torch.float64)
    low = 0
    for high in sorted(set(ranks)):
        there = [w if rank >= high else 0.0 for w, rank in zip(weights, ranks, strict=True)]
        for b, a, s, w in zip(bs, as_, scalings, there, strict=True):
            part = b[:, low:high].double() @ a[low:high].double()
            update += w / (sum(there) or 1.0) * s * part
        low = high
    return tuple(truncate(update, rank) for rank in ranks)


def rbla(
    bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers
) -> tuple[torch.Tensor, ...]:
    """RBLA (arXiv 2408.08699): every rank position averaged over the clients that have it.

    Client k gets the product of the first r_k columns and rows.
    """
    bs = _scaled(bs, scalings)
    ranks = [b.shape[1] for b in bs]
    columns, rows = [], []
    for position in range(max(ranks)):
        shares = holders(weights, ranks, position + 1)
        present = [k for k, rank in enumerate(ranks) if rank > position]
        columns.append(sum(shares[k] * bs[k][:, position].double() for k in present))
        rows.append(sum(shares[k] * as_[k][position].double() for k in present))
    mean_b, mean_a = torch.stack(columns, 1), torch.stack(rows)  # type: ignore[arg-type]
    return tuple(mean_b[:, :rank] @ mean_a[:rank] for rank in ranks)


def lora_fair(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    form: str = "cosine",
    penalty: float = 0.01,
    steps: int = 400,
) -> torch.Tensor:
    """LoRA-FAIR (arXiv 2411.14961): FedIT with B corrected by dB, found densely.

    cosine: dB by L-BFGS on 1 - cos(dW, (B + dB) A) + penalty ||dB||, from two starts, near no
    correction and near the ridge solution; the best point counts, no correction included.
    ridge: the normal equations. Clients of one scaling keep it out of B.
    """
    common = scalings[0] if len(set(scalings)) == 1 and scalings[0] != 0 else 1.0
    b = _mean(_scaled(bs, [s / common for s in scalings]), weights)
    a = _mean(as_, weights)
    target = ideal_update(bs, as_, [s / common for s in scalings], weights)
    identity = torch.eye(len(a), dtype=torch.float64)
    ridge = (target - b @ a) @ a.mT @ torch.linalg.pinv(a @ a.mT + penalty * identity)
    if form == "ridge":
        return torch.matmul(common * (b + ridge), a)
    if not target.any():
        return torch.matmul(common * b, a)
    best = torch.zeros_like(b)
    value = float(lora_fair_objective(b + best, a, target, best, penalty))
    for begin in (1e-3 * ridge, ridge):
        step = begin.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [step], max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure(step: torch.Tensor = step) -> torch.Tensor:
            step.grad = None
            loss = lora_fair_objective(b + step, a, target, step, penalty)
            loss.backward()
            return loss

        optimizer.step(closure)
        found = float(lora_fair_objective(b + step, a, target, step, penalty).detach())
        if found < value:
            best, value = step.detach(), found
    return torch.matmul(common * (b + best), a)


def lora_fair_objective(
    b: torch.Tensor, a: torch.Tensor, target: torch.Tensor, step: torch.Tensor, penalty: float
) -> torch.Tensor:
    """1 - cos(target, b a) + penalty ||step||; the cosine of a zero matrix is 0."""
    product = b @ a
    size = product.norm() * target.norm()
    cosine = (product * target).sum() / size if float(size) > 0 else torch.zeros_like(size)
    objective: torch.Tensor = 1 - cosine + penalty * step.norm()
    return objective


def hetlora(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    norm_weighted: bool = True,
    example_weighted: bool = False,
    norms: Numbers | None = None,
) -> tuple[torch.Tensor, ...]:
    """HetLoRA (arXiv 2401.06432): sparsity-weighted mean of zero-padded factors.

    Factors are padded to the largest rank and averaged with weights v_k; client k gets the product
    of the first r_k columns and rows.

    v_k is proportional to ||dW_k||_F, taken from ``norms`` (over all modules) or, where they are
    None, from this module; ``example_weighted``: to w_k ||dW_k||_F; not ``norm_weighted``: to w_k.
    A client of weight 0 has v_k = 0. Where all v_k would be zero the others count equally, or by
    w_k with ``example_weighted``.
    """
    bs = _scaled(bs, scalings)
    if norm_weighted:
        if norms is None:
            norms = [float((b @ a.double()).norm()) for b, a in zip(bs, as_, strict=True)]
        own = list(weights) if example_weighted else [float(w > 0) for w in weights]
        shares = [share * norm for share, norm in zip(own, norms, strict=True)]
        shares = shares if sum(shares) > 0 else own
        weights = [share / sum(shares) for share in shares]
    rank = max(b.shape[1] for b in bs)
    padding = torch.nn.functional.pad
    mean_b = _mean([padding(b, (0, rank - b.shape[1])) for b in bs], weights)
    mean_a = _mean([padding(a, (0, 0, 0, rank - a.shape[0])) for a in as_], weights)
    return tuple(mean_b[:, : b.shape[1]] @ mean_a[: b.shape[1]] for b in bs)


def fedex(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    residual_rank: int | None = None,
) -> torch.Tensor:
    """FedIT plus the residual dW - FedIT: FedEx-LoRA (arXiv 2410.09432).

    Exact, unless the residual is truncated to ``residual_rank``.
    """
    average = fedit(bs, as_, scalings, weights)
    residual = ideal_update(bs, as_, scalings, weights) - average
    return average + (residual if residual_rank is None else truncate(residual, residual_rank))


def eclora(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    error: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """ECLoRA (doi 10.1109/TNNLS.2025.3586545): truncations of dW + E, and the next round's E."""
    update = ideal_update(bs, as_, scalings, weights)
    if error is not None:
        update = update + error
    ranks = [b.shape[1] for b in bs]
    return tuple(truncate(update, rank) for rank in ranks), update - truncate(update, max(ranks))


def fedmomentum(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    kept_energy: float = 0.9999,
    momentum: float = 0.0,
    last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FedMomentum (arXiv 2603.08014): the best rank-r part of V, and all of V up to the energy.

    V = dW + momentum * last. The second is the first and the residual together, or less where the
    energy is reached before rank r; it is what the next round takes as ``last``.
    """
    update = ideal_update(bs, as_, scalings, weights)
    if last is not None:
        update = update + momentum * last
    values = torch.linalg.svdvals(update)
    end = int(select_rank(values[None], values.square().sum()[None], kept_energy)[0])
    return truncate(update, bs[0].shape[1]), truncate(update, end)


def rotation(product: torch.Tensor, softness: float = 1.0) -> torch.Tensor:
    """The rotation nearest to a square matrix, det R = 1, then as far toward it from I as asked."""
    left, _, right = torch.linalg.svd(product.double())
    if float(torch.linalg.det(left @ right)) < 0:
        left = torch.cat([left[:, :-1], -left[:, -1:]], dim=1)
    identity = torch.eye(len(product), dtype=torch.float64)
    left, _, right = torch.linalg.svd((1 - softness) * identity + softness * (left @ right))
    return torch.matmul(left, right)


def fedrot(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    last: tuple[torch.Tensor, torch.Tensor] | None = None,
    side: str = "a",
    softness: float = 0.5,
) -> torch.Tensor:
    """FedRot-LoRA (arXiv 2602.23638): FedIT of B_k R_k and R_k^T A_k.

    R_k rotates client k's A (or B) toward the last global adapter's; no rotation without one.
    """
    if last is not None:
        products = [
            a.double() @ last[1].double().mT if side == "a" else b.double().mT @ last[0].double()
            for b, a in zip(bs, as_, strict=True)
        ]
        rotations = [rotation(product, softness) for product in products]
        bs = [b.double() @ r for b, r in zip(bs, rotations, strict=True)]
        as_ = [r.mT @ a.double() for a, r in zip(as_, rotations, strict=True)]
    return fedit(bs, as_, scalings, weights)


def fedsvd(
    bs: Factors, as_: Factors, scalings: Numbers, weights: Numbers
) -> tuple[torch.Tensor, torch.Tensor]:
    """FedSVD (arXiv 2505.12805): U S and V^T of (sum_k w_k s_k B_k) A_0, of A_0's rank.

    Raises:
        ValueError: when the clients' A differ.
    """
    product = ffa(bs, as_, scalings, weights)
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    rank = min(len(as_[0]), len(values))
    return left[:, :rank] * values[:rank], right[:rank]


def lora_a2(
    modules: Sequence[tuple[Factors, Factors, Numbers, Numbers]],
    lasts: Sequence[torch.Tensor | None],
    budget: int,
    side: str = "b",
) -> tuple[torch.Tensor, ...]:
    """LoRA-A2 (arXiv 2410.22815): of each client the ranks that change its update most.

    ``side`` is the factor that was trained, of which ``lasts`` holds the last global one, its
    scaling inside; None is zero. Client k's change is s_k B_k A_k less the same with the last
    factor, a sum of rank-1 terms over all modules: budget terms per module stay, the largest first,
    and the others are what they were.
    """
    kept = []
    for k in range(len(modules[0][3])):
        terms = []
        for (bs, as_, scalings, _), last in zip(modules, lasts, strict=True):
            trained, other = (bs, as_) if side == "b" else (as_, bs)
            change = scalings[k] * trained[k].double()
            change = change if last is None else change - last.double()
            for rank in range(bs[k].shape[1]):
                if side == "b":
                    term = torch.outer(change[:, rank], other[k][rank].double())
                else:
                    term = torch.outer(other[k][:, rank].double(), change[rank])
                terms.append(float(term.norm()))
        order = sorted(range(len(terms)), key=lambda place: -terms[place])
        kept.append(set(order[: budget * len(modules)]))
    updates, begin = [], 0
    for (bs, as_, scalings, weights), last in zip(modules, lasts, strict=True):
        rank = bs[0].shape[1]
        update = torch.zeros(bs[0].shape[0], as_[0].shape[1], dtype=torch.float64)
        for k, weight in enumerate(weights):
            trained, other = (bs, as_) if side == "b" else (as_, bs)
            mine = scalings[k] * trained[k].double()
            before = torch.zeros_like(mine) if last is None else last.double()
            chosen = torch.tensor([begin + i in kept[k] for i in range(rank)])
            mine = torch.where(chosen if side == "b" else chosen[:, None], mine, before)
            both = (mine, other[k].double()) if side == "b" else (other[k].double(), mine)
            update += weight * (both[0] @ both[1])
        updates.append(update)
        begin += rank
    return tuple(updates)


def florg(
    bs: Factors,
    as_: Factors,
    scalings: Numbers,
    weights: Numbers,
    last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FLoRG (arXiv 2602.17095): the update and A, from the n x n matrix sum_k w_k A_k^T A_k.

    A = P L_r^(1/2) V_r^T of its r leading eigenvectors, P the orthogonal matrix for which
    ||A - last|| is least, and the update is dW V_r V_r^T. Weights count by their ratios in A.
    """
    rank, total = len(as_[0]), sum(weights) or 1.0
    shares = [w / total for w in weights]
    gram = _mean([a.double().mT @ a.double() for a in as_], shares)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
    a = torch.zeros(rank, len(gram), dtype=torch.float64)
    a[: len(values)] = values.sqrt()[:, None] * vectors.mT
    if last is not None:
        left, _, right = torch.linalg.svd(last.double() @ a.mT)
        a = left @ right @ a
    update = ideal_update(bs, as_, scalings, weights)
    return torch.linalg.multi_dot([update, vectors, vectors.mT]), a


def truncate(dense: torch.Tensor, p: int) -> torch.Tensor:
    """Best rank-p approximation in the Frobenius norm (Eckart and Young, 1936), by a dense SVD."""
    left, values, right = torch.linalg.svd(dense.double(), full_matrices=False)
    return torch.matmul(left[..., :p] * values[..., None, :p], right[..., :p, :])


def svd_floor(dense: torch.Tensor, p: int) -> torch.Tensor:
    """sqrt(sum_{i>p} sigma_i^2), the error below which no matrix of rank p can go."""
    tail: torch.Tensor = torch.linalg.svdvals(dense.double())[..., p:]
    return tail.square().sum(dim=-1).sqrt()


def _mean(factors: Factors, weights: Numbers) -> torch.Tensor:
    terms = zip(factors, weights, strict=True)
    return torch.stack([w * factor.double() for factor, w in terms]).sum(dim=0)


def _scaled(bs: Factors, scalings: Numbers) -> list[torch.Tensor]:
    return [s * b.double() for b, s in zip(bs, scalings, strict=True)]
