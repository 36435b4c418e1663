"""FedEx-LoRA: FedIT's averages and the residual (arXiv 2410.09432)."""

import pytest
import torch
from assertions import EPS, EXACT_PRODUCT, assert_within
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
    assert_average,
    assert_ideal,
    assert_report,
    draw,
    norm,
    product_bound,
    update,
)

import fedlora_kernels as flk
from fedlora_kernels import reference


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_averages_and_residual_are_exact_together(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("fedex")
    assert result.residual is not None
    for module in round_.modules:
        b, a = round_.means(module)
        assert_average(result.adapter, module, b, a)
        bound = product_bound(round_, module, dtype, "fedex")
        error = norm(update(result.residual, module) - (round_.ideal(module) - b @ a))
        assert_within(torch.tensor(error), bound, f"{module}: residual")
    assert_ideal(result, round_)
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_absent_modules_renormalized(dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES["absent_modules"], dtype=dtype)
    assert_ideal(round_.aggregate("fedex", absent="renormalize"), round_, renormalize=True)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 100])
@pytest.mark.parametrize("case", ["mixed_scalings", "wide_stack", "absent_modules"])
def test_residual_rank(case: str, rank: int, dtype: torch.dtype) -> None:
    """The residual is the best of its rank, and the whole is exact when the rank suffices."""
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("fedex", residual_rank=rank)
    assert result.residual is not None
    for module in round_.modules:
        b, a = round_.means(module)
        rest = round_.ideal(module) - b @ a
        stacked_rank = sum(item.shape[1] for item in round_.of(module)[0])
        width = min(rank, stacked_rank, *rest.shape)
        assert result.residual.factors[module].rank == width
        floor = float(reference.rules.svd_floor(rest, width))
        error = norm(update(result.residual, module) - rest)
        bound = floor + product_bound(round_, module, dtype, "fedex")
        assert_within(torch.tensor(error), bound, f"{module}: residual of rank {width}")
        assert result.report[module].rank == width + 4 if case != "wide_stack" else True
    assert_report(result, round_)


@pytest.mark.parametrize("rank", [None, 2])
def test_residual_of_identical_clients_is_zero(rank: int | None) -> None:
    """Nothing but rounding is left, and rounding is not blown up into an update."""
    one = draw(ranks=(4,), alphas=(8,), weights=(1,))
    result = flk.aggregate([one.adapters[0]] * 3, rule="fedex", residual_rank=rank)
    assert result.residual is not None
    for module in one.modules:
        bound = (EXACT_PRODUCT + EPS[torch.float32]) * one.spread(module)
        assert norm(update(result.residual, module)) <= bound
        assert result.residual.factors[module].a.isfinite().all()
        assert result.residual.factors[module].b.isfinite().all()


@pytest.mark.parametrize("rank", [0, -1])
def test_residual_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=f"residual_rank.*{rank}"):
        draw().aggregate("fedex", residual_rank=rank)
