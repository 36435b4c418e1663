"""Flows: one ``flk.aggregate`` call on adapters in memory, beside the plain way to the same result.

    fedit, ffa, fedsa     Flower's numpy average of both factors of every module
    flora                 torch.cat of the same factors
    florist, flexlora     QR + QR + core SVD, module by module

Three rounds of whole models: RoBERTa-large's 48 modules, TinyLlama's 44 of two sizes, MiniLM's 12.
The report of a result is read by the check, never in the timed call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

import fedlora_kernels as flk
from fedlora_kernels import reference
from fedlora_kernels.bench import correctness, inputs, peers
from fedlora_kernels.bench.aggregations import WEIGHT, averaged
from fedlora_kernels.bench.correctness import Check, Pair
from fedlora_kernels.bench.inputs import Stacks
from fedlora_kernels.bench.measure import Comparison, Row, Variant
from fedlora_kernels.bench.roofline import Work, stacked_svd
from fedlora_kernels.bench.shapes import Case, equal
from fedlora_kernels.bench.table import duration

LARGE = Case("RoBERTa-large", "query", equal(3, 8), modules=24, beside=("value",))
TINYLLAMA = Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22, beside=("v_proj",))
SMALL = Case("all-MiniLM-L6-v2", "query", equal(8, 8), modules=6, beside=("value",))
CASES = (LARGE, TINYLLAMA, SMALL)

ENERGY = 0.9
"""FLoRIST's."""

RULES = ("fedit", "ffa", "fedsa", "flora", "florist", "flexlora")

TARGETS: dict[str, tuple[float, float, float]] = {
    "fedit": (1.3, 1.3, 2.0),
    "ffa": (0.8, 0.8, 1.5),
    "fedsa": (0.8, 0.8, 1.5),
    "flora": (1.3, 1.3, 2.0),
    "florist": (1 / 2.5, 1 / 3.5, 1 / 2.0),
    "flexlora": (1 / 2.5, 1 / 3.5, 1 / 2.0),
}
"""At most this share of the first peer's time, in the order of ``CASES``."""


@dataclass(frozen=True)
class Round:
    """The clients of one round, and what every peer is given of them."""

    case: Case
    parts: tuple[Stacks, ...]
    """one per kind of module"""

    @classmethod
    def draw(cls, case: Case, device: torch.device | str = "cpu") -> "Round":
        """Factors from the case's seed."""
        return cls(case, tuple(inputs.draw(part, device) for part in case.parts))

    @property
    def shares(self) -> list[float]:
        """The clients' weights."""
        return list(self.parts[0].weights.tolist())

    @property
    def adapters(self) -> list[flk.Adapter]:
        """The clients as PEFT's state dicts give them."""
        clients = []
        for k, rank in enumerate(self.case.ranks):
            state = {}
            for part in self.parts:
                for index, name in enumerate(names(part)):
                    state[WEIGHT.format(name, "A")] = part.client_a[index][k]
                    state[WEIGHT.format(name, "B")] = part.client_b[index][k]
            config = {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": float(self.parts[0].scalings[0, k]) * rank,
                "target_modules": [self.case.module, *self.case.beside],
            }
            clients.append(flk.Adapter.from_state_dict(state, config, name=f"client {k}"))
        return clients

    @property
    def pairs(self) -> list[tuple[list[Tensor], list[Tensor], Tensor]]:
        """B_k, A_k and w_k s_k of every module, as tensors of the clients' own."""
        return [
            (part.client_b[index], part.client_a[index], part.weights * part.scalings[index])
            for part in self.parts
            for index in range(part.case.modules)
        ]

    def split(self, found: Sequence[Any]) -> list[Sequence[Any]]:
        """One entry per module as one sequence per part."""
        split, first = [], 0
        for part in self.parts:
            split.append(found[first : first + part.case.modules])
            first += part.case.modules
        return split


def names(part: Stacks) -> list[str]:
    """Module names of one part."""
    return [f"model.layers.{index}.{part.case.module}" for index in range(part.case.modules)]


def flow(case: Case, rule: str, device: torch.device | str = "cpu") -> Comparison:
    """One rule on one round, beside its peers; the first peer has the target."""
    if rule == "ffa":
        case = replace(case, family="fixed_a")
    round_ = Round.draw(case, device)
    clients, shares, modules = round_.adapters, round_.shares, round_.pairs
    options: dict[str, Any] = {"energy": ENERGY} if rule == "florist" else {}
    work = _work(round_, rule)
    ours = Variant(
        f"aggregate {rule}",
        lambda: flk.aggregate(clients, rule=rule, weights=shares, **options),
        lambda found: _checks(round_, rule, found),
        work,
    )
    others: tuple[Variant, ...]
    if rule in ("fedit", "ffa", "fedsa"):
        arrays = [
            [x[k].cpu().numpy() for b, a, _ in modules for x in (b, a)] for k in range(case.clients)
        ]
        others = (
            Variant(
                "numpy average",
                lambda: peers.flower_average(arrays, shares),
                lambda found: _average_checks(
                    round_, [torch.from_numpy(x) for x in found[::2]], found[1::2]
                ),
                work,
                peers.FLOWER,
                note="of both factors",
            ),
        )
    elif rule == "flora":
        others = (
            Variant(
                "torch.cat",
                lambda: [(torch.cat(b, dim=1), torch.cat(a)) for b, a, _ in modules],
                lambda found: _product_checks(round_, _weighted(round_, found)),
                work,
                "torch.cat",
                note="the factors as they are, without weights and scalings",
                less=True,
            ),
            Variant(
                "torch.cat of scaled factors",
                lambda: stack_scaled(modules),
                lambda found: _product_checks(round_, found),
                work,
                "torch.cat",
            ),
        )
    else:
        cap = None if rule == "florist" else max(case.ranks)
        energy = ENERGY if rule == "florist" else 1.0
        others = (
            Variant(
                "QR + QR + core SVD",
                lambda: [peers.qr_factors(b, a, energy, cap) for b, a in stack_scaled(modules)],
                lambda found: _optimal_checks(round_, found, 10 * correctness.PRODUCT),
                work,
                peers.QR_CORE,
                note="no report",
            ),
        )
    return Comparison("flows", case, (ours, *others), name=rule)


def stack_scaled(modules: Sequence[tuple[list[Tensor], list[Tensor], Tensor]]) -> list[Pair]:
    """[B_1 | ... | B_K] and [w_1 s_1 A_1 ; ... ; w_K s_K A_K] of every module."""
    stacked = []
    for b, a, scales in modules:
        scaled = [factor * scale for factor, scale in zip(a, scales.tolist(), strict=True)]
        stacked.append((torch.cat(b, dim=1), torch.cat(scaled)))
    return stacked


def ratios(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of text: every flow's time, its share of each peer's time, and the target."""
    for _, block in groupby(rows, key=lambda row: row.comparison):
        ours, *others = block
        for index, peer in enumerate(others):
            if ours.seconds is None or peer.times_first is None:
                yield f"{ours.comparison}: {ours.refused or peer.refused}"
                continue
            told = f"{1 / peer.times_first:5.2f} of {peer.variant}'s {duration(peer.seconds)}"
            if index == 0:
                told += f" (target {target(ours):.2f})"
            yield f"{ours.comparison}: {duration(ours.seconds)}, {told}"


def target(row: Row) -> float:
    """At most this share of the first peer's time."""
    rule, _, case = row.comparison.partition(" ")
    plain = [str(known) for known in CASES]
    return TARGETS[rule][plain.index(case.removesuffix(", fixed_a"))]


def _of_part(found: flk.Adapter, part: Stacks) -> list[flk.Factors]:
    return [found.factors[name] for name in names(part)]


def _checks(round_: Round, rule: str, found: flk.Aggregation) -> list[Check]:
    factors = [item for part in round_.parts for item in _of_part(found.adapter, part)]
    pairs = [(item.b.double() * item.scaling, item.a) for item in factors]
    if rule == "fedsa":  # B stays with the client
        own = found.client_adapter(0)
        kept = [item for part in round_.parts for item in _of_part(own, part)]
        moved = [
            float((mine.b - b[0]).abs().max())
            for mine, (b, _, _) in zip(kept, round_.pairs, strict=True)
        ]
        checks = [Check("client 0's own B", max(moved), 0.0)]
        return checks + _average_checks(round_, None, [item.a for item in kept])
    if rule in ("fedit", "ffa"):
        # The mean of s_k B_k beside that of A_k: scalings are equal, so the mean of B follows.
        unscaled = [
            b / float(part.scalings[0, 0])
            for part, sides in zip(round_.parts, round_.split(pairs), strict=True)
            for b, _ in sides
        ]
        checks = _average_checks(round_, unscaled, [a for _, a in pairs])
    elif rule == "flora":
        checks = _product_checks(round_, pairs)
    else:
        checks = _optimal_checks(round_, pairs)
        ranks = round_.split([item.rank for item in factors])
        energy, cap = (ENERGY, None) if rule == "florist" else (1.0, max(round_.case.ranks))
        for part, kept_ranks in zip(round_.parts, ranks, strict=True):
            checks += correctness.same_ranks(part, kept_ranks, energy, cap)
    return checks + _report_checks(round_, found, pairs)


def _report_checks(round_: Round, found: flk.Aggregation, pairs: Sequence[Pair]) -> list[Check]:
    worst = 0.0
    for part, sides in zip(round_.parts, round_.split(pairs), strict=True):
        error = correctness.distances(part, sides) / part.total_energy.sqrt()
        told = [found.report[name].relative_error for name in names(part)]
        gap = error - torch.tensor(told, dtype=torch.float64)
        worst = max(worst, float(gap.abs().max()))
    return [Check("error beside the report's", worst, correctness.PRODUCT)]


def _average_checks(round_: Round, bs: Sequence[Tensor] | None, as_: Sequence[Any]) -> list[Check]:
    """Both factors beside their float64 means; A alone where B is None."""
    sides = [("a", [torch.as_tensor(a) for a in as_])]
    if bs is not None:
        sides.append(("b", list(bs)))
    checks = []
    for side, found in sides:
        for part, mine in zip(round_.parts, round_.split(found), strict=True):
            blocks = part.client_a if side == "a" else part.client_b
            stacked = torch.stack([torch.stack(module) for module in blocks])
            expected = reference.weighted_sum(stacked, part.weights)
            checks.append(
                correctness.same_tensor(torch.stack(list(mine)), expected, correctness.PRODUCT)
            )
    return checks


def _product_checks(round_: Round, pairs: Sequence[Pair]) -> list[Check]:
    each = zip(round_.parts, round_.split(pairs), strict=True)
    return [check for part, mine in each for check in correctness.exact_product(part, mine)]


def _optimal_checks(
    round_: Round, pairs: Sequence[Pair], tolerance: float | None = None
) -> list[Check]:
    each = zip(round_.parts, round_.split(pairs), strict=True)
    return [
        check for part, mine in each for check in correctness.near_optimal(part, mine, tolerance)
    ]


def _weighted(round_: Round, pairs: Sequence[Pair]) -> list[Pair]:
    """Stacks of factors as they are, with weights and scalings put in for the check."""
    scales = [row for part in round_.parts for row in part.scale]
    return [(b * scale, a) for (b, a), scale in zip(pairs, scales, strict=True)]


def _work(round_: Round, rule: str) -> Work:
    """What the result needs at least."""
    return sum(
        (_part_work(part, rule) for part in round_.parts[1:]), _part_work(round_.parts[0], rule)
    )


def _part_work(part: Stacks, rule: str) -> Work:
    if rule in ("florist", "flexlora"):
        energy, cap = (ENERGY, None) if rule == "florist" else (1.0, max(part.case.ranks))
        ranks = correctness.expected_ranks(part, energy, cap)
        return stacked_svd(part.b, part.a, int(ranks.sum()), int(ranks.max()))
    if rule == "flora":
        return Work(2 * part.nbytes)
    return averaged(part)
