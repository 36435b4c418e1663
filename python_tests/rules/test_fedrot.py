"""FedRot-LoRA: clients rotated toward the last global adapter (arXiv 2602.23638)."""

from typing import Any

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
from matrices import FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unique(product: torch.Tensor, softness: float) -> bool:
    """Whether rounding leaves the nearest rotation, and the one part of the way, what they are."""
    values = torch.linalg.svdvals(product)
    if float(values[0]) == 0:
        return False
    left, _, right = torch.linalg.svd(product)
    sign = float(torch.linalg.det(left @ right))
    gap = values[-1] * sign + (values[-2] if len(values) > 1 else values[-1])
    soft = (1 - softness) * torch.eye(len(product)) + softness * reference.rules.rotation(product)
    return float(gap / values[0]) > 1e-3 and float(torch.linalg.svdvals(soft)[-1]) > 1e-3


def assert_round(round_: Federation, result: flk.Aggregation, number: int, last: Any) -> int:
    """Modules equal the dense reference; how many had a unique answer."""
    compared = 0
    side = "b" if number % 2 else "a"
    for module in round_.modules:
        bs, as_, scalings, weights = round_.of(module)
        before = last and (last.factors[module].b.double(), last.factors[module].a.double())
        if before:
            products = [
                a.double() @ before[1].mT if side == "a" else b.double().mT @ before[0]
                for b, a in zip(bs, as_, strict=True)
            ]
            if not all(unique(product, 0.5) for product in products):
                continue
        expected = reference.rules.fedrot(bs, as_, scalings, weights, before, side)
        room = (1e-8 + 4 * EPS[round_.dtype]) * round_.spread(module)
        if sum(weights) < 1 - 1e-9:  # the mean of A is over the clients that have the module
            expected = expected / sum(weights)
        assert norm(update(result.adapter, module) - expected) <= room, module
        compared += 1
    assert_report(result, round_)
    return compared


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_rounds_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    """A first round, one that rotates by B and one by A."""
    carried, compared = None, 0
    for number in range(3):
        round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype, seed=number)
        result = round_.aggregate("fedrot", carried=carried)
        compared += assert_round(round_, result, number, carried and carried["adapter"])
        carried = result.carried
        assert carried["rounds"] == number + 1
    assert compared > (3 if case != "all_zero_round" else 0)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families(case: tuple[str, torch.dtype], number: int) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    last = round_.aggregate("fedit").adapter
    carried = {"adapter": last, "rounds": number}
    assert_round(round_, round_.aggregate("fedrot", carried=carried), number, last)


def test_the_first_round_is_fedits_and_so_is_softness_zero() -> None:
    round_ = draw()
    plain = round_.aggregate("fedit")
    carried = draw(seed=4).aggregate("fedrot").carried
    results = (
        round_.aggregate("fedrot"),
        round_.aggregate("fedrot", softness=0.0, carried=carried),
    )
    for result in results:
        for module in round_.modules:
            gap = norm(update(result.adapter, module) - update(plain.adapter, module))
            assert gap <= 1e-6 * round_.spread(module)


@pytest.mark.parametrize("number", [1, 2])
def test_clients_that_differ_by_a_rotation_lose_nothing(number: int) -> None:
    """FedIT loses most of the update; rotated the whole way, the averages are exact."""
    one = draw(ranks=(4,), alphas=(8,), weights=(1,)).drawn[0]
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for _ in range(3):
        q = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
        q[:, 0] *= torch.linalg.det(q).sign()
        drawn.append({m: Drawn(x.b @ q, q.mT @ x.a, x.scaling) for m, x in one.items()})
    round_ = federation(drawn, [1.0, 2.0, 3.0])
    last = federation([one], [1.0]).adapters[0]
    carried = {"adapter": last, "rounds": number}
    result = round_.aggregate("fedrot", softness=1.0, carried=carried)
    plain = round_.aggregate("fedit")
    for module in round_.modules:
        assert result.report[module].relative_error <= 1e-5
        assert plain.report[module].relative_error > 0.3


def test_a_carried_adapter_of_another_rank_is_refused() -> None:
    carried = draw(ranks=(2, 2, 2)).aggregate("fedrot").carried
    with pytest.raises(flk.AdapterError, match=r"carried adapter, module .*: rank 2, expected 4"):
        draw().aggregate("fedrot", carried=carried)


def test_softness_out_of_range() -> None:
    with pytest.raises(ValueError, match="softness"):
        draw().aggregate("fedrot", softness=1.5)
