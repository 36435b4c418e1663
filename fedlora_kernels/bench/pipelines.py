"""Pipelines: the one-call operators beside every other way from stacks to global factors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlora_kernels import ops, reference
from fedlora_kernels.bench import correctness, peers, roofline
from fedlora_kernels.bench.correctness import Check, Pair
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Variant
from fedlora_kernels.bench.stages import ENERGY, MAX_RANK, shortfall

SVD_LOWRANK_EXCESS = 0.05
"""Two power iterations leave a randomised SVD some percent above the optimum."""


def pairs_of(result: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Pair]:
    """stacked_svd's batch as pairs cut to each module's rank."""
    b_g, a_g, _, ranks = result
    return [(b[:, :rank], a[:rank]) for b, a, rank in zip(b_g, a_g, ranks.tolist(), strict=True)]


def stacked_svd(
    stacks: Stacks,
    *,
    energy: float = ENERGY,
    max_rank: int = MAX_RANK,
    dense: bool = False,
    merged: Sequence[str] = (),
) -> Comparison:
    """FLoRIST in one call, exact and fast, beside every other way to the same factors.

    Args:
        stacks: the round.
        energy: share of energy to keep.
        max_rank: cap on ranks; also the rank of the peers that need a fixed one.
        dense: also run what forms the m x n update (dense SVD and svd_lowrank).
        merged: PEFT's combination types to run, "svd" and "cat".
    """
    b, a, scale, case = stacks.b, stacks.a, stacks.scale, stacks.case
    ranks = correctness.expected_ranks(stacks, energy, max_rank)
    kept, fixed = int(ranks.sum()), min(max_rank, case.stacked_rank, case.m, case.n)
    work = {
        precision: roofline.stacked_svd(b, a, kept, max_rank, precision)
        for precision in ("exact", "fast")
    }
    width = correctness.OUTPUT_EPS[case.dtype]

    def optimal(found: Sequence[Pair]) -> list[Check]:
        chosen = [pair[1].shape[0] for pair in found]
        return [
            *correctness.near_optimal(stacks, found),
            *correctness.same_ranks(stacks, chosen, energy, max_rank),
        ]

    def chosen(found: Sequence[Pair]) -> dict[str, Any]:
        counts = [pair[1].shape[0] for pair in found]
        return {"rank_min": min(counts), "rank_max": max(counts)}

    def ours(precision: str) -> Variant:
        return Variant(
            precision,
            lambda: ops.stacked_svd(b, a, scale, energy, max_rank, precision),
            lambda found: optimal(pairs_of(found)),
            work[precision],
            facts=lambda found: chosen(pairs_of(found)),
        )

    def peer(
        name: str, run: Callable[[], list[Pair]], source: str, checks: Any = optimal, **more: Any
    ) -> Variant:
        return Variant(name, run, checks, work["exact"], source, facts=chosen, **more)

    variants = [
        ours("exact"),
        ours("fast"),
        peer("three SVDs", lambda: peers.three_svds(stacks, energy, max_rank), peers.THREE_SVDS),
        peer("QR + QR + core SVD", lambda: peers.qr_core(stacks, energy, max_rank), peers.QR_CORE),
    ]
    if dense:
        variants += [
            peer("dense SVD", lambda: peers.dense_svd(stacks, energy, max_rank), peers.DENSE_SVD),
            peer(
                "svd_lowrank",
                lambda: peers.svd_lowrank(stacks, fixed),
                peers.LOWRANK,
                lambda found: correctness.near_optimal(stacks, found, SVD_LOWRANK_EXCESS),
                note=f"fixed rank {fixed}, randomised",
            ),
        ]
    if merged and peers.has_peft():
        model = peers.PeftModel(stacks)
        if "svd" in merged:
            variants.append(
                peer(
                    "PEFT svd",
                    lambda: model.merge("svd", fixed),
                    peers.PEFT_SVD,
                    lambda found: correctness.near_optimal(stacks, found, 10 * width),
                    before=model.forget,
                    note=f"fixed rank {fixed}",
                )
            )
        if "cat" in merged:
            variants.append(
                peer(
                    "PEFT cat",
                    lambda: model.merge("cat"),
                    peers.PEFT_CAT,
                    lambda found: correctness.exact_product(stacks, found),
                    before=model.forget,
                    note=f"stacks only: rank {case.stacked_rank}",
                    less=True,
                )
            )
    return Comparison("stacked_svd", case, tuple(variants))


def flora_na(stacks: Stacks) -> Comparison:
    """FLoRA-NA in one call, beside the plain average that FedIT takes (which solves nothing)."""
    b, a, case = stacks.b, stacks.a, stacks.case
    weights, scalings = stacks.weights, stacks.scalings
    fedit = shortfall(stacks, weights.expand_as(scalings), weights.expand_as(scalings))
    blocks_b = b.unflatten(2, (case.clients, -1)).movedim(2, 1)
    blocks_a = a.unflatten(1, (case.clients, -1))
    width = correctness.OUTPUT_EPS[case.dtype]

    def checks(found: tuple[Tensor, ...]) -> list[Check]:
        b_hat, a_hat, p, q = found[:4]
        rise = shortfall(stacks, p, q) - fedit
        return [
            Check("f above FedIT's / |dW|^2", float(rise.max()), correctness.ENERGY_EXACT),
            correctness.same_tensor(
                b_hat, reference.weighted_sum(blocks_b, q * scalings), 2 * width
            ),
            correctness.same_tensor(a_hat, reference.weighted_sum(blocks_a, p), 2 * width),
        ]

    def facts(found: tuple[Tensor, ...]) -> dict[str, Any]:
        reached = shortfall(stacks, found[2], found[3])
        return {"objective": float(reached.mean()), "objective_fedit": float(fedit.mean())}

    def ours(precision: str) -> Variant:
        return Variant(
            precision,
            lambda: ops.flora_na(b, a, weights, scalings, precision),
            checks,
            roofline.flora_na(b, a, case.clients, precision),
            facts=facts,
        )

    variants = [ours("exact"), ours("fast")]
    if case.dtype == torch.float32:
        arrays = [
            [x[k].cpu().numpy() for side in (stacks.client_b, stacks.client_a) for x in side]
            for k in range(case.clients)
        ]
        shares = weights.tolist()
        expected = reference.weighted_sum(blocks_a, weights)
        variants.append(
            Variant(
                "numpy average",
                lambda: peers.flower_average(arrays, shares),
                lambda found: [
                    correctness.same_tensor(
                        torch.stack([torch.from_numpy(x) for x in found[case.modules :]]),
                        expected,
                        width,
                    )
                ],
                roofline.weighted_sum(blocks_b) + roofline.weighted_sum(blocks_a),
                peers.FLOWER,
                note="FedIT's mean, nothing solved",
                less=True,
            )
        )
    return Comparison("flora_na", case, tuple(variants))
