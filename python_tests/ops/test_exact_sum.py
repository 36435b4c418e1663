"""ExactSum: the sum, with the same bits in any order and grouping."""

import math
from functools import reduce
from operator import add

import pytest
import torch

from fedlora_kernels.gram_space.exact_sum import ExactSum

EPS = torch.finfo(torch.float64).eps


def terms(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(40)]
    exponents = [torch.randint(-30, 31, (5, 7), generator=generator) for _ in drawn]
    if kind == "spread":
        return [x * 2.0**e for x, e in zip(drawn, exponents, strict=True)]
    if kind == "tiny":
        return [x * 2.0**-1000 for x in drawn]
    if kind == "huge":
        return [x * 2.0**1000 for x in drawn]
    if kind == "canceling":
        return [*drawn, *(-x for x in drawn)]
    if kind == "zero":
        return [torch.zeros_like(x) for x in drawn]
    return drawn


@pytest.mark.parametrize("kind", ["normal", "spread", "tiny", "huge", "canceling", "zero"])
def test_it_is_the_sum_whatever_the_order(kind: str) -> None:
    all_terms = terms(kind)
    total = reduce(add, map(ExactSum, all_terms)).value
    stacked = torch.stack(all_terms)
    exact = [math.fsum(column) for column in stacked.flatten(1).T.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64).view_as(total)
    largest = len(all_terms) * stacked.abs().amax(0)  # what the leading place may add up to
    assert bool(((total - expected).abs() <= EPS * (expected.abs() + largest)).all())
    assert torch.equal(reduce(add, map(ExactSum, reversed(all_terms))).value, total)
    halves = [reduce(add, map(ExactSum, all_terms[start::2])) for start in (0, 1)]
    assert torch.equal((halves[1] + halves[0]).value, total)


def test_one_term_and_none() -> None:
    term = torch.tensor([1.0 + 2.0**-52, -3.0, 0.0, 2.0**-1040], dtype=torch.float64)
    assert torch.equal(ExactSum(term).value, term)
    assert ExactSum(torch.empty(0, dtype=torch.float64)).value.shape == (0,)


def test_terms_are_not_changed() -> None:
    term = torch.ones(3, dtype=torch.float64)
    one = ExactSum(term)
    _ = one + ExactSum(term)
    assert torch.equal(one.value, torch.ones(3, dtype=torch.float64))
