"""raFLoRA: FlexLoRA with rank partitions weighted by their holders (arXiv 2602.13486)."""

import pytest
import torch
from assertions import EPS
from federation import (
    CASES,
    Drawn,
    Federation,
    assert_report,
    draw,
    federation,
    norm,
    of_batch,
    update,
)
from matrices import CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bound(round_: Federation, module: str, dtype: torch.dtype) -> float:
    """c eps sum_k s_k ||B_k|| ||A_k||: a partition's weight may be that of all clients."""
    terms = zip(*round_.of(module), strict=True)
    magnitude = sum(abs(s) * norm(b.double()) * norm(a.double()) for b, a, s, _ in terms)
    return (1e-7 + 8 * EPS[dtype]) * magnitude


def assert_reference(round_: Federation, dtype: torch.dtype) -> None:
    """Every client's error beside the reweighted update is that of its best truncation."""
    result = round_.aggregate("raflora")
    for module in round_.modules:
        terms = round_.of(module)
        whole = reweighted(round_, module)
        expected = reference.rules.raflora(*terms)
        present = [k for k, client in enumerate(round_.drawn) if module in client]
        room = bound(round_, module, dtype)
        for k, dense in zip(present, expected, strict=True):
            found = update(result.client_adapter(k), module)
            best = norm(whole - dense)
            assert norm(whole - found) <= best + room, f"client {k}, {module}"
            assert int(torch.linalg.matrix_rank(found)) <= round_.drawn[k][module].a.shape[0]
    assert_report(result, round_)


def reweighted(round_: Federation, module: str) -> torch.Tensor:
    """The update whose truncations travel, rank by rank."""
    bs, as_, scalings, weights = round_.of(module)
    ranks = [b.shape[1] for b in bs]
    total = torch.zeros(bs[0].shape[0], as_[0].shape[1], dtype=torch.float64)
    for position in range(max(ranks)):
        shares = reference.rules.holders(weights, ranks, position + 1)
        for k, rank in enumerate(ranks):
            if rank > position:
                outer = torch.outer(bs[k][:, position].double(), as_[k][position].double())
                total += shares[k] * scalings[k] * outer
    return total


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cases_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    assert_reference(draw(**CASES[case], dtype=dtype), dtype)


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families_equal_the_reference(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    assert_reference(of_batch(FAMILIES[name].build(dtype)), dtype)


def test_clients_of_one_rank_are_flexloras() -> None:
    round_ = draw()
    one, other = round_.aggregate("raflora"), round_.aggregate("flexlora")
    for module in round_.modules:
        gap = norm(update(one.adapter, module) - update(other.adapter, module))
        assert gap <= 1e-5 * norm(round_.ideal(module))


def test_a_rank_that_one_client_has_counts_in_full() -> None:
    """FlexLoRA would shrink it by the client's weight."""
    (m, n), k = (12, 9), 1
    eye = torch.eye(m)[:, :4], torch.eye(n)[:4]
    clients = [
        {"q": Drawn(eye[0][:, :2], eye[1][:2], 1.0)},
        {"q": Drawn(eye[0], eye[1], 1.0)},
    ]
    result = federation(clients, [9, 1]).aggregate("raflora")
    values = torch.linalg.svdvals(update(result.client_adapter(k), "q"))[:4]
    assert torch.allclose(values, torch.ones(4).double(), atol=1e-5)


def test_both_factors_carry_the_roots_of_the_singular_values() -> None:
    result = draw(ranks=(8, 4, 2)).aggregate("raflora")
    for factors in result.adapter.factors.values():
        b, a = factors.b.double().norm(dim=0), factors.a.double().norm(dim=1)
        assert torch.allclose(b, a, rtol=1e-5)


def test_a_partition_of_weight_zero_is_zero() -> None:
    round_ = draw(ranks=(8, 4, 2), weights=(0, 1, 1))
    for module, factors in round_.aggregate("raflora").adapter.factors.items():
        assert norm(factors.b[:, 6:]) <= 1e-5 * norm(factors.b), module


def test_the_weight_of_an_absent_client_goes_to_the_others() -> None:
    module = "layers.0.down"
    round_ = draw(absent={0: [module], 2: [module]})
    found = update(round_.aggregate("raflora").adapter, module)
    own = round_.drawn[1][module].update()
    assert norm(found - own) <= 1e-5 * norm(own)
