"""flora_na and flora_na_list against the dense distance, for stored factors of every dtype."""

import pytest
import torch
from assertions import (
    EPS,
    FAST_PRODUCT,
    PRODUCT_ROUNDINGS,
    SPECTRUM_TERMS,
    BadCall,
    assert_compiles,
    assert_refuses,
    assert_same_bits,
    assert_within,
    poisoned_memory,
    strided_in_nan,
)
from matrices import DEVICE, DTYPES, EQUAL_RANK_CASES, FAMILIES, Batch, case_id

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

FloraNA = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """b, a, weights and scalings on the device under test."""
    b, a, _ = batch.inputs()
    return b, a, batch.weights.to(DEVICE), batch.scalings.to(DEVICE)


def assert_flora_na(batch: Batch, result: FloraNA, precision: str = "exact") -> None:
    """The factors are the averages that p and q name, and as far from dW as the objective says."""
    b_hat, a_hat, p, q, objective = (part.cpu() for part in result)
    rank = batch.ranks[0]
    assert b_hat.dtype == a_hat.dtype == batch.dtype
    assert b_hat.shape == (batch.modules, batch.b.shape[1], rank)
    assert a_hat.shape == (batch.modules, rank, batch.a.shape[2])

    tiny = torch.finfo(batch.dtype).smallest_normal
    blocks_b = batch.b.double().unflatten(2, (batch.clients, rank)).movedim(2, 1)
    blocks_a = batch.a.double().unflatten(1, (batch.clients, rank))
    for have, blocks, mixing in ((b_hat, blocks_b, q * batch.scalings), (a_hat, blocks_a, p)):
        want = reference.weighted_sum(blocks, mixing)
        terms = reference.weighted_sum(blocks.abs(), mixing.abs())
        accumulated = 4 * batch.clients * EPS[torch.float64] * terms
        bound = accumulated + EPS[batch.dtype] * (want.abs() + tiny)
        assert_within((have.double() - want).abs(), bound, "average of the factors")

    assert bool((objective[:, 1:] <= objective[:, :-1]).all()), "the objective rises"
    error = torch.linalg.matrix_norm(batch.dense() - b_hat.double() @ a_hat.double())
    lengths = torch.linalg.matrix_norm(b_hat.double()) * torch.linalg.matrix_norm(a_hat.double())
    computed = SPECTRUM_TERMS * batch.stacked_rank * EPS[torch.float64]
    if precision == "fast":
        computed = FAST_PRODUCT
    slack = computed**0.5 * (batch.magnitude() + lengths)
    slack = slack + PRODUCT_ROUNDINGS * EPS[batch.dtype] * lengths
    assert_within((error - objective[:, -1].sqrt()).abs(), slack, "distance to the update")
    floor = reference.rules.svd_floor(batch.dense(), rank)
    assert_within(floor - error, slack, "below the SVD floor")
    for module in range(batch.modules):
        fedit = fedit_error(batch, module)
        assert_within(error[module] - fedit, slack[module], "worse than FedIT")


def fedit_error(batch: Batch, module: int) -> torch.Tensor:
    """||dW - FedIT||, from the rule as the paper writes it."""
    clients = slice(module * batch.clients, (module + 1) * batch.clients)
    bs, as_ = batch.client_factors()
    update = reference.rules.fedit(
        bs[clients], as_[clients], batch.scalings[module].tolist(), batch.weights.tolist()
    )
    return torch.linalg.matrix_norm(batch.dense()[module] - update)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype], precision: str) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    with poisoned_memory():
        result = raw.flora_na(*inputs(batch), precision)
    assert_flora_na(batch, result, precision)


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=case_id)
def test_list_is_the_stack(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    with poisoned_memory():
        result = raw.flora_na_list(bs, as_, *inputs(batch)[2:])
    assert_flora_na(batch, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_client_is_the_identity(dtype: torch.dtype) -> None:
    """The product is s B A: a scaling of 2 is not lost and not counted twice."""
    batch = FAMILIES["single_client"].build(dtype)
    b_hat, a_hat, *_ = (part.cpu().double() for part in raw.flora_na(*inputs(batch)))
    expected = 2 * (batch.b.double() @ batch.a.double())
    error = torch.linalg.matrix_norm(b_hat @ a_hat - expected)
    lengths = torch.linalg.matrix_norm(b_hat) * torch.linalg.matrix_norm(a_hat)
    assert_within(error, (PRODUCT_ROUNDINGS * EPS[dtype] + 1e-12) * lengths, "update")


def test_sign_flipped_factors_lose_nothing() -> None:
    batch = FAMILIES["sign_flipped"].build(torch.float64)
    b_hat, a_hat, *_ = (part.cpu() for part in raw.flora_na(*inputs(batch)))
    error = torch.linalg.matrix_norm(b_hat @ a_hat - batch.dense())
    assert_within(error, 1e-7 * batch.magnitude(), "update")


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype: torch.dtype, precision: str) -> None:
    batch = FAMILIES["independent"].build(dtype)
    b, a, weights, scale = inputs(batch)
    strided = strided_in_nan(b), strided_in_nan(a)
    assert_flora_na(batch, raw.flora_na(*strided, weights, scale, precision), precision)
    bs, as_ = ([strided_in_nan(f.to(DEVICE)) for f in side] for side in batch.client_factors())
    result = raw.flora_na_list(bs, as_, weights, scale, precision)
    assert_flora_na(batch, result, precision)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_deterministic(precision: str) -> None:
    for name in ("tile_edges", "duplicate_clients"):
        arguments = (*inputs(FAMILIES[name].build(torch.float32)), precision)
        assert_same_bits(raw.flora_na(*arguments), raw.flora_na(*arguments))


def test_order_of_clients_changes_rounding_only() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    other = batch.reordered([2, 0, 3, 1])
    first, second = raw.flora_na(*inputs(batch)), raw.flora_na(*inputs(other))
    assert_flora_na(other, second)
    total = batch.dense().square().sum((1, 2))
    error = (first[4][:, [0, -1]] - second[4][:, [0, -1]]).abs().amax(1).cpu()
    assert_within(error, 1e-9 * total, "objective")


def test_opcheck() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    torch.library.opcheck(raw.flora_na.default, inputs(batch))
    torch.library.opcheck(raw.flora_na.default, (*inputs(batch), "fast"))
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    torch.library.opcheck(raw.flora_na_list.default, (bs, as_, *inputs(batch)[2:]))


def test_compiles() -> None:
    calls, list_calls = [], []
    for name in ("independent", "sign_flipped"):
        batch = FAMILIES[name].build(torch.float32)
        b, a, weights, scale = inputs(batch)
        calls.append((b, a, weights, scale))
        bs, as_ = ([f.to(DEVICE) for f in side[:2]] for side in batch.client_factors())
        list_calls.append((bs, as_, weights[:2].clone(), scale[:1, :2].clone()))
    assert_compiles(ops.flora_na, calls)
    assert_compiles(ops.flora_na_list, list_calls)


def bad_calls() -> dict[str, BadCall]:
    b, a = torch.ones(2, 7, 6), torch.ones(2, 6, 9)
    weights, scale = torch.full((3,), 1 / 3), torch.ones(2, 3)
    bs = [b[0, :, :2]] * 6
    as_ = [a[0, :2]] * 6
    ragged_bs = [b[0, :, :3], b[0, :, :2], b[0, :, :1]] * 2
    ragged_as = [a[0, :3], a[0, :2], a[0, :1]] * 2
    return {
        "b_is_a_matrix": (ValueError, "flora_na", (b[0], a, weights, scale)),
        "b_of_one_module": (ValueError, "flora_na", (b[:1], a, weights, scale)),
        "ranks_of_b_and_a_differ": (ValueError, "flora_na", (b[:, :, :3], a, weights, scale)),
        "two_weights_for_three_clients": (ValueError, "flora_na", (b, a, weights[:2], scale)),
        "weights_of_two_dimensions": (ValueError, "flora_na", (b, a, weights[None], scale)),
        "scale_of_one_module": (ValueError, "flora_na", (b, a, weights, scale[:1])),
        "scale_of_one_dimension": (ValueError, "flora_na", (b, a, weights, scale[0])),
        "rank_no_multiple_of_clients": (
            ValueError,
            "flora_na",
            (b[:, :, :5], a[:, :5], weights, scale),
        ),
        "unknown_precision": (ValueError, "flora_na", (b, a, weights, scale, "rough")),
        "a_of_another_dtype": (TypeError, "flora_na", (b, a.double(), weights, scale)),
        "integers": (TypeError, "flora_na", (b.int(), a.int(), weights, scale)),
        "integer_weights": (TypeError, "flora_na", (b, a, weights.int(), scale)),
        "integer_scale": (TypeError, "flora_na", (b, a, weights, scale.int())),
        "no_tensors": (ValueError, "flora_na_list", ([], [], weights, scale)),
        "five_tensors_for_six_scalings": (
            ValueError,
            "flora_na_list",
            (bs[:5], as_[:5], weights, scale),
        ),
        "four_tensors_for_six_scalings": (
            ValueError,
            "flora_na_list",
            (bs[:4], as_[:4], weights, scale),
        ),
        "fewer_a_than_b": (ValueError, "flora_na_list", (bs, as_[:3], weights, scale)),
        "two_weights_for_three_clients_of_a_list": (
            ValueError,
            "flora_na_list",
            (bs, as_, weights[:2], scale),
        ),
        "scale_of_one_dimension_for_a_list": (
            ValueError,
            "flora_na_list",
            (bs, as_, weights, scale[0]),
        ),
        "client_ranks_differ": (
            ValueError,
            "flora_na_list",
            (ragged_bs, ragged_as, weights, scale),
        ),
        "unknown_precision_of_a_list": (
            ValueError,
            "flora_na_list",
            (bs, as_, weights, scale, "rough"),
        ),
        "a_of_another_dtype_in_the_list": (
            TypeError,
            "flora_na_list",
            (bs, [f.double() for f in as_], weights, scale),
        ),
        "integers_in_the_list": (
            TypeError,
            "flora_na_list",
            ([f.int() for f in bs], [f.int() for f in as_], weights, scale),
        ),
        "integer_weights_for_a_list": (TypeError, "flora_na_list", (bs, as_, weights.int(), scale)),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])
