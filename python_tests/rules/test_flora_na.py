"""FLoRA-NA as a rule: the closest averages, between the SVD floor and FedIT (arXiv 2509.26399)."""

import itertools

import pytest
import torch
from assertions import EPS
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
    Federation,
    assert_report,
    draw,
    federation,
    norm,
    of_batch,
    update,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

from fedlora_kernels import reference

FAMILY_DTYPES = (torch.float32, torch.bfloat16)
MIXTURES = tuple(case for case in FAMILY_CASES if case[1] in FAMILY_DTYPES)

ERROR_NOISE = 2e-7
"""sqrt(c R eps) with R = 52: a reported error is the root of a difference of Gram sums."""


@pytest.mark.parametrize("case", MIXTURES, ids=case_id)
def test_between_the_svd_floor_and_fedit(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    closest, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    for module in round_.modules:
        ours, theirs = closest.report[module], plain.report[module]
        magnitude = round_.spread(module)
        noise = ERROR_NOISE * (magnitude / ours.norm if ours.norm else 1.0)
        assert ours.relative_error <= theirs.relative_error + noise
        assert ours.relative_error >= ours.svd_floor - noise


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_update_is_as_good_as_the_dense_minimization(case: str, dtype: torch.dtype) -> None:
    """A joint Newton method on the dense residual finds nothing better (up to its own minima)."""
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("flora_na")
    assert_report(result, round_)
    for module in round_.modules:
        ideal = round_.ideal(module)
        found = norm(update(result.adapter, module) - ideal)
        best = norm(reference.rules.flora_na(*round_.of(module)) - ideal)
        assert found <= best + (1e-3 + 2 * EPS[dtype]) * round_.magnitude(module)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("alphas", [(8, 8, 8), (4, 8, 16)], ids=["equal", "mixed"])
def test_factors_are_averages_of_the_clients(alphas: tuple[float, ...], dtype: torch.dtype) -> None:
    """A_hat in the span of the A_u and B_hat in the span of the B_u, one coefficient a client."""
    round_ = draw(alphas=alphas, dtype=dtype)
    result = round_.aggregate("flora_na").adapter
    for module in round_.modules:
        bs, as_, _, _ = round_.of(module)
        for blocks, found in ((bs, result.factors[module].b), (as_, result.factors[module].a)):
            basis = torch.stack([block.double().flatten() for block in blocks], dim=1)
            target = found.double().flatten()
            fitted = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
            assert float((fitted - target).norm()) <= EPS[dtype] * float(target.norm())


@pytest.mark.parametrize("rslora", [False, True])
def test_common_scaling_stays_in_the_config(rslora: bool) -> None:
    result = draw(alphas=(8, 8, 8), rslora=rslora).aggregate("flora_na").adapter
    assert (result.config["lora_alpha"], result.config["use_rslora"]) == (8, rslora)
    folded = draw(alphas=(4, 8, 16), rslora=rslora).aggregate("flora_na").adapter
    assert {factors.scaling for factors in folded.factors.values()} == {1.0}


def flipped(dtype: torch.dtype, clients: int) -> Federation:
    """The same update in every client, every second one with both factors negated."""
    one = draw(ranks=(4,), alphas=(8,), weights=(1,), dtype=dtype).drawn[0]
    drawn = []
    for k in range(clients):
        sign = -1 if k % 2 else 1
        drawn.append({m: type(x)(sign * x.b, sign * x.a, x.scaling) for m, x in one.items()})
    return federation(drawn, [1.0] * clients)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("clients", [2, 3, 4])
def test_sign_flipped_clients_reach_error_zero(clients: int, dtype: torch.dtype) -> None:
    """FedIT loses the update (all of it for two clients), the surrogate loses nothing."""
    round_ = flipped(dtype, clients)
    result, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    for module in round_.modules:
        ideal = round_.ideal(module)
        error = norm(update(result.adapter, module) - ideal)
        # p and q round once each beside the factors, which are exact multiples of one another.
        assert error <= (1e-7 + EPS[dtype]) * round_.magnitude(module)
        assert result.report[module].relative_error <= ERROR_NOISE
        assert plain.report[module].relative_error > 0.8


@pytest.mark.parametrize("name", ["dominant_client", "badly_scaled_1e2", "independent"])
def test_gains_where_clients_differ_in_scale(name: str) -> None:
    round_ = of_batch(FAMILIES[name].build(torch.float32))
    closest, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    assert closest.report.relative_error < 0.95 * plain.report.relative_error


@pytest.mark.parametrize("options", [{"max_sweeps": 0}, {"tol": -1.0}], ids=str)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw().aggregate("flora_na", **options)


def test_more_sweeps_are_never_worse() -> None:
    round_ = draw(**EQUAL_RANK_CASES["wide_stack"])
    errors = [
        round_.aggregate("flora_na", max_sweeps=count).report.relative_error
        for count in (1, 2, 5, 50)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
