"""weighted_sum and weighted_sum_list against the sum in float64."""

import pytest
import torch
from assertions import (
    EPS,
    BadCall,
    assert_compiles,
    assert_refuses,
    assert_same_bits,
    assert_within,
    poisoned_memory,
    strided_in_nan,
)
from matrices import DEVICE, DTYPES, EQUAL_RANK_CASES, FAMILIES, Batch, case_id, normal

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora


def stacks(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The clients' B and A as [L, K, m, r] and [L, K, r, n]."""
    return (
        torch.stack(batch.b.split(batch.ranks, dim=2), dim=1),
        torch.stack(batch.a.split(batch.ranks, dim=1), dim=1),
    )


def assert_sum(result: torch.Tensor, stacked: torch.Tensor, weights: torch.Tensor) -> None:
    """Elementwise: one rounding to the dtype and c K eps of the sum of absolute terms."""
    assert result.dtype == stacked.dtype
    expected = reference.weighted_sum(stacked.double(), weights)
    terms = reference.weighted_sum(stacked.double().abs(), weights.double().abs())
    tiny = torch.finfo(stacked.dtype).smallest_normal
    accumulated = 2 * stacked.shape[1] * EPS[torch.float64] * terms
    bound = accumulated + EPS[stacked.dtype] * (expected.abs() + tiny)
    assert_within((result.cpu().double() - expected).abs(), bound, "weighted sum")


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    own_weights = batch.weights * batch.scalings
    for stacked in stacks(batch):
        with poisoned_memory():
            common = raw.weighted_sum(stacked.to(DEVICE), batch.weights.to(DEVICE))
            own = raw.weighted_sum(stacked.to(DEVICE), own_weights.to(DEVICE))
            factors = [factor.clone().to(DEVICE) for factor in stacked.flatten(0, 1)]
            listed = raw.weighted_sum_list(factors, own_weights.to(DEVICE))
        assert_sum(common, stacked, batch.weights)
        assert_sum(own, stacked, own_weights)
        assert_sum(listed, stacked, own_weights)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 2), (1, 5, 7), (2, 3, 1, 1), (2, 3, 4, 5, 6)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stacked = normal(torch.Generator().manual_seed(1), *shape).to(dtype)
    weights = torch.linspace(-1, 2, shape[1], dtype=torch.float64)
    result = raw.weighted_sum(stacked.to(DEVICE), weights.to(DEVICE))
    assert result.shape == (shape[0], *shape[2:])
    assert_sum(result, stacked, weights)


def test_rounds_once_after_a_float64_sum() -> None:
    """256 bfloat16 terms of 2^-8 beside 1: lost one by one in bfloat16, not in the sum."""
    stacked = torch.full((1, 257, 1), 2.0**-8, dtype=torch.bfloat16)
    stacked[0, 0] = 1.0
    result = raw.weighted_sum(stacked.to(DEVICE), torch.ones(257, device=DEVICE))
    assert result.tolist() == [[2.0]]


def test_weights_are_not_rounded_to_the_dtype() -> None:
    """0.1 is 2^-12 off in bfloat16: the terms cancel only with the weights as given."""
    stacked = torch.tensor([[[1.0], [1.0]]], dtype=torch.bfloat16, device=DEVICE)
    weights = torch.tensor([1.0 + 2.0**-20, -1.0], dtype=torch.float64, device=DEVICE)
    assert raw.weighted_sum(stacked, weights).tolist() == [[2.0**-20]]


def test_float32_weights() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    stacked, _ = stacks(batch)
    weights = batch.weights.float()
    assert_sum(raw.weighted_sum(stacked.to(DEVICE), weights.to(DEVICE)), stacked, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype: torch.dtype) -> None:
    batch = FAMILIES["independent"].build(dtype)
    for stacked in stacks(batch):
        weights = strided_in_nan(batch.scalings[None].to(DEVICE))[0]
        strided = strided_in_nan(stacked.to(DEVICE))
        assert_sum(raw.weighted_sum(strided, weights), stacked, batch.scalings)
        moved = stacked.to(DEVICE).movedim(1, 3).contiguous().movedim(3, 1)
        assert_sum(raw.weighted_sum(moved, weights), stacked, batch.scalings)
        factors = [strided_in_nan(factor.to(DEVICE)) for factor in stacked.flatten(0, 1)]
        assert_sum(raw.weighted_sum_list(factors, weights), stacked, batch.scalings)


def test_deterministic_and_order_of_clients() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    stacked = stacks(batch)[0].to(DEVICE)
    weights = batch.weights.to(DEVICE)
    assert_same_bits(raw.weighted_sum(stacked, weights), raw.weighted_sum(stacked, weights))
    order = torch.tensor([3, 1, 0, 2])
    moved = raw.weighted_sum(stacked[:, order.to(DEVICE)], weights[order.to(DEVICE)])
    assert_sum(moved, stacked.cpu(), batch.weights)


def test_opcheck() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    stacked = stacks(batch)[0].to(DEVICE)
    scalings = batch.scalings.to(DEVICE)
    torch.library.opcheck(raw.weighted_sum.default, (stacked, batch.weights.to(DEVICE)))
    torch.library.opcheck(raw.weighted_sum.default, (stacked, scalings))
    factors = [factor.clone() for factor in stacked.flatten(0, 1)]
    torch.library.opcheck(raw.weighted_sum_list.default, (factors, scalings))


def test_compiles() -> None:
    calls, list_calls = [], []
    for name in ("independent", "sign_flipped"):
        batch = FAMILIES[name].build(torch.float32)
        stacked = stacks(batch)[0].to(DEVICE)
        scalings = batch.scalings.to(DEVICE)
        calls.append((stacked, scalings))
        list_calls.append(([f.clone() for f in stacked[0, :2]], scalings[:1, :2].clone()))
    assert_compiles(ops.weighted_sum, calls)
    assert_compiles(ops.weighted_sum_list, list_calls)


def bad_calls() -> dict[str, BadCall]:
    stacked = torch.ones(2, 3, 5, 7)
    weights = torch.ones(2, 3)
    factors = list(stacked.flatten(0, 1))
    return {
        "one_dimension": (ValueError, "weighted_sum", (stacked[0, 0, 0], weights)),
        "weights_of_one_module": (ValueError, "weighted_sum", (stacked, weights[:1])),
        "weights_of_two_clients": (ValueError, "weighted_sum", (stacked, weights[:, :2])),
        "two_weights_for_three_clients": (ValueError, "weighted_sum", (stacked, weights[0, :2])),
        "weights_of_three_dimensions": (ValueError, "weighted_sum", (stacked, weights[None])),
        "weights_of_no_dimension": (ValueError, "weighted_sum", (stacked, weights[0, 0])),
        "integers": (TypeError, "weighted_sum", (stacked.int(), weights)),
        "integer_weights": (TypeError, "weighted_sum", (stacked, weights.int())),
        "half_weights": (TypeError, "weighted_sum", (stacked, weights.half())),
        "no_tensors": (ValueError, "weighted_sum_list", ([], weights)),
        "five_tensors_for_six_weights": (ValueError, "weighted_sum_list", (factors[:5], weights)),
        "weights_of_one_dimension": (ValueError, "weighted_sum_list", (factors, weights[0])),
        "shapes_differ": (
            ValueError,
            "weighted_sum_list",
            ([*factors[:5], factors[5][:1]], weights),
        ),
        "dtypes_differ": (
            TypeError,
            "weighted_sum_list",
            ([*factors[:5], factors[5].double()], weights),
        ),
        "integers_in_the_list": (
            TypeError,
            "weighted_sum_list",
            ([f.int() for f in factors], weights),
        ),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])
