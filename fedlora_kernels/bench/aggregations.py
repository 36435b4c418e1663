"""Aggregations: ``flk.aggregate`` with a rule, beside the peer that makes the same adapter."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fedlora_kernels as flk
from fedlora_kernels import reference
from fedlora_kernels.bench import correctness, peers, roofline
from fedlora_kernels.bench.correctness import Check, Pair
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Variant
from fedlora_kernels.bench.roofline import Work
from fedlora_kernels.bench.stages import ENERGY, MAX_RANK

WEIGHT = "base_model.model.{}.lora_{}.weight"


def aggregation(stacks: Stacks, rule: str, **options: Any) -> Comparison:
    """``aggregate`` with one rule on adapters in memory, beside the peer that does the same.

    fedit and flora_na: Flower's numpy average; flora: PEFT cat; flexlora: PEFT svd and dense SVD;
    florist: three SVDs and QR + QR + core SVD.
    """
    case = stacks.case
    clients, shares = adapters(stacks), stacks.weights.tolist()
    fixed = min(MAX_RANK, case.m, case.n)

    def ours_checks(found: flk.Aggregation) -> list[Check]:
        pairs = pairs_of_adapter(found.adapter)
        if found.residual is not None:
            rest = pairs_of_adapter(found.residual)
            pairs = [
                (torch.cat([b, more_b], dim=1), torch.cat([a, more_a]))
                for (b, a), (more_b, more_a) in zip(pairs, rest, strict=True)
            ]
        if rule == "flora":
            return correctness.exact_product(stacks, pairs)
        if rule in ("florist", "flexlora"):
            return correctness.near_optimal(stacks, pairs)
        error = correctness.distances(stacks, pairs) / stacks.total_energy.sqrt()
        told = [found.report[name].relative_error for name in layers(found.adapter)]
        worst = (error - torch.tensor(told, dtype=torch.float64)).abs().max()
        return [
            Check("error beside the report's", float(worst), correctness.OUTPUT_EPS[case.dtype])
        ]

    variants = [
        Variant(
            f"aggregate {rule}",
            lambda: flk.aggregate(clients, rule=rule, weights=shares, **options),
            ours_checks,
            _work(stacks, rule),
            note="with its report",
        )
    ]

    def add(
        name: str,
        run: Callable[[], Any],
        checks: Any,
        source: str,
        work: Work | None = None,
        **more: Any,
    ) -> None:
        variants.append(Variant(name, run, checks, work or variants[0].work, source, **more))

    def optimal(found: Sequence[Pair]) -> list[Check]:
        return correctness.near_optimal(stacks, found, 10 * correctness.PRODUCT)

    if rule in ("fedit", "flora_na"):
        arrays = [
            [x[k].cpu().numpy() for side in (stacks.client_b, stacks.client_a) for x in side]
            for k in range(case.clients)
        ]
        expected = reference.weighted_sum(stacks.a.unflatten(1, (case.clients, -1)), stacks.weights)
        add(
            "numpy average",
            lambda: peers.flower_average(arrays, shares),
            lambda found: [
                correctness.same_tensor(
                    torch.stack([torch.from_numpy(x) for x in found[case.modules :]]),
                    expected,
                    correctness.PRODUCT,
                )
            ],
            peers.FLOWER,
            averaged(stacks),
            note="FedIT's mean, no report",
            less=rule != "fedit",
        )
    if rule == "florist":
        energy = options.get("energy", ENERGY)
        add(
            "three SVDs",
            lambda: peers.three_svds(stacks, energy, None),
            optimal,
            peers.THREE_SVDS,
        )
        add(
            "QR + QR + core SVD",
            lambda: peers.qr_core(stacks, energy, None),
            optimal,
            peers.QR_CORE,
        )
    if rule == "flexlora":
        add("dense SVD", lambda: peers.dense_svd(stacks, 1.0, fixed), optimal, peers.DENSE_SVD)
    if rule in ("flora", "flexlora") and peers.has_peft():
        model = peers.PeftModel(stacks)
        combination = "cat" if rule == "flora" else "svd"
        rank = None if rule == "flora" else max(case.ranks)
        add(
            f"PEFT {combination}",
            lambda: model.merge(combination, rank),
            optimal if rule == "flexlora" else lambda x: correctness.exact_product(stacks, x),
            peers.PEFT_CAT if rule == "flora" else peers.PEFT_SVD,
            before=model.forget,
        )
    return Comparison("aggregate", case, tuple(variants), name=rule)


def averaged(stacks: Stacks) -> Work:
    """Both factors averaged over the clients: each element read once, 1/K of them written."""
    return Work(stacks.nbytes * (1 + max(stacks.case.ranks) / stacks.case.stacked_rank))


def _work(stacks: Stacks, rule: str) -> Work:
    """What a rule's result needs at least; its report is not counted."""
    case, b, a = stacks.case, stacks.b, stacks.a
    if rule in ("florist", "flexlora"):
        energy = ENERGY if rule == "florist" else 1.0
        cap = MAX_RANK if rule == "florist" else max(case.ranks)
        ranks = correctness.expected_ranks(stacks, energy, cap)
        return roofline.stacked_svd(b, a, int(ranks.sum()), int(ranks.max()))
    if rule == "flora_na":
        return roofline.flora_na(b, a, case.clients)
    if rule in ("flora", "fedex"):  # the stack is part of the result
        return averaged(stacks) + Work(stacks.nbytes)
    return averaged(stacks)


def adapters(stacks: Stacks) -> list[flk.Adapter]:
    """The round as the clients' adapters, as PEFT's state dicts give them."""
    case = stacks.case
    names = [f"model.layers.{index}.{case.module}" for index in range(case.modules)]
    clients = []
    for k, rank in enumerate(case.ranks):
        state = {}
        for index, name in enumerate(names):
            state[WEIGHT.format(name, "A")] = stacks.client_a[index][k]
            state[WEIGHT.format(name, "B")] = stacks.client_b[index][k]
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": float(stacks.scalings[0, k]) * rank,
            "target_modules": [case.module],
        }
        clients.append(flk.Adapter.from_state_dict(state, config, name=f"client {k}"))
    return clients


def layers(adapter: flk.Adapter) -> list[str]:
    """Module names in layer order."""
    return sorted(adapter.factors, key=lambda name: int(name.split(".")[2]))


def pairs_of_adapter(adapter: flk.Adapter) -> list[Pair]:
    """B_g and A_g per module in layer order, scaling inside."""
    found = [adapter.factors[name] for name in layers(adapter)]
    return [(factors.b.double() * factors.scaling, factors.a) for factors in found]
