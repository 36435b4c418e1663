"""Grams: a rule's error from coefficients alone, whichever way it is multiplied out."""

from typing import Any

import pytest
import torch
from assertions import EPS, assert_within
from federation import PRODUCT_RULES, draw, of_batch
from matrices import CASES, FAMILIES, case_id, normal

import fedlora_kernels as flk
from fedlora_kernels.adapters import agreement
from fedlora_kernels.gram_space.batches import Batch, stack
from fedlora_kernels.gram_space.coefficients import Solution, Stacked
from fedlora_kernels.gram_space.grams import Grams

ERROR_TERMS = 4.0
"""c of c R eps (sum of dW's squared terms + ||B X||^2 ||Y A||^2), the room of a squared error."""

ERROR_CASES = [case for case in CASES if case[1] in (torch.float64, torch.bfloat16)]


def batches(name: str, dtype: torch.dtype) -> list[Batch]:
    round_ = of_batch(FAMILIES[name].build(dtype))
    return stack(round_.adapters, agreement.normalized(round_.weights, round_.adapters))


def widths(stacked_rank: int) -> list[int]:
    """From 1 to beyond R, on both sides of 2 R / 3."""
    border = 2 * stacked_rank // 3
    return sorted({1, max(1, border - 1), border + 1, stacked_rank, stacked_rank + 3})


@pytest.mark.parametrize("case", ERROR_CASES, ids=case_id)
def test_error_is_the_dense_one_at_every_width(case: tuple[str, torch.dtype]) -> None:
    """Random pairs, and the same with zero columns up to R, which are multiplied otherwise."""
    for batch in batches(*case):
        grams = Grams(batch)
        b, a = batch.b.double(), batch.a.double()
        modules, stacked_rank = grams.scale.shape
        generator = torch.Generator().manual_seed(stacked_rank)
        terms = (b.square().sum(1) * grams.scale.square() * a.square().sum(2)).sum(1)
        for rank in widths(stacked_rank):
            # Of the size of D's own entries, so that the error is neither dW nor B X Y A alone.
            x = normal(generator, modules, stacked_rank, rank) * grams.scale[:, :, None]
            y = normal(generator, modules, rank, stacked_rank)
            found = grams.error(x, y)
            dense = (b * grams.scale[:, None]) @ a - (b @ x) @ (y @ a)
            scale = terms + ((b @ x).square().sum((1, 2)) * (y @ a).square().sum((1, 2)))
            bound = ERROR_TERMS * (stacked_rank + rank) * EPS[torch.float64] * scale
            assert_within((found - dense.square().sum((1, 2))).abs(), bound, f"rank {rank}")

            spare = max(0, stacked_rank - rank)
            wide = grams.error(
                torch.nn.functional.pad(x, (0, spare)), torch.nn.functional.pad(y, (0, 0, 0, spare))
            )
            assert_within((found - wide).abs(), 2 * bound, f"rank {rank} beside {rank + spare}")


@pytest.mark.parametrize("case", ERROR_CASES, ids=case_id)
def test_error_of_the_stack_itself(case: tuple[str, torch.dtype]) -> None:
    """Zero where it is the ideal one; with other weights, what the general form says."""
    for batch in batches(*case):
        grams = Grams(batch)
        owner = grams.batch.owner
        ideal = Stacked(grams.weights * grams.scalings, owner)
        assert torch.equal(ideal.scale, grams.scale)
        assert not Solution(ideal).error(grams).any()

        generator = torch.Generator().manual_seed(grams.scale.shape[1])
        stacked = Stacked(ideal.terms * normal(generator, *ideal.terms.shape), owner)
        terms = (grams.scale.square() + stacked.scale.square()) * (grams.b * grams.a).diagonal(
            dim1=-2, dim2=-1
        )
        bound = ERROR_TERMS * grams.scale.shape[1] ** 2 * EPS[torch.float64] * terms.sum(-1)
        gap = Solution(stacked).error(grams) - grams.error(stacked.x, stacked.y)
        assert_within(gap.abs(), bound, "stack")


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_exact_rules_need_no_spectrum(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies beyond rank R: the floor is 0 without the singular values."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked for a spectrum")

    monkeypatch.setattr(flk.ops, "spectrum", refuse)
    result = draw().aggregate(rule, **PRODUCT_RULES[rule])
    assert {row.svd_floor for row in result.report.values()} == {0.0}
