"""combine and combine_list against B X and Y A in float64."""

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
from matrices import CASES, DEVICE, DTYPES, FAMILIES, Batch, case_id, normal

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora


def coefficients(batch: Batch, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """X [L, R, p] and Y [L, p, R]."""
    generator = torch.Generator().manual_seed(rank)
    x = normal(generator, batch.modules, batch.stacked_rank, rank)
    y = normal(generator, batch.modules, rank, batch.stacked_rank)
    return x.to(dtype), y.to(dtype)


def assert_combined(
    result: tuple[torch.Tensor, torch.Tensor], batch: Batch, x: torch.Tensor, y: torch.Tensor
) -> None:
    """Elementwise: one rounding to the dtype and c R eps of the sum of absolute terms.

    eps is that of the coefficients' dtype, in which the products are accumulated.
    """
    expected = reference.combine(batch.b.double(), batch.a.double(), x, y)
    terms = reference.combine(batch.b.double().abs(), batch.a.double().abs(), x.abs(), y.abs())
    tiny = torch.finfo(batch.dtype).smallest_normal
    for have, want, size in zip(result, expected, terms, strict=True):
        assert have.dtype == batch.dtype
        accumulated = 2 * batch.stacked_rank * EPS[x.dtype] * size
        bound = accumulated + EPS[batch.dtype] * (want.abs() + tiny)
        assert_within((have.cpu().double() - want).abs(), bound, "combined factor")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    b, a, _ = batch.inputs()
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    for rank, dtype in ((1, torch.float64), (7, torch.float32)):
        x, y = coefficients(batch, rank, dtype)
        with poisoned_memory():
            stacked = raw.combine(b, a, x.to(DEVICE), y.to(DEVICE))
            listed = raw.combine_list(bs, as_, x.to(DEVICE), y.to(DEVICE))
        assert_combined(stacked, batch, x, y)
        assert_combined(listed, batch, x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_selects_columns(dtype: torch.dtype) -> None:
    batch = FAMILIES["independent"].build(dtype)
    b, a, _ = batch.inputs()
    x = torch.eye(batch.stacked_rank, dtype=torch.float64, device=DEVICE)[:, [3, 0, 11]]
    x = x.repeat(batch.modules, 1, 1)
    b_global, a_global = raw.combine(b, a, x, x.mT)
    assert_same_bits((b_global, a_global), (b[:, :, [3, 0, 11]], a[:, [3, 0, 11]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype: torch.dtype) -> None:
    batch = FAMILIES["heterogeneous_ranks"].build(dtype)
    b, a, _ = batch.inputs()
    x, y = coefficients(batch, 5, torch.float64)
    strided = [strided_in_nan(part.to(DEVICE)) for part in (x, y)]
    assert_combined(raw.combine(strided_in_nan(b), strided_in_nan(a), *strided), batch, x, y)
    bs, as_ = ([strided_in_nan(f.to(DEVICE)) for f in side] for side in batch.client_factors())
    assert_combined(raw.combine_list(bs, as_, *strided), batch, x, y)


def test_deterministic() -> None:
    batch = FAMILIES["tile_edges"].build(torch.float32)
    b, a, _ = batch.inputs()
    x, y = (part.to(DEVICE) for part in coefficients(batch, 9, torch.float64))
    assert_same_bits(raw.combine(b, a, x, y), raw.combine(b, a, x, y))


def test_order_of_clients_changes_rounding_only() -> None:
    batch = FAMILIES["primes"].build(torch.float32)
    order = [2, 0, 3, 1]
    x, y = coefficients(batch, 6, torch.float64)
    other = batch.reordered(order)
    moved_x = torch.cat([x.split(batch.ranks, dim=1)[k] for k in order], dim=1)
    moved_y = torch.cat([y.split(batch.ranks, dim=2)[k] for k in order], dim=2)
    b, a, _ = other.inputs()
    assert_combined(raw.combine(b, a, moved_x.to(DEVICE), moved_y.to(DEVICE)), batch, x, y)


def test_opcheck() -> None:
    batch = FAMILIES["heterogeneous_ranks"].build(torch.float32)
    b, a, _ = batch.inputs()
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    x, y = (part.to(DEVICE) for part in coefficients(batch, 5, torch.float64))
    torch.library.opcheck(raw.combine.default, (b, a, x, y))
    torch.library.opcheck(raw.combine_list.default, (bs, as_, x, y))


def test_compiles() -> None:
    calls, list_calls = [], []
    for name, rank in (("independent", 4), ("sign_flipped", 3)):
        batch = FAMILIES[name].build(torch.float32)
        b, a, _ = batch.inputs()
        x, y = (part.to(DEVICE) for part in coefficients(batch, rank, torch.float64))
        calls.append((b, a, x, y))
        size = 2 * batch.ranks[0]
        bs, as_ = ([f.to(DEVICE) for f in side[:2]] for side in batch.client_factors())
        list_calls.append((bs, as_, x[:1, :size].clone(), y[:1, :, :size].clone()))
    assert_compiles(ops.combine, calls)
    assert_compiles(ops.combine_list, list_calls)


def bad_calls() -> dict[str, BadCall]:
    b, a = torch.ones(2, 7, 4), torch.ones(2, 4, 9)
    x = torch.ones(2, 4, 3, dtype=torch.float64)
    y = torch.ones(2, 3, 4, dtype=torch.float64)
    bs, as_ = list(b), list(a)
    return {
        "b_is_a_matrix": (ValueError, "combine", (b[0], a, x, y)),
        "b_of_one_module": (ValueError, "combine", (b[:1], a, x, y)),
        "ranks_of_b_and_a_differ": (ValueError, "combine", (b[:, :, :3], a, x, y)),
        "coefficients_of_one_module": (ValueError, "combine", (b, a, x[:1], y[:1])),
        "x_of_another_rank": (ValueError, "combine", (b, a, x[:, :3], y)),
        "x_is_a_matrix": (ValueError, "combine", (b, a, x[0], y)),
        "y_narrower_than_x": (ValueError, "combine", (b, a, x, y[:, :2])),
        "y_transposed": (ValueError, "combine", (b, a, x, y.mT)),
        "a_of_another_dtype": (TypeError, "combine", (b, a.double(), x, y)),
        "integers": (TypeError, "combine", (b.int(), a.int(), x, y)),
        "y_of_another_dtype": (TypeError, "combine", (b, a, x, y.float())),
        "half_coefficients": (TypeError, "combine", (b, a, x.half(), y.half())),
        "fewer_a_than_b": (ValueError, "combine_list", (bs, as_[:1], x, y)),
        "one_module_of_two": (ValueError, "combine_list", (bs[:1], as_[:1], x, y)),
        "rows_of_b_differ": (ValueError, "combine_list", ([bs[0], bs[1][:6]], as_, x, y)),
        "client_ranks_differ": (ValueError, "combine_list", ([bs[0], bs[1][:, :3]], as_, x, y)),
        "coefficients_of_another_rank": (
            ValueError,
            "combine_list",
            (bs, as_, x[:, :3], y[:, :, :3]),
        ),
        "y_narrower_than_x_for_a_list": (ValueError, "combine_list", (bs, as_, x, y[:, :2])),
        "a_of_another_dtype_in_the_list": (
            TypeError,
            "combine_list",
            (bs, [m.double() for m in as_], x, y),
        ),
        "y_of_another_dtype_for_a_list": (TypeError, "combine_list", (bs, as_, x, y.float())),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


def test_reference_rounds_once() -> None:
    """1 + 2^-9 twice: rounded after the sum in bfloat16, not before."""
    b = torch.tensor([[[1.0, 2.0**-9, 2.0**-9]]], dtype=torch.bfloat16)
    ones = torch.ones(1, 3, 1, dtype=torch.float64)
    b_global, _ = reference.combine(b, b.mT, ones, ones.mT)
    assert float(b_global) == 1.0
    b_global, _ = reference.combine(b, b.mT, 2 * ones, 2 * ones.mT)
    assert float(b_global) == 2.0
    b_global, _ = reference.combine(b * 3, b.mT, ones, ones.mT)
    assert float(b_global) == 3.015625
