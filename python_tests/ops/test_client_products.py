"""client_products against the inner products of dense updates."""

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
from matrices import CASES, DEVICE, FAMILIES, Batch, case_id, normal

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

TERMS = 8.0
"""c of c R eps N_j N_k on an inner product, N_k = |s_k| sum_i ||b_ki|| ||a_ki||."""


def arguments(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Float64 Gram matrices and scalings on the device under test, and the ranks."""
    gram_b, gram_a = reference.gram(batch.b, rows=False), reference.gram(batch.a, rows=True)
    tensors = (x.to(DEVICE) for x in (gram_b, gram_a, batch.scalings))
    return (*tensors, list(batch.ranks))


def dense(batch: Batch) -> torch.Tensor:
    """<s_j B_j A_j, s_k B_k A_k> of the factors themselves, [L,K,K]."""
    b, a = (x.double().split(list(batch.ranks), dim) for x, dim in ((batch.b, 2), (batch.a, 1)))
    updates = torch.stack([(b_k @ a_k).flatten(1) for b_k, a_k in zip(b, a, strict=True)], 1)
    updates = batch.scalings.double()[:, :, None] * updates
    return updates @ updates.mT


def bound(batch: Batch) -> torch.Tensor:
    """What rounding may leave of an inner product, [L,K,K]."""
    terms = batch.b.double().norm(dim=1) * batch.a.double().norm(dim=2)
    sizes = torch.stack([part.sum(1) for part in terms.split(list(batch.ranks), 1)], 1)
    sizes = sizes * batch.scalings.double().abs()
    return TERMS * batch.stacked_rank * EPS[torch.float64] * sizes[:, :, None] * sizes[:, None, :]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    given = arguments(batch)
    with poisoned_memory():
        found = raw.client_products(*given)
    assert found.device.type == DEVICE.type
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    assert_within((found.cpu() - dense(batch)).abs(), bound(batch), "the dense updates'")
    specified = reference.client_products(*(x.cpu() for x in given[:3]), given[3])
    assert_within((found.cpu() - specified).abs(), bound(batch), "the specification's")


@pytest.mark.parametrize("ranks", [[5], [1] * 300, [3, 0, 7], [0, 0], [], [130, 2, 600], [16] * 9])
def test_any_ranks(ranks: list[int]) -> None:
    stacked_rank = sum(ranks)
    generator = torch.Generator().manual_seed(stacked_rank)
    x, y, scale = (
        normal(generator, *shape).to(DEVICE)
        for shape in ((2, stacked_rank, 24), (2, stacked_rank, 16), (2, len(ranks)))
    )
    found = raw.client_products(x @ x.mT, y @ y.mT, scale, ranks)
    parts = zip(x.split(ranks, 1), y.split(ranks, 1), scale.unbind(1), strict=True)
    updates = [(s[:, None, None] * (b.mT @ a)).flatten(1) for b, a, s in parts]
    assert found.shape == (2, len(ranks), len(ranks))
    if updates:
        points = torch.stack(updates, 1)
        expected = points @ points.mT
        assert_within((found - expected).abs(), 1e-12 * expected.abs().max(), "dense")


def test_deterministic_strided_and_float32_scale() -> None:
    gram_b, gram_a, scale, ranks = arguments(FAMILIES["independent"].build(torch.float32))
    found = raw.client_products(gram_b, gram_a, scale, ranks)
    assert_same_bits(raw.client_products(gram_b, gram_a, scale, ranks), found)
    strided = strided_in_nan(gram_b), strided_in_nan(gram_a)
    assert_same_bits(raw.client_products(*strided, scale, ranks), found)
    halves = scale.float().double()
    assert_same_bits(
        raw.client_products(gram_b, gram_a, scale.float(), ranks),
        raw.client_products(gram_b, gram_a, halves, ranks),
    )


def test_a_client_does_not_see_the_others() -> None:
    gram_b, gram_a, scale, ranks = arguments(FAMILIES["independent"].build(torch.float64))
    whole = raw.client_products(gram_b, gram_a, scale, ranks)
    first = ranks[0]
    alone = raw.client_products(
        gram_b[:, :first, :first], gram_a[:, :first, :first], scale[:, :1], ranks[:1]
    )
    torch.testing.assert_close(alone[:, 0, 0], whole[:, 0, 0], rtol=1e-13, atol=0)


def test_opcheck() -> None:
    given = arguments(FAMILIES["independent"].build(torch.float64))
    torch.library.opcheck(raw.client_products.default, given)


def test_compiles() -> None:
    small = torch.eye(3, dtype=torch.float64, device=DEVICE)[None]
    scale = torch.ones(1, 2, dtype=torch.float64, device=DEVICE)
    assert_compiles(ops.client_products, [(small, small, scale, [1, 2])])


def bad_calls() -> dict[str, BadCall]:
    gram = torch.eye(6, dtype=torch.float64).expand(2, 6, 6).contiguous()
    scale = torch.ones(2, 3, dtype=torch.float64)
    name, ranks = "client_products", [1, 2, 3]
    return {
        "gram_float32": (TypeError, name, (gram.float(), gram, scale, ranks)),
        "gram_not_square": (ValueError, name, (gram[:, :5], gram, scale, ranks)),
        "grams_of_different_ranks": (ValueError, name, (gram, gram[:, :5, :5], scale, ranks)),
        "scale_float16": (TypeError, name, (gram, gram, scale.half(), ranks)),
        "scale_of_two_clients": (ValueError, name, (gram, gram, scale[:, :2], ranks)),
        "scale_of_one_module": (ValueError, name, (gram, gram, scale[:1], ranks)),
        "scale_of_one_dimension": (ValueError, name, (gram, gram, scale[0], ranks)),
        "ranks_too_small": (ValueError, name, (gram, gram, scale, [1, 2, 2])),
        "ranks_too_large": (ValueError, name, (gram, gram, scale, [1, 2, 4])),
        "ranks_of_two_clients": (ValueError, name, (gram, gram, scale, [3, 3])),
        "rank_negative": (ValueError, name, (gram, gram, scale, [4, -1, 3])),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])
