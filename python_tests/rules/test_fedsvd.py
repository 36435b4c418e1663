"""FedSVD: the mean of B times the common A, decomposed (arXiv 2505.12805)."""

import pytest
import torch
from assertions import EPS
from federation import (
    EQUAL_RANK_CASES,
    Federation,
    assert_ideal,
    assert_report,
    draw,
    norm,
    of_batch,
    product_bound,
    update,
    with_common,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_reference(round_: Federation) -> None:
    result = round_.aggregate("fedsvd")
    assert_ideal(result, round_)
    assert_report(result, round_)
    for module in round_.modules:
        factors = result.adapter.factors[module]
        b, a = reference.rules.fedsvd(*round_.of(module))
        room = product_bound(round_, module, round_.dtype, "fedsvd")
        assert norm(update(result.adapter, module) - b @ a) <= room
        given = round_.of(module)[1][0].double()
        if int(torch.linalg.matrix_rank(given)) == len(given):  # all rows, also where B is zero
            rows = factors.a.double()
            gap = (rows @ rows.mT - torch.eye(len(rows))).abs().max()
            assert float(gap) <= 1e-6 + 8 * EPS[round_.dtype]
        sizes = factors.b.double().norm(dim=0)
        values = torch.linalg.svdvals(b @ a)[: len(sizes)]
        assert float((sizes[: len(values)] - values).abs().max()) <= 1e-7 * norm(b @ a) + 2 * room


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_cases_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    assert_reference(draw(**EQUAL_RANK_CASES[case], dtype=dtype, common_a=True))


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families_equal_the_reference(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    assert_reference(with_common(of_batch(FAMILIES[name].build(dtype)), "a"))


def test_only_b_goes_up_and_both_come_down() -> None:
    round_ = draw(common_a=True)
    result, plain = round_.aggregate("fedsvd"), round_.aggregate("fedit")
    frozen = round_.aggregate("ffa")
    assert result.bytes_up == frozen.bytes_up
    assert result.bytes_down == plain.bytes_down
    assert result.shared.keys() == plain.shared.keys()


def test_the_next_round_may_begin_from_the_new_a() -> None:
    """Clients that got the global adapter hold one A again."""
    result = draw(common_a=True).aggregate("fedsvd")
    again = flk.aggregate([result.client_adapter(k) for k in range(3)], rule="fedsvd")
    for module, factors in again.adapter.factors.items():
        gap = norm(update(again.adapter, module) - update(result.adapter, module))
        assert gap <= 1e-5 * norm(update(result.adapter, module))
        assert factors.rank == 4


def test_clients_whose_a_differs_are_refused() -> None:
    with pytest.raises(flk.AdapterError, match=r"client 1 \(site-1\).*A differs.*fedsvd expects"):
        draw().aggregate("fedsvd")
