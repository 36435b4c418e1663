"""flows: one ``flk.aggregate`` call on adapters in memory, beside the plain way to its factors.

    fedit, ffa, fedsa     Flower's numpy average of both factors of every module
    flora                 torch.cat of the same factors
    florist, flexlora     QR + QR + core SVD, module by module

Three rounds of whole models: RoBERTa-large's 48 modules, TinyLlama's 44 of two sizes, MiniLM's 12.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from benchmarks.peers import flower, qr_core, torch_cat
from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Round
from benchmarks.stand.measure import Row
from benchmarks.stand.peer import Peer
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Make, Suite
from benchmarks.stand.table import duration
from benchmarks.suites import aggregate
from benchmarks.suites.aggregate import FIXED_A

LARGE = Case("RoBERTa-large", "query", equal(3, 8), modules=24, beside=("value",))
TINYLLAMA = Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22, beside=("v_proj",))
SMALL = Case("all-MiniLM-L6-v2", "query", equal(8, 8), modules=6, beside=("value",))
CASES = (LARGE, TINYLLAMA, SMALL)

PEERS: Mapping[str, Sequence[Peer[Any]]] = {
    "fedit": (flower.PEER,),
    "ffa": (flower.PEER,),
    "fedsa": (flower.PEER,),
    "flora": (torch_cat.SCALED, torch_cat.PEER),
    "florist": (qr_core.PEER,),
    "flexlora": (qr_core.PEER,),
}
"""The first one has the target."""

TARGETS: Mapping[str, tuple[float, float, float]] = {
    "fedit": (1.3, 1.3, 2.0),
    "ffa": (0.8, 0.8, 1.5),
    "fedsa": (0.8, 0.8, 1.5),
    "flora": (1.3, 1.3, 2.0),
    "florist": (1 / 2.5, 1 / 3.5, 1 / 2.0),
    "flexlora": (1 / 2.5, 1 / 3.5, 1 / 2.0),
}
"""At most this share of the first peer's time, in the order of ``CASES``."""


def comparisons(device: Device) -> Mapping[str, Make]:
    """One per case and rule."""

    def of(case: Case, rule: str) -> Make:
        return lambda where: aggregate.compare(
            Round.draw(case, where.torch_device), rule, PEERS[rule], "flows"
        )

    made = {}
    for known in CASES:
        for rule in PEERS:
            case = replace(known, family=FIXED_A) if rule == "ffa" else known
            made[f"{rule} {case}"] = of(case, rule)
    return made


def ratios(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of text: every flow's time, its share of each peer's time, and the target."""
    for _, block in groupby(rows, key=lambda row: row.comparison):
        ours, *others = block
        for index, peer in enumerate(others):
            if ours.seconds is None or peer.seconds is None or peer.times_first is None:
                yield f"{ours.comparison}: {ours.refused or peer.refused}"
                continue
            told = f"{1 / peer.times_first:5.2f} of {peer.variant}'s {duration(peer.seconds)}"
            if index == 0:
                told += f" (target {target(ours):.2f})"
            yield f"{ours.comparison}: {duration(ours.seconds)}, {told}"


def target(row: Row) -> float:
    """At most this share of the first peer's time."""
    rule, _, case = row.comparison.partition(" ")
    known = [str(item) for item in CASES]
    return TARGETS[rule][known.index(case.removesuffix(f", {FIXED_A}"))]


SUITE = Suite("flows", comparisons, say=lambda rows: list(ratios(rows)))
