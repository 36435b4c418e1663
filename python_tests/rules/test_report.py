"""The report: rows, means over modules, what is written to report.json, and bytes."""

import json
import math
from pathlib import Path

import pytest
import torch
from federation import (
    CASES,
    FIXED_A,
    PRODUCT_RULES,
    assert_report,
    draw,
    norm,
    of_batch,
    update,
    whole_update,
)
from matrices import FAMILIES

import fedlora_kernels as flk
from fedlora_kernels.gram_space.report import ModuleReport, Report


def test_means_over_the_modules() -> None:
    rows = Report(
        {
            "a": ModuleReport(rank=2, energy=0.75, relative_error=0.5, svd_floor=0.25, norm=1.0),
            "b": ModuleReport(rank=5, energy=0.91, relative_error=0.3, svd_floor=0.05, norm=9.0),
        }
    )
    assert math.isclose(rows.relative_error, 0.4)
    assert math.isclose(rows.svd_floor, 0.15)
    assert math.isclose(rows.energy, 0.83)
    assert math.isclose(rows.mean_rank, 3.5)
    assert rows.as_dict()["b"] == {
        "rank": 5, "energy": 0.91, "relative_error": 0.3, "svd_floor": 0.05, "norm": 9.0
    }  # fmt: skip


@pytest.mark.parametrize("rule", [rule for rule in flk.rules.names() if rule != "fedsa"])
def test_rows_are_sorted_and_equal_the_dense_errors(rule: str) -> None:
    round_ = draw(common_a=rule in FIXED_A)
    result = round_.aggregate(rule)
    assert list(result.report) == round_.modules
    assert_report(result, round_)


@pytest.mark.parametrize("rule", ["fedit", "flora_na", "hetlora", "florist", "fedex"])
def test_report_after_absent_modules_were_renormalized(rule: str) -> None:
    """The error is against the renormalized update, which is what the option calls ideal."""
    round_ = draw(**CASES["absent_modules"])
    result = round_.aggregate(rule, absent="renormalize")
    for module, row in result.report.items():
        ideal = round_.ideal(module, renormalize=True)
        error = norm(whole_update(result, module) - ideal) / norm(ideal)
        assert abs(row.relative_error - error) < 1e-5
        assert abs(row.norm - norm(ideal)) < 1e-6 * norm(ideal)


@pytest.mark.parametrize("rule", flk.rules.names())
def test_error_is_zero_and_rank_is_honest_when_nobody_learned(rule: str) -> None:
    round_ = draw(**CASES["all_zero_round"], common_a=True)
    result = round_.aggregate(rule)
    for module, row in result.report.items():
        assert (row.relative_error, row.svd_floor, row.norm, row.energy) == (0.0, 0.0, 0.0, 1.0)
        assert not update(result.adapter, module).any()
        assert result.adapter.factors[module].a.isfinite().all()


@pytest.mark.parametrize("energy", [0.9, 1.0])
def test_florist_rank_is_zero_for_a_zero_update(energy: float) -> None:
    result = draw(**CASES["all_zero_round"]).aggregate("florist", energy=energy)
    assert {row.rank for row in result.report.values()} == {0}
    assert {factors.rank for factors in result.adapter.factors.values()} == {1}


@pytest.mark.parametrize("rule", ["fedit", "florist", "flora_na", "hetlora", "flexlora"])
def test_clients_that_cancel_are_a_zero_update(rule: str) -> None:
    """B_1 = -B_0 with one A: dW is exactly 0, what is left in the Grams is rounding."""
    round_ = of_batch(FAMILIES["canceling"].build(torch.float32))
    result = round_.aggregate(rule, **PRODUCT_RULES.get(rule, {}))
    for module, row in result.report.items():
        assert norm(round_.ideal(module)) == 0
        assert norm(update(result.adapter, module)) <= 1e-6 * round_.magnitude(module)
        assert 0 <= row.energy <= 1, f"{module}: captured energy {row.energy}"
        assert row.relative_error <= 1


@pytest.mark.parametrize("rule", ["flora", "fedex", "flexlora", "fedit"])
def test_report_json_is_json_and_says_the_same(rule: str, tmp_path: Path) -> None:
    result = draw().aggregate(rule)
    result.save(tmp_path / "global")
    written = json.loads((tmp_path / "global" / "report.json").read_text())
    assert written == {"rule": rule, "modules": result.report.as_dict()}


def test_report_json_has_no_infinity(tmp_path: Path) -> None:
    """An error beside a zero update has no JSON number; strict readers refuse "Infinity"."""
    one = draw(ranks=(2,), alphas=(2,), weights=(1,), sizes={"q": (4, 6)})
    drawn = one.drawn[0]["q"]
    b, a = drawn.b.round(), drawn.a.round()
    pair = draw(ranks=(2, 2, 2), alphas=(2, 2, 2), weights=(1, 1, 2), sizes={"q": (4, 6)})
    # 2 B A - 2 B A is zero, the mean of the factors is not.
    round_ = (
        pair.replaced(0, "q", b, 2 * a)
        .replaced(1, "q", -2 * b, a)
        .replaced(2, "q", torch.zeros_like(b), a)
    )
    assert not round_.ideal("q").any()
    result = round_.aggregate("fedit")
    result.save(tmp_path / "global")

    def refuse(word: str) -> float:
        raise AssertionError(f"report.json holds {word}")

    json.loads((tmp_path / "global" / "report.json").read_text(), parse_constant=refuse)


def test_bytes_up_and_down() -> None:
    """What a client sends, and what it receives with the residual."""
    round_ = draw(dtype=torch.bfloat16)
    per_rank = sum(2 * (m + n) for m, n in ((24, 17), (13, 40), (24, 17)))
    flora = round_.aggregate("flora")
    assert flora.bytes_up == [4 * per_rank] * 3
    assert flora.bytes_down == [12 * per_rank] * 3
    assert flora.adapter.bytes == 12 * per_rank
    fedex = round_.aggregate("fedex")
    assert fedex.bytes_down == [(4 + 12) * per_rank] * 3
    mixed = draw(ranks=(8, 4, 2)).aggregate("flexlora")
    assert mixed.bytes_down == [2 * rank * per_rank for rank in (8, 4, 2)]
