"""The mistakes found in public code, one test each, named after where they were found."""

from pathlib import Path

import pytest
import torch
from assertions import EPS
from federation import (
    AVERAGING_RULES,
    FIXED_A,
    PRODUCT_RULES,
    Drawn,
    assert_ideal,
    draw,
    federation,
    norm,
    product_bound,
    update,
    whole_update,
    write_client,
)

import fedlora_kernels as flk
from fedlora_kernels import reference

GLOBAL_RULES = [rule for rule in flk.rules.names() if rule != "fedsa"]


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("rule", GLOBAL_RULES)
def test_flora_release_fedit_branch_drops_all_clients_but_the_first(rule: str, k: int) -> None:
    """Move B_k by E: exact rules move by w_k s_k E A_k, averages of B by w_k s_k E times mean A."""
    round_ = draw(common_a=rule in FIXED_A)
    module = "layers.0.down"
    old = round_.drawn[k][module]
    step = torch.randn(old.b.shape, generator=torch.Generator().manual_seed(9))
    moved = round_.replaced(k, module, old.b + step, old.a)
    options = PRODUCT_RULES.get(rule, {})
    before, after = round_.aggregate(rule, **options), moved.aggregate(rule, **options)
    change = whole_update(after, module) - whole_update(before, module)
    exact = moved.ideal(module) - round_.ideal(module)
    if rule in PRODUCT_RULES or rule in FIXED_A:
        bound = product_bound(round_, module, torch.float32, rule)
        bound += product_bound(moved, module, torch.float32, rule)
        assert norm(change - exact) <= bound
    elif rule == "fedit":
        (b, a), (b_before, _) = moved.means(module), round_.means(module)
        assert norm(change - (b - b_before) @ a) <= 4 * EPS[torch.float32] * norm(b) * norm(a)
    else:
        share = round_.weights[k] / sum(round_.weights)
        assert norm(change) > 0.05 * share * norm(exact)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_flora_release_fedit_branch_drops_clients_from_a_shared_factor_too(k: int) -> None:
    """FedSA shares A alone: move A_k by E, and what all receive moves by w_k E."""
    round_ = draw()
    module = "layers.0.down"
    old = round_.drawn[k][module]
    step = torch.randn(old.a.shape, generator=torch.Generator().manual_seed(9))
    before = round_.aggregate("fedsa").client_adapter((k + 1) % 3)
    after = round_.replaced(k, module, old.b, old.a + step).aggregate("fedsa")
    found = after.client_adapter((k + 1) % 3).factors[module].a - before.factors[module].a
    expected = round_.weights[k] / sum(round_.weights) * step
    size = sum(norm(client[module].a) for client in round_.drawn) + norm(step)
    assert norm(found - expected) <= 4 * EPS[torch.float32] * size


def test_florist_release_flexlora_branch_gives_everyone_the_last_clients_rank() -> None:
    round_ = draw(ranks=(8, 4, 2))
    for rule in ("flexlora", "hetlora"):
        result = round_.aggregate(rule)
        received = [result.client_adapter(k) for k in range(3)]  # all, then look at each
        for k, rank in enumerate((8, 4, 2)):
            assert {factors.rank for factors in received[k].factors.values()} == {rank}
            assert received[k].config["r"] == rank


def test_florist_release_ffa_branch_trains_a_and_freezes_b() -> None:
    """Clients that froze a random B and trained A are no FFA clients."""
    round_ = draw()
    drawn = [
        {m: Drawn(round_.drawn[0][m].b, item.a, item.scaling) for m, item in client.items()}
        for client in round_.drawn
    ]
    with pytest.raises(flk.AdapterError, match=r"client 1 \(site-1\), module layers.0.attn.q"):
        federation(drawn, round_.weights).aggregate("ffa")


@pytest.mark.parametrize("rule", PRODUCT_RULES)
@pytest.mark.parametrize("size", [(4, 9), (9, 4), (4, 5), (12, 4)], ids=str)
def test_florist_release_stacking_finds_sides_by_comparing_shapes(
    rule: str, size: tuple[int, int]
) -> None:
    """m = r and n = r; with three clients of rank 4 also m = R."""
    round_ = draw(sizes={"q": size})
    assert_ideal(round_.aggregate(rule, **PRODUCT_RULES[rule]), round_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [4, 8, 16])
@pytest.mark.parametrize("rule", flk.rules.names())
def test_alpha_over_r_left_out_one_client_is_the_identity(
    rule: str, alpha: int, rslora: bool, dtype: torch.dtype
) -> None:
    """One client with weight 1, scalings 1, 2 and 4 (or with rsLoRA twice that)."""
    round_ = draw(ranks=(4,), alphas=(alpha,), weights=(1,), rslora=rslora, dtype=dtype)
    result = round_.aggregate(rule, **PRODUCT_RULES.get(rule, {}))
    received = result.client_adapter(0)
    for module, drawn in round_.drawn[0].items():
        assert drawn.scaling == alpha / (2 if rslora else 4)
        found = update(received, module)
        if result.residual is not None:
            found = found + update(result.residual, module)
        bound = 2 * product_bound(round_, module, dtype, rule)
        assert norm(found - drawn.update()) <= bound


@pytest.mark.parametrize("rule", PRODUCT_RULES)
def test_alpha_over_r_left_out_mixed_scalings(rule: str) -> None:
    """Scalings 1, 2, 4 in one round, and one weight only: the identity of that client."""
    for k in range(3):
        chosen = draw(weights=[float(k == j) for j in range(3)])
        result = chosen.aggregate(rule, **PRODUCT_RULES[rule])
        for module in chosen.modules:
            bound = product_bound(chosen, module, torch.float32, rule)
            assert norm(whole_update(result, module) - chosen.drawn[k][module].update()) <= bound


@pytest.mark.parametrize("split", ["b", "balanced", "a"])
def test_fedllm_factory_flexlora_puts_the_root_of_sigma_on_one_side_only(split: str) -> None:
    round_ = draw()
    truncated = {
        "florist": round_.aggregate("florist", rank=4, split=split),
        "flexlora": round_.aggregate("flexlora"),
    }
    for result in truncated.values():
        for module in round_.modules:
            ideal = round_.ideal(module)
            values = torch.linalg.svdvals(ideal)
            room = 1 + 4 * float(values[0] / (values[3] - values[4]))
            bound = room * product_bound(round_, module, torch.float32)
            expected = reference.rules.truncate(ideal, 4)
            assert norm(update(result.adapter, module) - expected) <= bound


@pytest.mark.parametrize("size", [(31, 7), (7, 31)], ids=str)
@pytest.mark.parametrize("rule", PRODUCT_RULES)
def test_fedex_glue_and_appfl_transpose_the_residual(rule: str, size: tuple[int, int]) -> None:
    round_ = draw(sizes={"q": size})
    result = round_.aggregate(rule, **PRODUCT_RULES[rule])
    assert result.adapter.delta("q").shape == size
    if result.residual is not None:
        assert result.residual.delta("q").shape == size
    assert_ideal(result, round_)


@pytest.mark.parametrize("rule", AVERAGING_RULES)
@pytest.mark.parametrize("ranks", [(8, 1, 8), (1, 8, 8), (8, 8, 1)], ids=str)
def test_flower_fedavg_broadcasts_a_rank_one_client(rule: str, ranks: tuple[int, ...]) -> None:
    round_ = draw(ranks=ranks)
    odd = 1 if ranks[0] == 1 else ranks.index(1)
    with pytest.raises(flk.AdapterError, match=rf"site-{odd}.*layers\.0\.attn\.q.*hetlora"):
        round_.aggregate(rule)


@pytest.mark.parametrize("rule", ["flora", "flexlora", "florist", "hetlora"])
def test_flower_fedavg_broadcast_is_no_trap_for_heterogeneous_rules(rule: str) -> None:
    """Rank 1 among rank 8 counts once, in its own column."""
    round_ = draw(ranks=(8, 1, 8))
    options = PRODUCT_RULES.get(rule, {"norm_weighted": False})
    result = round_.aggregate(rule, **options)
    if rule in PRODUCT_RULES:
        assert_ideal(result, round_)
        return
    for module in round_.modules:
        bs, as_, scalings, weights = round_.of(module)
        padded = reference.rules.hetlora(bs, as_, scalings, weights, norm_weighted=False)
        bound = product_bound(round_, module, torch.float32, "hetlora")
        for k, expected in enumerate(padded):
            assert norm(update(result.client_adapter(k), module) - expected) <= bound


def test_peft_add_weighted_adapter_is_silent_about_what_it_cannot_represent(
    tmp_path: Path,
) -> None:
    folder = write_client(tmp_path / "site", draw().drawn[0], use_dora=True)
    with pytest.raises(flk.AdapterError, match="DoRA"):
        flk.Adapter.load(folder)


def test_peft_add_weighted_adapter_loses_rslora_and_ranks_per_module() -> None:
    """The saved config of a result with ranks per module, from rsLoRA clients, means the update.

    (The same through PeftModel is in test_peft_roundtrip.)
    """
    round_ = draw(
        ranks=({"a": 3, "b": 5},) * 2,
        alphas=(8, 8),
        weights=(1, 2),
        sizes={"a": (9, 14), "b": (14, 9)},
        rslora=True,
    )
    for rule in ("fedit", "florist", "flora"):
        result = round_.aggregate(rule, **PRODUCT_RULES.get(rule, {})).adapter
        again = flk.Adapter.from_state_dict(result.state_dict(), result.config)
        for module in round_.modules:
            assert again.factors[module].rank == result.factors[module].rank
            difference = norm(update(again, module) - update(result, module))
            assert difference <= 1e-12 * norm(update(result, module))


def test_fedsa_in_fedllm_factory_leaks_one_clients_b_into_the_next() -> None:
    round_ = draw()
    result = round_.aggregate("fedsa")
    received = [result.client_adapter(k) for k in range(3)]
    for k, adapter in enumerate(received):
        for module, drawn in round_.drawn[k].items():
            assert torch.equal(adapter.factors[module].b, drawn.b)
