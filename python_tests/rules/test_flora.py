"""FLoRA: the stack itself, exact at rank R (arXiv 2409.05976)."""

import pytest
import torch
from federation import CASES, WORKING_DTYPES, assert_ideal, assert_report, draw


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stack_is_the_ideal_update(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("flora")
    assert_ideal(result, round_)
    assert_report(result, round_)
    for module, row in result.report.items():
        assert row.rank == sum(b.shape[1] for b in round_.of(module)[0])
        assert row.relative_error == 0


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_blocks_are_the_clients_own(dtype: torch.dtype) -> None:
    """B side by side, bit for bit; weights and scalings once, on A, each entry rounded once."""
    round_ = draw(**CASES["mixed_ranks"], dtype=dtype)
    result = round_.aggregate("flora").adapter
    for module in round_.modules:
        bs, as_, scalings, weights = round_.of(module)
        assert torch.equal(result.factors[module].b, torch.cat(bs, dim=1))
        scaled = [w * s * a.double() for a, s, w in zip(as_, scalings, weights, strict=True)]
        torch.testing.assert_close(
            result.factors[module].a, torch.cat(scaled).to(dtype), rtol=2**-7, atol=0
        )


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
def test_absent_modules_renormalized(dtype: torch.dtype) -> None:
    round_ = draw(**CASES["mixed_ranks_absent"], dtype=dtype)
    assert_ideal(round_.aggregate("flora", absent="renormalize"), round_, renormalize=True)
