"""FedIT: A = sum_k w_k A_k and B = sum_k w_k B_k (arXiv 2305.05644)."""

import pytest
import torch
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
    assert_average,
    assert_report,
    draw,
    norm,
    update,
)

import fedlora_kernels as flk


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_both_factors_are_averaged(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("fedit")
    for module in round_.modules:
        assert_average(result.adapter, module, *round_.means(module))
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_absent_modules_renormalized(dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES["absent_modules"], dtype=dtype)
    result = round_.aggregate("fedit", absent="renormalize")
    for module in round_.modules:
        assert_average(result.adapter, module, *round_.means(module, renormalize=True))


@pytest.mark.parametrize("rslora", [False, True])
def test_common_scaling_stays_in_the_config_and_the_factors_are_plain_means(rslora: bool) -> None:
    round_ = draw(alphas=(8, 8, 8), rslora=rslora)
    result = round_.aggregate("fedit").adapter
    assert result.config["lora_alpha"] == 8
    assert result.config["use_rslora"] is rslora
    assert result.config["r"] == 4
    for module in round_.modules:
        bs, as_, _, weights = round_.of(module)
        b = sum(w * b.double() for w, b in zip(weights, bs, strict=True))
        a = sum(w * a.double() for w, a in zip(weights, as_, strict=True))
        torch.testing.assert_close(result.factors[module].b.double(), b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result.factors[module].a.double(), a, rtol=1e-6, atol=1e-7)


def test_different_scalings_are_folded_into_b() -> None:
    round_ = draw()
    result = round_.aggregate("fedit").adapter
    assert {factors.scaling for factors in result.factors.values()} == {1.0}
    assert result.config["use_rslora"] is False
    for module in round_.modules:
        b, _ = round_.means(module)
        torch.testing.assert_close(result.factors[module].b.double(), b, rtol=1e-6, atol=1e-6)


def test_equal_weights_when_none_are_given() -> None:
    round_ = draw(weights=(1, 1, 1))
    result = flk.aggregate(list(round_.adapters), rule="fedit")
    for module in round_.modules:
        assert_average(result.adapter, module, *round_.means(module))


def test_error_of_independent_clients_is_large_and_reported() -> None:
    round_ = draw()
    result = round_.aggregate("fedit")
    for module, row in result.report.items():
        ideal = round_.ideal(module)
        error = norm(ideal - update(result.adapter, module)) / norm(ideal)
        assert error > 0.3
        assert abs(row.relative_error - error) < 1e-5
