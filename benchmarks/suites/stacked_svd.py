"""stacked_svd: FLoRIST in one call beside three SVDs, QR, PEFT and the dense SVDs.

What forms the dense update is measured where that takes seconds, not minutes: sides to 2048.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.peers import dense_svd, peft_merge, qr_core, svd_lowrank, three_svds
from benchmarks.stand.correctness import Pair
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import Peer, variants
from benchmarks.stand.shapes import FLORIST_RANKS, Case, equal
from benchmarks.stand.suite import Make, Suite, on_cases
from benchmarks.stand.tasks import ENERGY, MAX_RANK, Stack, Truncation
from fedlora_kernels import ops

FACTORED = (
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22),
    Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, family="drifted"),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, dtype=torch.float64),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=2),
    Case("RoBERTa-large", "query", equal(32, 64), modules=1),
)

DENSE = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=1),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=1),
    Case("Llama-3.2-1B", "v_proj", FLORIST_RANKS, modules=1),
)

ON_FACTORS = (three_svds.PEER, qr_core.PEER)
"""Peers whose cost does not grow with m n."""

ON_UPDATES = (dense_svd.PEER, svd_lowrank.PEER)
"""Peers that form the m x n update."""

MERGED = (peft_merge.SVD,)
"""Peers that form it through PEFT."""


def compare(
    stacks: Stacks,
    peers: Sequence[Peer[Truncation]] = ON_FACTORS,
    *,
    max_rank: int = MAX_RANK,
    cat: bool = False,
) -> Comparison:
    """Exact and fast beside other ways to the same factors.

    Args:
        stacks: the round.
        peers: the other ways.
        max_rank: cap on ranks; also the rank of the peers that need a fixed one.
        cat: also PEFT's stack, which truncates nothing.
    """
    round_ = Round.of(stacks)
    task = Truncation(round_, ENERGY, max_rank)

    def ours(precision: str) -> Variant:
        return Variant(
            precision,
            lambda: ops.stacked_svd(stacks.b, stacks.a, stacks.scale, ENERGY, max_rank, precision),
            lambda found: task.checks(pairs_of(found)),
            Truncation(round_, ENERGY, max_rank, precision).work,
            facts=lambda found: task.facts(pairs_of(found)),
        )

    others = variants(task, peers)
    if cat:
        others += variants(Stack(round_), (peft_merge.CAT_AS_LESS,))
    return Comparison("stacked_svd", stacks.case, (ours("exact"), ours("fast"), *others))


def compare_all(stacks: Stacks) -> Comparison:
    """Beside everything."""
    return compare(stacks, (*ON_FACTORS, *ON_UPDATES, *MERGED), cat=True)


def pairs_of(result: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Pair]:
    """stacked_svd's batch as pairs cut to each module's rank."""
    b_g, a_g, _, ranks = result
    return [(b[:, :rank], a[:rank]) for b, a, rank in zip(b_g, a_g, ranks.tolist(), strict=True)]


def comparisons(device: Device) -> Mapping[str, Make]:
    """Factored cases, then dense ones."""
    factored = on_cases(compare, FACTORED)(device)
    return {**factored, **on_cases(compare_all, DENSE)(device)}


SUITE = Suite("stacked_svd", comparisons)
