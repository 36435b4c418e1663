"""aggregate: one ``flk.aggregate`` call on adapters in memory, beside the peer of its rule.

The report of a result is read by the check, never in the timed call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import fedlora_kernels as flk
from benchmarks.peers import dense_svd, flower, peft_merge, qr_core, three_svds
from benchmarks.stand import correctness, roofline
from benchmarks.stand.correctness import Check, Pair
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import Peer, variants
from benchmarks.stand.roofline import Work
from benchmarks.stand.shapes import FLORIST_RANKS, Case, equal
from benchmarks.stand.suite import Make, Suite
from benchmarks.stand.tasks import ENERGY, Averages, Stack, Truncation, added

TINY = Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22)
LLAMA = Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=32)
DENSE = Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2)

FIXED_A = "fixed_a"
"""The family of clients that hold one A, which rules that train one factor at a time need."""

CHOSEN = (
    (TINY, "fedit"),
    (TINY, "flora_na"),
    (TINY, "flora"),
    (TINY, "florist"),
    (LLAMA, "florist"),
    (LLAMA, "flora"),
    (TINY, "fedex"),
    (TINY, "hetlora"),
    (DENSE, "flexlora"),
)


def on_tiny(rule: str) -> Case:
    """The case of a rule that none was chosen for."""
    both = flk.rules.find(rule).trains == "both"
    return TINY if both else replace(TINY, family=FIXED_A)


CASES = (
    *CHOSEN,
    *(
        (on_tiny(rule), rule)
        for rule in flk.rules.names()
        if rule not in [chosen for _, chosen in CHOSEN]
    ),
)
"""Every rule has one."""

PEERS: Mapping[str, Sequence[Peer[Any]]] = {
    "fedit": (flower.PEER,),
    "flora_na": (flower.AS_LESS,),
    "flora": (peft_merge.CAT,),
    "florist": (three_svds.PEER, qr_core.PEER),
    "flexlora": (dense_svd.PEER, peft_merge.SVD),
}

WEIGHT = "base_model.model.{}.lora_{}.weight"


def compare(round_: Round, rule: str, peers: Sequence[Peer[Any]], stage: str) -> Comparison:
    """One rule beside peers that make the same factors."""
    clients, shares = adapters(round_), round_.shares
    options: dict[str, Any] = {"energy": ENERGY} if rule == "florist" else {}
    asked = task(round_, rule)
    ours = Variant(
        f"aggregate {rule}",
        lambda: flk.aggregate(clients, rule=rule, weights=shares, **options),
        lambda found: checks(round_, rule, found),
        asked.work if rule not in OWN_WORK else OWN_WORK[rule](round_),
    )
    return Comparison(stage, round_.case, (ours, *variants(asked, peers)), name=rule)


def task(round_: Round, rule: str) -> Averages | Stack | Truncation:
    """What a rule's peers are asked for: the factors, without a report."""
    if rule == "florist":
        return Truncation(round_, ENERGY, live=True)
    if rule == "flexlora":
        return Truncation(round_, 1.0, max(round_.case.ranks), live=True)
    return Stack(round_) if rule == "flora" else Averages(round_)


def adapters(round_: Round) -> list[flk.Adapter]:
    """The clients as PEFT's state dicts give them."""
    case, clients = round_.case, []
    for k, rank in enumerate(case.ranks):
        state = {}
        for part in round_.parts:
            for index, name in enumerate(names(part)):
                state[WEIGHT.format(name, "A")] = part.client_a[index][k]
                state[WEIGHT.format(name, "B")] = part.client_b[index][k]
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": float(round_.parts[0].scalings[0, k]) * rank,
            "target_modules": [part.case.module for part in round_.parts],
        }
        clients.append(flk.Adapter.from_state_dict(state, config, name=f"client {k}"))
    return clients


def names(part: Stacks) -> list[str]:
    """Module names in layer order."""
    return [f"model.layers.{index}.{part.case.module}" for index in range(part.case.modules)]


def factors_of(round_: Round, adapter: flk.Adapter) -> list[flk.Factors]:
    """An adapter's factors in the round's order."""
    return [adapter.factors[name] for part in round_.parts for name in names(part)]


def pairs_of(round_: Round, adapter: flk.Adapter) -> list[Pair]:
    """B_g and A_g per module, scaling inside."""
    return [(x.b.double() * x.scaling, x.a) for x in factors_of(round_, adapter)]


def checks(round_: Round, rule: str, found: flk.Aggregation) -> list[Check]:
    """The factors beside what the rule asks for, and the report beside the factors."""
    pairs = pairs_of(round_, found.adapter)
    if found.residual is not None:
        rest = pairs_of(round_, found.residual)
        pairs = [
            (torch.cat([b, more_b], dim=1), torch.cat([a, more_a]))
            for (b, a), (more_b, more_a) in zip(pairs, rest, strict=True)
        ]
    asked = task(round_, rule)
    if rule == "fedsa":  # B stays with the client
        kept = factors_of(round_, found.client_adapter(0))
        moved = [
            float((mine.b - b[0]).abs().max())
            for mine, (b, _, _) in zip(kept, round_.modules, strict=True)
        ]
        means = Averages(round_).checks(None, [item.a for item in kept])
        return [Check("client 0's own B", max(moved), 0.0), *means]
    if isinstance(asked, (Truncation, Stack)):
        answered = asked.checks(pairs)
    elif rule in ("fedit", "ffa"):
        scaling = float(round_.parts[0].scalings[0, 0])  # one for all clients and modules
        answered = asked.checks([b / scaling for b, _ in pairs], [a for _, a in pairs])
    else:
        answered = []
    return [*answered, _report(round_, found, pairs)]


def _report(round_: Round, found: flk.Aggregation, pairs: Sequence[Pair]) -> Check:
    """The errors that the report tells beside those of the factors."""
    worst = 0.0
    for part, mine in zip(round_.parts, round_.split(pairs), strict=True):
        error = correctness.distances(part, mine) / part.total_energy.sqrt()
        told = [found.report[name].relative_error for name in names(part)]
        gap = error.cpu() - torch.tensor(told, dtype=torch.float64)
        worst = max(worst, float(gap.abs().max()))
    return Check("error beside the report's", worst, correctness.OUTPUT_EPS[round_.case.dtype])


def _flora_na(round_: Round) -> Work:
    case = round_.case
    return added([roofline.flora_na(part.b, part.a, case.clients) for part in round_.parts])


def _fedex(round_: Round) -> Work:
    """The stack is part of the result."""
    return Averages(round_).work + Work(round_.nbytes)


OWN_WORK: Mapping[str, Callable[[Round], Work]] = {"flora_na": _flora_na, "fedex": _fedex}
"""Rules whose peers are asked for less."""


def comparisons(device: Device) -> Mapping[str, Make]:
    """One per case and rule."""

    def of(case: Case, rule: str) -> Make:
        return lambda where: compare(
            Round.draw(case, where.torch_device), rule, PEERS.get(rule, ()), "aggregate"
        )

    return {f"{rule} {case}": of(case, rule) for case, rule in CASES}


SUITE = Suite("aggregate", comparisons)
