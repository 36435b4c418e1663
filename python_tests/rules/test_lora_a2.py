"""LoRA-A2: RoLoRA's turns, and of each client the ranks that matter (arXiv 2410.22815)."""

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
    with_common,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

OTHER = {"a": "b", "b": "a"}


def begun(round_: Federation, trained: str) -> flk.Adapter:
    """What such clients started from: their common factor beside a mean of the trained one."""
    drawn = {}
    for module in round_.modules:
        b, a = round_.means(module)
        first = next(client[module] for client in round_.drawn if module in client)
        item = (
            Drawn(b.to(first.b), first.a, 1.0)
            if trained == "b"
            else Drawn(first.b, (first.scaling * a).to(first.a), 1.0)
        )
        drawn[module] = item
    return federation([drawn]).adapters[0]


def assert_reference(round_: Federation, trained: str, last: flk.Adapter | None) -> None:
    budget = max(1, round_.of(round_.modules[0])[0][0].shape[1] // 2)
    result = round_.aggregate("lora_a2", budget=budget, carried=last, dtype=torch.float64)
    lasts: list[torch.Tensor | None] = [None] * len(round_.modules)
    if last is not None:
        lasts = [
            last.factors[x].scaling * getattr(last.factors[x], trained).double()
            for x in round_.modules
        ]
    updates = reference.rules.lora_a2(
        [round_.of(module) for module in round_.modules], lasts, budget, trained
    )
    for module, expected in zip(round_.modules, updates, strict=True):
        size = norm(update(last, module)) if last is not None else 0.0
        room = 1e-10 * (round_.spread(module) + size)
        assert norm(update(result.adapter, module) - expected) <= room, module
        first = next(client[module] for client in round_.drawn if module in client)
        found = getattr(result.adapter.factors[module], OTHER[trained])
        assert torch.equal(found, getattr(first, OTHER[trained]).double()), module
    assert_report(result, round_)


WHOLE = [case for case in EQUAL_RANK_CASES if case != "absent_modules"]


@pytest.mark.parametrize("trained", ["b", "a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WHOLE)
def test_ranks_compete_over_all_modules(case: str, dtype: torch.dtype, trained: str) -> None:
    round_ = with_common(draw(**EQUAL_RANK_CASES[case], dtype=dtype), OTHER[trained])
    assert_reference(round_, trained, begun(round_, trained))
    if trained == "b":
        assert_reference(round_, trained, None)


@pytest.mark.parametrize("trained", ["b", "a"])
@pytest.mark.parametrize("case", FAMILY_CASES, ids=case_id)
def test_families(case: tuple[str, torch.dtype], trained: str) -> None:
    name, dtype = case
    round_ = with_common(of_batch(FAMILIES[name].build(dtype)), OTHER[trained])
    assert_reference(round_, trained, begun(round_, trained))


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("options", [{}, {"budget": 4}], ids=str)
def test_without_a_cut_it_is_rolora(options: dict[str, Any], dtype: torch.dtype, side: str) -> None:
    round_ = with_common(draw(dtype=dtype), side)
    last = begun(round_, "b" if side == "a" else "a") if options else None
    found = round_.aggregate("lora_a2", carried=last, **options).adapter
    plain = round_.aggregate("rolora").adapter
    for module, factors in plain.factors.items():
        assert found.factors[module].scaling == factors.scaling
        assert torch.equal(getattr(found.factors[module], side), getattr(factors, side))
        gap = norm(
            update(found, module) - factors.scaling * factors.b.double() @ factors.a.double()
        )
        assert gap <= 1e-10 * norm(update(found, module)) + EPS[dtype] * round_.spread(module)


def test_a_client_without_a_module_has_fewer_ranks_to_choose() -> None:
    module = "layers.0.down"
    round_ = with_common(draw(absent={1: [module]}), "a")
    result = round_.aggregate("lora_a2", budget=2, carried=begun(round_, "b"))
    assert result.rule.budget == 2
    masks = flk.rules.LoRAA2(budget=2).prepared(flk.Round(round_.adapters).grams).masks
    assert masks.pop(module).shape == (2, 4)
    counts = [sum(int(rows[k].sum()) for rows in masks.values()) for k in range(3)]
    assert counts[1] == 4
    assert counts[0] <= 6


def test_two_rounds_in_turn() -> None:
    """B, then A: the second round starts from what the first one left, and counts from there."""
    round_ = with_common(draw(alphas=(8, 8, 8)), "a")
    first = round_.aggregate("lora_a2", budget=2)
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in round_.drawn:
        client = {}
        for module, item in first.adapter.factors.items():
            moved = item.a + 0.1 * torch.randn(item.a.shape, generator=generator)
            client[module] = Drawn(item.b, moved, item.scaling)
        drawn.append(client)
    assert_reference(federation(drawn, round_.weights), "a", first.carried)


def test_what_the_clients_started_from_must_be_known_and_theirs() -> None:
    round_ = with_common(draw(), "b")
    with pytest.raises(flk.AdapterError, match=r"module layers.*: the clients trained A, and"):
        round_.aggregate("lora_a2", budget=2)
    other = draw(seed=3).adapters[0]
    with pytest.raises(flk.AdapterError, match=r"carried adapter, module layers.*: B differs from"):
        round_.aggregate("lora_a2", budget=2, carried=other)
    narrow = draw(ranks=(2, 2, 2)).adapters[0]
    with pytest.raises(flk.AdapterError, match=r"carried adapter, module .*: rank 2, expected 4"):
        round_.aggregate("lora_a2", budget=2, carried=narrow)
    with pytest.raises(TypeError, match="has no memory"):
        round_.aggregate("lora_a2", carried=other)
    with pytest.raises(ValueError, match="budget must be at least 1"):
        round_.aggregate("lora_a2", budget=0)
