"""RoLoRA: B and A trained and averaged in turn (arXiv 2409.02346)."""

import pytest
import torch
from federation import (
    EQUAL_RANK_CASES,
    Federation,
    assert_ideal,
    assert_report,
    draw,
    of_batch,
    with_common,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

import fedlora_kernels as flk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_exact(round_: Federation, side: str) -> None:
    """The ideal update, and the common factor to the bit."""
    result = round_.aggregate("rolora")
    assert_ideal(result, round_)
    assert_report(result, round_)
    for module, factors in result.adapter.factors.items():
        first = next(client[module] for client in round_.drawn if module in client)
        assert torch.equal(getattr(factors, side), getattr(first, side))


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_exact_with_either_factor_fixed(case: str, dtype: torch.dtype, side: str) -> None:
    assert_exact(with_common(draw(**EQUAL_RANK_CASES[case], dtype=dtype), side), side)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families(case: tuple[str, torch.dtype], side: str) -> None:
    name, dtype = case
    assert_exact(with_common(of_batch(FAMILIES[name].build(dtype)), side), side)


def test_clients_that_trained_both_are_refused() -> None:
    words = r"client 1 \(site-1\), module layers.*: A differs from client 0 \(site-0\)'s, and B is"
    with pytest.raises(flk.AdapterError, match=words):
        draw().aggregate("rolora")
