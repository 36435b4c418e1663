"""RBLA: the mean of every rank position over the clients that have it (arXiv 2408.08699)."""

import pytest
import torch
from assertions import EPS
from federation import CASES, Federation, assert_report, draw, norm, of_batch, update
from matrices import CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_reference(round_: Federation, dtype: torch.dtype) -> None:
    """What every client receives."""
    result = round_.aggregate("rbla")
    for module in round_.modules:
        bs, as_, scalings, weights = round_.of(module)
        sizes = [abs(s) * norm(b.double()) for b, s in zip(bs, scalings, strict=True)]
        rows = [norm(a.double()) for a in as_]
        bound = (1e-9 + 4 * EPS[dtype]) * sum(sizes) * sum(rows)
        expected = reference.rules.rbla(bs, as_, scalings, weights)
        present = [k for k, client in enumerate(round_.drawn) if module in client]
        for k, dense in zip(present, expected, strict=True):
            found = update(result.client_adapter(k), module)
            if round_.drawn[k][module].scaling != 0:
                assert norm(found - dense) <= bound, f"client {k}, {module}"
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cases_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    assert_reference(draw(**CASES[case], dtype=dtype), dtype)


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families_equal_the_reference(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    assert_reference(of_batch(FAMILIES[name].build(dtype)), dtype)


def test_clients_of_one_rank_are_fedits() -> None:
    round_ = draw()
    one, other = round_.aggregate("rbla"), round_.aggregate("fedit")
    for module in round_.modules:
        gap = norm(update(one.adapter, module) - update(other.adapter, module))
        assert gap <= 1e-5 * round_.spread(module)


def test_a_position_that_one_client_has_is_its_own() -> None:
    round_ = draw(ranks=(8, 4, 2), alphas=(8, 4, 2))
    for module, factors in round_.aggregate("rbla").adapter.factors.items():
        assert torch.allclose(factors.a[4:], round_.drawn[0][module].a[4:], rtol=1e-6)
        assert torch.allclose(factors.b[:, 4:], round_.drawn[0][module].b[:, 4:], rtol=1e-6)


def test_the_weight_of_an_absent_client_goes_to_the_others() -> None:
    module = "layers.0.down"
    round_ = draw(absent={0: [module], 2: [module]})
    found = update(round_.aggregate("rbla").adapter, module)
    own = round_.drawn[1][module].update()
    assert norm(found - own) <= 1e-5 * norm(own)
