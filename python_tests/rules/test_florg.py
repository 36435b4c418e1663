"""FLoRG: A from the mean of the clients' Gram matrices (arXiv 2602.17095)."""

import pytest
import torch
from assertions import EPS
from federation import (
    EQUAL_RANK_CASES,
    Drawn,
    Federation,
    assert_report,
    draw,
    federation,
    norm,
    of_batch,
    update,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id, orthonormal_columns

import fedlora_kernels as flk
from fedlora_kernels import reference


def assert_round(round_: Federation, last: flk.Adapter | None) -> flk.Aggregation:
    """A is the best rank-r factor of Q, nearest to the last one; the update is dW on its rows."""
    result = round_.aggregate("florg", dtype=torch.float64, carried=last)
    for module in round_.modules:
        bs, as_, scalings, weights = round_.of(module)
        before = last and last.factors[module].a
        expected, wanted = reference.rules.florg(bs, as_, scalings, weights, before)
        total = sum(weights) or 1.0
        shares = [(w / total) ** 0.5 for w in weights]
        rows = torch.cat([share * a.double() for a, share in zip(as_, shares, strict=True)])
        gram = rows.mT @ rows
        values = torch.linalg.eigvalsh(gram).flip(0)
        a, rank = result.adapter.factors[module].a, len(wanted)
        room = 1e-12 * float(values[0])
        tail = float(values[rank:].square().sum().sqrt())
        assert norm(gram - a.mT @ a) <= tail + room, f"{module}: the best of its rank"
        gap = float(values[rank - 1] - values[rank]) if rank < len(values) else float(values[-1])
        relative = gap / float(values[0] or 1)
        if relative > 1e-6:  # else rounding decides which directions lead
            found = update(result.adapter, module)
            assert norm(found - expected) <= 1e-9 / relative * round_.spread(module), module
            assert norm(a.mT @ a - wanted.mT @ wanted) <= room / relative
        if before is not None:
            turned = before.double() @ a.mT  # symmetric and not negative: no P is nearer
            size = norm(before.double()) * norm(a) + 1e-300
            assert norm(turned - turned.mT) <= 1e-9 * size
            assert float(torch.linalg.eigvalsh(turned + turned.mT)[0]) >= -1e-9 * size
    assert_report(result, round_)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_rounds_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    carried = None
    for seed in range(2):
        round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype, seed=seed)
        carried = assert_round(round_, carried).carried


@pytest.mark.parametrize("case", FAMILY_CASES, ids=case_id)
def test_families(case: tuple[str, torch.dtype]) -> None:
    """A first round, and one beside what a mean of factors was."""
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    assert_round(round_, None)
    assert_round(round_, round_.aggregate("fedit").adapter)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    round_ = draw(alphas=(8, 8, 8), dtype=dtype)
    narrow, wide = (round_.aggregate("florg", dtype=x).adapter for x in (None, torch.float64))
    for module, factors in narrow.factors.items():
        assert factors.scaling == 2
        gap = norm(update(narrow, module) - update(wide, module))
        assert gap <= 2 * EPS[dtype] * round_.spread(module)


def test_clients_of_the_papers_kind_get_their_own_kind_of_update() -> None:
    """B_k = L A_k^T beside A_k R, with orthonormal L and R: the result is such a pair of one A."""
    generator = torch.Generator().manual_seed(2)
    left = orthonormal_columns(generator, 31, 12)
    right = orthonormal_columns(generator, 23, 12).mT
    drawn = []
    for _ in range(3):
        a = torch.randn(4, 12, dtype=torch.float64, generator=generator)
        drawn.append({"q": Drawn(left @ a.mT, a @ right, 1.0)})
    result = federation(drawn, [1.0, 2.0, 3.0]).aggregate("florg").adapter
    b, a = result.factors["q"].b, result.factors["q"].a @ right.mT
    assert norm(b - left @ a.mT) <= 1e-12 * norm(b)
    assert norm(result.factors["q"].a - a @ right) <= 1e-12 * norm(a)


def test_a_second_round_of_the_same_clients_changes_nothing() -> None:
    """Where the eigenvectors alone may turn, the alignment holds them."""
    round_ = draw(dtype=torch.float64)
    first = round_.aggregate("florg", carried=draw(seed=5).adapters[0])
    second = round_.aggregate("florg", carried=first.carried)
    for module, factors in first.adapter.factors.items():
        assert norm(factors.a - second.adapter.factors[module].a) <= 1e-9 * norm(factors.a)
        assert norm(factors.b - second.adapter.factors[module].b) <= 1e-9 * norm(factors.b)


def test_a_carried_adapter_of_another_rank_is_refused() -> None:
    carried = draw(ranks=(2, 2, 2)).aggregate("florg").carried
    with pytest.raises(flk.AdapterError, match=r"carried adapter, module .*: rank 2, expected 4"):
        draw().aggregate("florg", carried=carried)
