"""FLoRIST: the truncated SVD at a share of each module's energy (arXiv 2506.09199)."""

import itertools
import math
from typing import Any

import pytest
import torch
from assertions import EPS, assert_within
from federation import (
    CASES,
    WORKING_DTYPES,
    Federation,
    assert_ideal,
    assert_report,
    draw,
    norm,
    of_batch,
    product_bound,
    update,
)
from matrices import FAMILIES, THRESHOLD_RANKS

from fedlora_kernels import reference

ENERGY_BAND = 1e-9
"""A dense cumulative energy this close to the threshold allows both neighbours."""


def allowed_ranks(ideal: torch.Tensor, energy: float) -> range:
    """The smallest p with sum_{i<=p} sigma_i^2 >= energy ||dW||^2, dense, with the band."""
    squares = torch.linalg.svdvals(ideal).square()
    if not squares[0] > 0:
        return range(1)
    shares = squares.cumsum(0) / squares.sum()
    lowest = int((shares < energy - ENERGY_BAND).sum()) + 1
    highest = int((shares < min(energy + ENERGY_BAND, 1 - 1e-14)).sum()) + 1
    return range(lowest, highest + 1)


def assert_truncated(round_: Federation, result: Any, ranks: dict[str, range]) -> None:
    """Ranks as expected, and no matrix of the rank is closer."""
    for module in round_.modules:
        ideal, row = round_.ideal(module), result.report[module]
        assert row.rank in ranks[module], f"{module}: rank {row.rank}, expected {ranks[module]}"
        assert result.adapter.factors[module].rank == max(1, row.rank)
        floor = float(reference.rules.svd_floor(ideal, row.rank))
        bound = product_bound(round_, module, result.adapter.factors[module].b.dtype)
        error = torch.linalg.matrix_norm(update(result.adapter, module) - ideal)
        assert_within(error, floor + bound, f"{module}: distance at rank {row.rank}")


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("case", CASES)
def test_smallest_rank_that_keeps_the_energy(case: str, energy: float, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("florist", energy=energy)
    ranks = {module: allowed_ranks(round_.ideal(module), energy) for module in round_.modules}
    assert_truncated(round_, result, ranks)
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_energy_one_is_exact(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("florist", energy=1.0)
    assert_ideal(result, round_)
    assert_report(result, round_)
    for module, row in result.report.items():
        assert row.rank == int(torch.linalg.matrix_rank(round_.ideal(module), rtol=1e-6))


@pytest.mark.parametrize("case", ["mixed_scalings", "wide_mixed_stack", "absent_modules"])
def test_paper_pipeline_gives_the_same_update(case: str) -> None:
    """SVD of the stacked B, of the stacked A and of the core, as the paper writes it."""
    round_ = draw(**CASES[case])
    result = round_.aggregate("florist", energy=0.9)
    for module in round_.modules:
        expected = reference.rules.florist(*round_.of(module), energy=0.9)
        values = torch.linalg.svdvals(round_.ideal(module))
        rank = result.report[module].rank
        gap = float((values[rank - 1] - values[rank]) / values[0])
        bound = product_bound(round_, module, torch.float32) * (1 + 4 / gap)
        assert norm(update(result.adapter, module) - expected) <= bound


@pytest.mark.parametrize("energy", THRESHOLD_RANKS)
@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_energy_exactly_on_the_threshold(energy: float, dtype: torch.dtype) -> None:
    round_ = of_batch(FAMILIES["energy_on_threshold"].build(dtype))
    result = round_.aggregate("florist", energy=energy)
    ranks = tuple(result.report[module].rank for module in round_.modules)
    assert ranks == THRESHOLD_RANKS[energy]


@pytest.mark.parametrize("rank", [1, 2, 13, 10_000])
def test_fixed_rank_is_capped_and_never_an_error(rank: int) -> None:
    round_ = draw(**CASES["wide_mixed_stack"])
    result = round_.aggregate("florist", rank=rank)
    widths = {module: min(rank, 30, *round_.ideal(module).shape) for module in round_.modules}
    assert_truncated(round_, result, {m: range(w, w + 1) for m, w in widths.items()})
    assert_report(result, round_)


@pytest.mark.parametrize("max_rank", [1, 4, 10_000])
def test_max_rank_caps_the_energy(max_rank: int) -> None:
    round_ = draw(**CASES["wide_mixed_stack"])
    result = round_.aggregate("florist", energy=0.9, max_rank=max_rank)
    ranks = {}
    for module in round_.modules:
        wanted = allowed_ranks(round_.ideal(module), 0.9)
        ranks[module] = range(min(wanted[0], max_rank), min(wanted[-1], max_rank) + 1)
    assert_truncated(round_, result, ranks)


@pytest.mark.parametrize("split", ["b", "balanced", "a"])
@pytest.mark.parametrize("options", [{"energy": 0.9}, {"energy": 1.0}, {"rank": 3}], ids=str)
def test_split_moves_the_singular_values_and_not_the_update(
    split: str, options: dict[str, float]
) -> None:
    round_ = draw()
    plain = round_.aggregate("florist", **options)
    result = round_.aggregate("florist", split=split, **options)
    power = {"b": (1.0, 0.0), "balanced": (0.5, 0.5), "a": (0.0, 1.0)}[split]
    for module in round_.modules:
        bound = product_bound(round_, module, torch.float32)
        assert norm(update(result.adapter, module) - update(plain.adapter, module)) <= 2 * bound
        factors = result.adapter.factors[module]
        values = torch.linalg.svdvals(round_.ideal(module))[: factors.rank]
        for found, exponent in ((factors.b.mT, power[0]), (factors.a, power[1])):
            gram = found.double() @ found.double().mT
            expected = torch.diag(values ** (2 * exponent))
            error = (gram - expected).abs().max()
            assert_within(error, 64 * EPS[torch.float32] * expected.max(), f"{module}: {split}")


def test_curve_from_one_factorization() -> None:
    """Each point has the mean rank and error that aggregating at that energy has."""
    round_ = draw(**CASES["wide_mixed_stack"])
    energies = [0.5, 0.8, 0.9, 0.95, 1.0]
    result = round_.aggregate("florist", energy=0.9, energies=energies)
    assert [point.energy for point in result.curve] == energies
    for point in result.curve:
        alone = round_.aggregate("florist", energy=point.energy)
        ranks = {module: alone.report[module].rank for module in round_.modules}
        assert math.isclose(point.mean_rank, sum(ranks.values()) / len(ranks))
        errors, parameters = [], 0
        for module, rank in ranks.items():
            ideal = round_.ideal(module)
            errors.append(float(reference.rules.svd_floor(ideal, rank)) / norm(ideal))
            parameters += rank * sum(ideal.shape)
        assert abs(point.relative_error - sum(errors) / len(errors)) < 1e-6
        assert point.parameters == parameters
    ranks_along = [point.mean_rank for point in result.curve]
    assert ranks_along == sorted(ranks_along)


def test_curve_is_empty_when_not_asked_for() -> None:
    assert draw().aggregate("florist").curve == []


UNEQUAL = {"wide": (5, 41), "small": (4, 3), "tall": (23, 6)}


def captured(spectra: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(spectra[module][:rank].square().sum()) for module, rank in ranks.items())


def cost(ranks: dict[str, int]) -> int:
    return sum(rank * sum(UNEQUAL[module]) for module, rank in ranks.items())


@pytest.mark.parametrize("budget", range(3, 16))
@pytest.mark.parametrize("seed", [0, 1])
def test_rank_budget_buys_the_most_energy(budget: int, seed: int) -> None:
    """By brute force: no cheaper or equally dear choice of ranks (each >= 1) keeps more energy.

    Spending by sigma^2 / (m + n) is the greedy knapsack, optimal among all choices that need no
    more parameters than its own.
    """
    round_ = draw(ranks=(2, 2, 2), sizes=UNEQUAL, seed=seed)
    result = round_.aggregate("florist", rank_budget=budget)
    spectra = {module: torch.linalg.svdvals(round_.ideal(module)) for module in UNEQUAL}
    limits = {module: min(6, *size) for module, size in UNEQUAL.items()}
    ranks = {module: result.report[module].rank for module in UNEQUAL}
    assert sum(ranks.values()) == min(budget, sum(limits.values()))
    assert all(1 <= ranks[module] <= limits[module] for module in UNEQUAL)
    best = captured(spectra, ranks)
    for choice in itertools.product(*(range(1, limits[module] + 1) for module in UNEQUAL)):
        other = dict(zip(UNEQUAL, choice, strict=True))
        if cost(other) <= cost(ranks):
            assert captured(spectra, other) <= best * (1 + 1e-9), f"{other} beats {ranks}"
    assert_truncated(round_, result, {m: range(r, r + 1) for m, r in ranks.items()})


def test_rank_budget_with_max_rank_and_zero_modules() -> None:
    round_ = draw(ranks=(2, 2, 2), sizes=UNEQUAL)
    for k in range(3):
        zero = round_.drawn[k]["tall"]
        round_ = round_.replaced(k, "tall", torch.zeros_like(zero.b), zero.a)
    result = round_.aggregate("florist", rank_budget=6, max_rank=4)
    ranks = {module: result.report[module].rank for module in UNEQUAL}
    assert ranks["tall"] == 0
    assert ranks["wide"] <= 4
    assert ranks["wide"] + ranks["small"] == 6
    assert not update(result.adapter, "tall").any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 0.0}, "energy"),
        ({"energy": -0.5}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"energy": math.nan}, "energy"),
        ({"energies": [0.5, 1.5]}, "energy"),
        ({"rank": 0}, "rank.*0"),
        ({"max_rank": 0}, "max_rank.*0"),
        ({"rank_budget": 0}, "rank_budget.*0"),
        ({"rank_budget": 2}, "rank_budget 2"),
        ({"rank": 3, "rank_budget": 9}, "rank and rank_budget"),
        ({"split": "c"}, "split.*'c'"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw().aggregate("florist", **options)


def test_fast_precision_is_refused_where_float32_cannot_tell() -> None:
    with pytest.raises(ValueError, match=r"fast.*energ"):
        draw().aggregate("florist", energy=1.0, precision="fast")


def test_fast_precision_keeps_float32_accuracy() -> None:
    """Float32 sums of fp32 data: 64 eps of the update, as the operators promise."""
    round_ = draw(**CASES["mixed_ranks"])
    result = round_.aggregate("florist", energy=0.99, precision="fast")
    for module in round_.modules:
        ideal, rank = round_.ideal(module), result.report[module].rank
        floor = float(reference.rules.svd_floor(ideal, rank))
        error = torch.linalg.matrix_norm(update(result.adapter, module) - ideal)
        bound = floor + 64 * EPS[torch.float32] * round_.magnitude(module)
        assert_within(error, bound, f"{module}: fast at rank {rank}")
