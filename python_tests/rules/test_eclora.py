"""ECLoRA: what an SVD cut off is added to the next round's update."""

import itertools

import pytest
import torch
from assertions import EPS
from federation import CASES, Federation, draw, norm, of_batch, product_bound, update
from matrices import CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_round(
    round_: Federation, error: dict[str, torch.Tensor], carried: flk.Adapter | None
) -> flk.Aggregation:
    """One round beside the dense reference, whose errors are written to ``error``."""
    result = round_.aggregate("eclora", carried=carried)
    for module in round_.modules:
        terms = round_.of(module)
        last = error.get(module, torch.zeros_like(round_.ideal(module)))
        whole = round_.ideal(module) + last
        expected, left = reference.rules.eclora(*terms, last)
        present = [k for k, client in enumerate(round_.drawn) if module in client]
        room = 2 * product_bound(round_, module, round_.dtype) + 8 * EPS[round_.dtype] * norm(last)
        for k, dense in zip(present, expected, strict=True):
            found = update(result.client_adapter(k), module)
            assert norm(whole - found) <= norm(whole - dense) + room, f"client {k}, {module}"
        assert result.kept is not None
        kept = update(result.kept, module)
        assert norm(kept) <= norm(left) + room
        sent = update(result.adapter, module)
        assert norm(sent + kept - whole) <= room, f"{module}: nothing is lost"
        error[module] = kept
    return result


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rounds_equal_the_reference(case: str, dtype: torch.dtype) -> None:
    carried, error = None, dict[str, torch.Tensor]()
    for seed in range(3):
        carried = assert_round(draw(**CASES[case], dtype=dtype, seed=seed), error, carried).carried


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families(case: tuple[str, torch.dtype]) -> None:
    """A first round, and the same clients again."""
    name, dtype = case
    round_, error = of_batch(FAMILIES[name].build(dtype)), dict[str, torch.Tensor]()
    carried = assert_round(round_, error, None).carried
    assert_round(round_, error, carried)


def test_all_that_was_ever_sent_is_all_that_was_ever_learned_but_the_last_error() -> None:
    rounds = [draw(seed=seed) for seed in range(4)]
    carried = None
    sent = dict.fromkeys(rounds[0].modules, 0.0)
    learned = dict.fromkeys(rounds[0].modules, 0.0)
    for round_ in rounds:
        result = round_.aggregate("eclora", carried=carried)
        carried = result.carried
        for module in round_.modules:
            sent[module] = sent[module] + update(result.adapter, module)
            learned[module] = learned[module] + round_.ideal(module)
    for module, total in learned.items():
        rest = update(carried, module)
        assert norm(total - sent[module] - rest) <= 1e-5 * norm(total)


def test_the_first_round_is_flexloras() -> None:
    round_ = draw(ranks=(4, 2, 3))
    one, other = round_.aggregate("eclora"), round_.aggregate("flexlora")
    for module in round_.modules:
        gap = norm(update(one.adapter, module) - update(other.adapter, module))
        assert gap <= 1e-6 * norm(round_.ideal(module))


def test_the_errors_rank_may_be_limited() -> None:
    round_ = draw()
    carried = None
    for _ in range(3):
        carried = round_.aggregate("eclora", carried=carried, error_rank=2).carried
        assert {factors.rank for factors in carried.factors.values()} == {2}
    with pytest.raises(ValueError, match="error_rank must be at least 1"):
        round_.aggregate("eclora", error_rank=0)


@pytest.mark.parametrize("absent", ["zero", "renormalize"])
def test_the_error_counts_in_full_where_clients_are_absent(absent: str) -> None:
    module = "layers.0.down"
    carried = draw().aggregate("eclora").carried
    round_ = draw(absent={0: [module]}, seed=5)
    result = round_.aggregate("eclora", carried=carried, absent=absent)
    whole = round_.ideal(module, absent == "renormalize") + update(carried, module)
    found = update(result.adapter, module) + update(result.kept, module)
    assert norm(found - whole) <= 1e-5 * norm(whole)


def test_clients_share_nothing_with_the_order_of_the_rounds() -> None:
    """The same rounds give the same bits."""
    for one, other in itertools.pairwise([chain(), chain()]):
        for key, tensor in one.adapter.state_dict().items():
            assert torch.equal(tensor, other.adapter.state_dict()[key])


def chain() -> flk.Aggregation:
    carried = draw().aggregate("eclora").carried
    return draw(seed=1).aggregate("eclora", carried=carried)
