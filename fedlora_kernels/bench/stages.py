"""Stages: each operator beside what else computes the same thing, from one round's stacks.

Every function returns the Comparison of one stage; this library's variants come first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import ops, reference
from fedlora_kernels.bench import correctness, peers, roofline
from fedlora_kernels.bench.correctness import Check
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Variant
from fedlora_kernels.bench.shapes import Case

ENERGY = 0.9
MAX_RANK = 64
ADAM_STEPS = 1000
ADAM_RATES = (1e-3, 1e-2, 1e-1)


def gram(stacks: Stacks) -> Comparison:
    """Both sides' Gram matrices; beside bmm on widened factors and bmm in float32."""
    b, a = stacks.b, stacks.a

    def variant(name: str, precision: str, run: Callable[[], Any], source: str = "") -> Variant:
        bound = correctness.EXACT if precision == "exact" else correctness.FAST
        return Variant(
            name,
            run,
            lambda found: [
                correctness.same_gram(found[0], b, False, bound),
                correctness.same_gram(found[1], a, True, bound),
            ],
            roofline.gram(b, False, precision) + roofline.gram(a, True, precision),
            source,
        )

    def multiplied(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide_b, wide_a = b.to(dtype), a.to(dtype)
        return wide_b.mT @ wide_b, wide_a @ wide_a.mT

    return Comparison(
        "gram",
        stacks.case,
        (
            variant("exact", "exact", lambda: (ops.gram(b, False), ops.gram(a, True))),
            variant(
                "fast", "fast", lambda: (ops.gram(b, False, "fast"), ops.gram(a, True, "fast"))
            ),
            variant("bmm in float64", "exact", lambda: multiplied(torch.float64), "torch.matmul"),
            variant("bmm in float32", "fast", lambda: multiplied(torch.float32), "torch.matmul"),
        ),
    )


def spectrum(stacks: Stacks) -> Comparison:
    """Leading singular values at an energy, and all; beside SVD and general eigenvalues."""
    gram_b, gram_a = reference.gram(stacks.b, False), reference.gram(stacks.a, True)
    scale, case = stacks.scale, stacks.case
    rank = case.stacked_rank
    kept = int(correctness.expected_ranks(stacks, ENERGY, MAX_RANK).max())

    def values(sigma: Tensor, count: int | None = None) -> Check:
        return correctness.same_singular_values(stacks, sigma, count)

    def vectors(left: Tensor, right: Tensor) -> Check:
        """|error of the rank-p update - its SVD floor| in squares, from the Gram matrices."""
        gap = torch.diag_embed(scale) - left[:, :, :kept] @ right[:, :kept]
        found = ((gap.mT @ gram_b @ gap) * gram_a).sum((-2, -1))
        expected = correctness.svd_floors(stacks, [kept] * case.modules).square()
        error = ((found - expected).abs() / stacks.total_energy).max()
        return Check("squared error beside the SVD floor", float(error), correctness.ENERGY_EXACT)

    whole = roofline.spectrum(case.modules, rank, rank)
    leading = roofline.spectrum(case.modules, rank, kept)
    variants = [
        Variant(
            f"energy {ENERGY}",
            lambda: ops.spectrum(gram_b, gram_a, scale, ENERGY, MAX_RANK),
            lambda found: [values(found[0], kept), vectors(found[2], found[3])],
            leading,
            facts=lambda found: {"rank": kept, "info": int(found[4].abs().max())},
        ),
        Variant(
            "all components",
            lambda: ops.spectrum(gram_b, gram_a, scale),
            lambda found: [values(found[0]), vectors(found[2], found[3])],
            whole,
        ),
        Variant(
            "2 eigh + SVD",
            lambda: peers.two_roots(gram_b, gram_a, scale),
            lambda found: [values(torch.stack([sigma for _, sigma in found]))],
            whole,
            "torch.linalg, module by module",
        ),
    ]
    if not gram_b.is_cuda:  # there a general matrix takes 30 times as long as a symmetric one
        variants.append(
            Variant(
                "eigenvalues of the product",
                lambda: peers.product_eigenvalues(gram_b, gram_a, scale),
                lambda found: [values(torch.stack(found).clamp_min(0).sqrt(), kept)],
                whole,
                "torch.linalg.eigvals, module by module",
                note="values only",
                less=True,
            )
        )
    return Comparison("spectrum", case, tuple(variants))


def rank(case: Case, sigma: Tensor) -> Comparison:
    """Ranks of all modules; beside numpy's cumulative sums module by module."""
    total = sigma.square().sum(-1)
    expected = reference.select_rank(sigma, total, ENERGY, MAX_RANK).tolist()
    work = roofline.select_rank(*sigma.shape)

    def checks(found: Sequence[int]) -> list[Check]:
        wrong = max(abs(mine - theirs) for mine, theirs in zip(found, expected, strict=True))
        return [Check("ranks beside the float64 reference", float(wrong), 0.0)]

    return Comparison(
        "rank",
        case,
        (
            Variant(
                "select_rank",
                lambda: ops.select_rank(sigma, total, ENERGY, MAX_RANK),
                lambda found: checks(found.tolist()),
                work,
            ),
            Variant(
                "numpy, module by module",
                lambda: peers.numpy_selection(sigma.cpu().numpy(), ENERGY, MAX_RANK),
                checks,
                work,
                peers.THREE_SVDS,
            ),
        ),
    )


def combine(stacks: Stacks) -> Comparison:
    """The second pass at the ranks of an energy; beside bmm in float64 and float32."""
    b, a, case = stacks.b, stacks.a, stacks.case
    gram_b, gram_a = reference.gram(b, False), reference.gram(a, True)
    _, _, left, right, _ = ops.spectrum(gram_b, gram_a, stacks.scale)
    kept = int(correctness.expected_ranks(stacks, ENERGY, MAX_RANK).max())
    x, y = left[:, :, :kept].contiguous(), right[:, :kept].contiguous()
    narrow_x, narrow_y = x.float(), y.float()
    expected = reference.combine(b, a, x, y)
    work = roofline.combine(b, a, kept * case.modules, kept)
    bound = 4 * correctness.OUTPUT_EPS[case.dtype]

    def multiplied(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        wide = left.dtype
        return (b.to(wide) @ left).to(b.dtype), (right @ a.to(wide)).to(a.dtype)

    def checks(found: tuple[Tensor, Tensor]) -> list[Check]:
        return [
            correctness.same_tensor(mine, theirs, bound)
            for mine, theirs in zip(found, expected, strict=True)
        ]

    facts = {"rank": kept}
    return Comparison(
        "combine",
        case,
        (
            Variant(
                "float64 coefficients",
                lambda: ops.combine(b, a, x, y),
                checks,
                work,
                facts=lambda _: facts,
            ),
            Variant(
                "float32 coefficients", lambda: ops.combine(b, a, narrow_x, narrow_y), checks, work
            ),
            Variant("bmm in float64", lambda: multiplied(x, y), checks, work, "torch.matmul"),
            Variant(
                "bmm in float32",
                lambda: multiplied(narrow_x, narrow_y),
                checks,
                work,
                "torch.matmul",
            ),
        ),
    )


def weighted_sum(stacks: Stacks) -> Comparison:
    """Averages of the clients' A; beside Flower's numpy sums and torch.tensordot."""
    case, weights = stacks.case, stacks.weights
    stacked = stacks.a.unflatten(1, (case.clients, -1))
    listed = [factor for module in stacks.client_a for factor in module]
    per_module = weights.expand(case.modules, -1).contiguous()
    expected = reference.weighted_sum(stacked, weights)
    work = roofline.weighted_sum(stacked)
    narrow = weights.to(stacked.dtype)
    bound = correctness.OUTPUT_EPS[case.dtype]

    def checks(found: Tensor) -> list[Check]:
        return [correctness.same_tensor(found, expected, bound)]

    variants = [
        Variant("stacked", lambda: ops.weighted_sum(stacked, weights), checks, work),
        Variant(
            "listed",
            lambda: ops.weighted_sum_list(listed, per_module),
            checks,
            work,
            note="clients' tensors where they lie",
        ),
        Variant(
            "torch.einsum",
            lambda: torch.einsum("k,lkrn->lrn", narrow, stacked),
            lambda found: [correctness.same_tensor(found, expected, 4 * bound)],
            work,
            "torch.einsum in the factors' dtype",
        ),
    ]
    if case.dtype == torch.float32:
        arrays = [
            [stacks.client_a[module][k].cpu().numpy() for module in range(case.modules)]
            for k in range(case.clients)
        ]
        shares = weights.tolist()
        variants.append(
            Variant(
                "numpy average",
                lambda: peers.flower_average(arrays, shares),
                lambda found: checks(torch.stack([torch.from_numpy(x) for x in found])),
                work,
                peers.FLOWER,
            )
        )
    return Comparison("weighted_sum", case, tuple(variants))


def surrogate(stacks: Stacks, steps: int = ADAM_STEPS) -> Comparison:
    """FLoRA-NA's p and q from the factors: Gram matrices and exact steps, beside Adam.

    Adam gets the best of three learning rates; only one run at that rate is timed.
    """
    b, a, case = stacks.b, stacks.a, stacks.case
    weights, scalings = stacks.weights, stacks.scalings
    work = roofline.flora_na(b, a, case.clients)
    fedit = shortfall(stacks, weights.expand_as(scalings), weights.expand_as(scalings))
    rates = {
        rate: float(shortfall(stacks, *peers.adam(stacks, rate, steps)).mean())
        for rate in ADAM_RATES
    }
    rate = min(rates, key=lambda key: rates[key])

    exact = shortfall(
        stacks, *ops.surrogate(ops.gram(b, False), ops.gram(a, True), weights, scalings)[:2]
    )

    def facts(found: tuple[Tensor, ...]) -> dict[str, object]:
        """f / ||dW||^2, means over the modules; the last before it is rounded for the file."""
        reached = shortfall(stacks, found[0], found[1])
        return {
            "objective": float(reached.mean()),
            "objective_fedit": float(fedit.mean()),
            "above_gram_solve": float((reached - exact).mean()),
        }

    def checks(found: tuple[Tensor, ...]) -> list[Check]:
        """f / ||dW||^2 at or under its value at FedIT's start."""
        rise = shortfall(stacks, found[0], found[1]) - fedit
        return [Check("f above FedIT's / |dW|^2", float(rise.max()), correctness.ENERGY_EXACT)]

    return Comparison(
        "surrogate",
        case,
        (
            Variant(
                "gram + surrogate",
                lambda: ops.surrogate(ops.gram(b, False), ops.gram(a, True), weights, scalings),
                checks,
                work,
                facts=lambda found: {**facts(found), "sweeps": sweeps(found[2])},
            ),
            solve(stacks),
            Variant(
                f"Adam, {steps} steps",
                lambda: peers.adam(stacks, rate, steps),
                checks,
                work,
                peers.ADAM,
                note=f"learning rate {rate:g}, best of {', '.join(f'{r:g}' for r in ADAM_RATES)}; "
                "one run timed",
                facts=lambda found: {**facts(found), "objectives": _named(rates)},
            ),
        ),
    )


def solve(stacks: Stacks) -> Variant:
    """FLoRA-NA's solve alone, its Gram matrices given."""
    case, weights, scalings = stacks.case, stacks.weights, stacks.scalings
    gram_b, gram_a = ops.gram(stacks.b, False), ops.gram(stacks.a, True)
    fedit = shortfall(stacks, weights.expand_as(scalings), weights.expand_as(scalings))

    def checks(found: tuple[Tensor, ...]) -> list[Check]:
        rise = shortfall(stacks, found[0], found[1]) - fedit
        return [Check("f above FedIT's / |dW|^2", float(rise.max()), correctness.ENERGY_EXACT)]

    return Variant(
        "surrogate alone",
        lambda: ops.surrogate(gram_b, gram_a, weights, scalings),
        checks,
        roofline.surrogate(case.modules, case.clients, case.ranks[0]),
        note="Gram matrices given",
    )


def sweeps(objective: Tensor) -> list[int]:
    """Sweeps until a module's objective, [L, max_sweeps + 1], stands: the least and the most."""
    taken = (objective != objective[:, -1:]).sum(1)
    return [int(taken.min()), int(taken.max())]


def shortfall(stacks: Stacks, p: Tensor, q: Tensor) -> Tensor:
    """f(p, q) / ||dW||^2 of every module in float64, without Gram matrices: [L]."""
    clients = stacks.case.clients
    blocks_b = stacks.b.double().unflatten(2, (clients, -1))
    blocks_a = stacks.a.double().unflatten(1, (clients, -1))
    b_hat = torch.einsum("lk,lmkr->lmr", q * stacks.scalings, blocks_b)
    a_hat = torch.einsum("lk,lkrn->lrn", p, blocks_a)
    error = correctness.distances(stacks, list(zip(b_hat, a_hat, strict=True)))
    return error.square() / stacks.total_energy


def _named(rates: dict[float, float]) -> dict[str, float]:
    return {f"{rate:g}": objective for rate, objective in rates.items()}
