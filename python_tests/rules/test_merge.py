"""merge: a tree of servers gives what one server gives, for the rules that say so."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_within
from federation import FIXED_A, SIZES, Federation, draw, norm, of_batch, update, with_common
from matrices import CASES, EQUAL_RANK_CASES, FAMILIES, case_id
from vera import vera_clients

import fedlora_kernels as flk

EPS = torch.finfo(torch.float64).eps

WHOLE: dict[str, dict[str, Any]] = {"florist": {"energy": 1.0}, "flora": {}}
"""Rules that give all of the sum of the products."""

CUT: dict[str, dict[str, Any]] = {
    "florist": {"energy": 0.87},
    "flexlora": {"rank": 3},
}
"""Rules that give the best of some rank."""

MEANS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "fedsa": {},
    "ffa": {},
    "fedsvd": {},
    "rolora": {},
    "lora_a2": {},
    "hetlora": {"norm_weighted": False},
}
"""Rules that give averages of the factors."""

REFUSED = ("flexlora", "hetlora", *sorted({*flk.rules.names()} - {*WHOLE, *CUT, *MEANS}))
"""Rules that need each client by itself, with their default options."""

Nodes = tuple[list[flk.Adapter], list[float]]


def tree(round_: Federation, rule: str, dtype: torch.dtype | None, **options: Any) -> Nodes:
    """What reaches the root of an uneven tree of three levels: a node that merged a node and some
    clients, and the clients that send to the root themselves.
    """
    clients, weights = list(round_.adapters), list(round_.weights)
    third = -(-len(clients) // 3)

    def merged(adapters: Sequence[flk.Adapter], weights: Sequence[float]) -> flk.Merged:
        return flk.merge(adapters, rule=rule, weights=weights, dtype=dtype, **options)

    low = merged(clients[:third], weights[:third])
    middle = merged(
        [low.adapter, *clients[third : 2 * third]], [low.weight, *weights[third : 2 * third]]
    )
    rest = slice(2 * third, None)
    return [middle.adapter, *clients[rest]], [middle.weight, *weights[rest]]


def both(
    round_: Federation, rule: str, dtype: torch.dtype | None = torch.float64, **options: Any
) -> tuple[flk.Aggregation, flk.Aggregation]:
    """The results of the tree and of one server."""
    adapters, weights = tree(round_, rule, dtype, **options)
    same: dict[str, Any] = {"rule": rule, "dtype": torch.float64, **options}
    return flk.aggregate(adapters, weights=weights, **same), flk.aggregate(
        round_.adapters, weights=round_.weights, **same
    )


def room(round_: Federation, module: str) -> float:
    """What singular values that count as zero may add up to, at every level."""
    stacked_rank = sum(b.shape[1] for b in round_.of(module)[0])
    return 3 * stacked_rank * math.sqrt(EPS) * round_.magnitude(module)


@pytest.mark.parametrize("rule", WHOLE)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_whole_sum_of_a_tree(case: tuple[str, torch.dtype], rule: str) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    result, _ = both(round_, rule, **WHOLE[rule])
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - round_.ideal(module))
        assert_within(torch.tensor(gap), room(round_, module), f"{rule}, {module}")


@pytest.mark.parametrize("rule", CUT)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_best_of_a_rank_of_a_tree(case: tuple[str, torch.dtype], rule: str) -> None:
    """Where singular values repeat, the components differ; their error does not."""
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    result, flat = both(round_, rule, **CUT[rule])
    for module in round_.modules:
        ideal = round_.ideal(module)
        errors = [norm(update(found.adapter, module) - ideal) for found in (result, flat)]
        gap = torch.tensor(abs(errors[0] - errors[1]))
        assert_within(gap, room(round_, module), f"{rule}, {module}: {errors}")


@pytest.mark.parametrize("rule", MEANS)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=case_id)
def test_the_means_of_a_tree(case: tuple[str, torch.dtype], rule: str) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    if rule in FIXED_A:
        round_ = with_common(round_, "a")
    result, flat = both(round_, rule, **MEANS[rule])
    for module in round_.modules:
        ours, theirs = (found.adapter.factors[module] for found in (result, flat))
        count = 64 * len(round_.adapters)
        sizes = [norm(pair.a.double()) for pair in (ours, theirs)]
        spread = round_.spread(module)
        gap = norm(update(result.adapter, module) - update(flat.adapter, module))
        assert_within(torch.tensor(gap), count * EPS * spread, f"{rule}, {module}")
        if rule != "fedsvd":  # whose singular vectors may turn
            terms = sum(norm(a.double()) for a in round_.of(module)[1])
            gap = norm(ours.a.double() - theirs.a.double())
            assert_within(torch.tensor(gap), count * EPS * terms, f"{rule}, {module}: A {sizes}")


@pytest.mark.parametrize("rule", ["rolora", "lora_a2"])
def test_a_tree_of_clients_that_share_b(rule: str) -> None:
    round_ = with_common(draw(ranks=(4,) * 5, alphas=(8,) * 5, weights=(5, 1, 2, 3, 4)), "b")
    result, flat = both(round_, rule)
    for module in round_.modules:
        ours, theirs = (found.adapter.factors[module] for found in (result, flat))
        assert torch.equal(ours.b, theirs.b)
        assert norm(ours.a - theirs.a) <= 64 * EPS * norm(theirs.a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "options"), [*WHOLE.items(), *MEANS.items()])
def test_by_default_a_tree_rounds_to_float32(
    rule: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    round_ = draw(
        ranks=(4,) * 7,
        alphas=(8,) * 7,
        weights=(5, 1, 2, 3, 4, 1, 9),
        dtype=dtype,
        common_a=rule in FIXED_A,
    )
    result, flat = both(round_, rule, None, **options)
    adapters, _ = tree(round_, rule, None, **options)
    assert {pair.b.dtype for pair in adapters[0].factors.values()} == {torch.float32}
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - update(flat.adapter, module))
        bound = 4 * torch.finfo(torch.float32).eps * round_.spread(module)
        assert_within(torch.tensor(gap), bound, f"{rule}, {module}")


@pytest.mark.parametrize("name", ["wide_stack", "many_clients", "duplicate_clients"])
def test_a_merged_adapter_is_no_wider_than_the_sum(name: str) -> None:
    """At most min(m, n, R), and the numerical rank where that is less."""
    batch = FAMILIES[name].build(torch.float32)
    round_ = of_batch(batch)
    merged = flk.merge(round_.adapters, rule="flora", weights=round_.weights)
    assert merged.weight == pytest.approx(sum(round_.weights))
    for module in round_.modules:
        ideal = round_.ideal(module)
        sigma = torch.linalg.svdvals(ideal)
        floor = math.sqrt(batch.stacked_rank * EPS) * sigma[0]
        rank = merged.adapter.factors[module].rank
        assert rank <= batch.attainable_rank
        assert rank == int((sigma > floor).sum())


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-3])
def test_what_may_be_cut_off_is_bounded(rtol: float) -> None:
    """One level: rtol of its sum. Two: the weighted mean of the first's, and the second's."""
    round_ = draw(ranks=(6,) * 8, alphas=(6,) * 8, weights=range(1, 9))
    halves = [
        flk.merge(
            round_.adapters[part],
            rule="florist",
            weights=round_.weights[part],
            rtol=rtol,
            dtype=torch.float64,
        )
        for part in (slice(4), slice(4, 8))
    ]
    adapters, weights = zip(*halves, strict=True)
    root = flk.merge(adapters, rule="florist", weights=weights, rtol=rtol, dtype=torch.float64)
    assert root.weight == 36
    for module in round_.modules:
        bound = 0.0
        for half, part in zip(halves, (slice(4), slice(4, 8)), strict=True):
            terms = list(zip(*round_.of(module), strict=True))[part]
            own = torch.stack([w * s * (b.double() @ a.double()) for b, a, s, w in terms]).sum(0)
            share = half.weight / 36
            gap = norm(share * update(half.adapter, module) - own)
            assert gap <= (1 + 1e-6) * rtol * norm(own)
            bound += rtol * norm(own)
        sent = sum(half.weight / 36 * update(half.adapter, module) for half in halves)
        bound += rtol * norm(sent)
        gap = norm(update(root.adapter, module) - round_.ideal(module))
        assert gap <= (1 + 1e-6) * bound
        if rtol == 0.5:
            assert root.adapter.factors[module].rank < min(24, *sent.shape)


def test_nodes_are_saved_and_loaded(tmp_path: Path) -> None:
    """As PEFT folders, whose ranks differ between modules."""
    round_ = draw(ranks=(4,) * 4, alphas=(8, 8, 4, 2), weights=(1, 2, 3, 4))
    nodes = []
    for part in (slice(3), slice(3, 4)):
        node = flk.merge(round_.adapters[part], rule="flora", weights=round_.weights[part])
        node.adapter.save(tmp_path / str(len(nodes)))
        nodes.append(node.weight)
    folders = sorted(tmp_path.iterdir())
    result = flk.aggregate(folders, rule="flora", weights=nodes)
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - round_.ideal(module))
        assert gap <= 4 * torch.finfo(torch.float32).eps * round_.magnitude(module)


def test_heads_and_vectors_are_averaged_as_well() -> None:
    clients = vera_clients()
    low = flk.merge(clients[:2], rule="fedsa", weights=[1, 2])
    result = flk.aggregate([low.adapter, clients[2]], rule="fedsa", weights=[low.weight, 3])
    flat = flk.aggregate(clients, rule="fedsa", weights=[1, 2, 3])
    for module, (_, lambda_d) in flat.adapter.vera.items():
        assert torch.allclose(result.adapter.vera[module][1], lambda_d, atol=1e-6)


def test_equal_weights_are_one_each() -> None:
    round_ = draw()
    merged = flk.merge(round_.adapters, rule="fedit")
    assert merged.weight == 3.0
    assert isinstance(merged.adapter, flk.Adapter)


@pytest.mark.parametrize("rule", REFUSED)
def test_a_rule_that_needs_each_client_is_refused(rule: str) -> None:
    round_ = draw(common_a=True)
    title = type(flk.rules.make(rule)).__name__
    with pytest.raises(ValueError, match=rf"^{title}\(.*\) cannot work on merged clients.*florist"):
        flk.merge(round_.adapters, rule=rule)


def test_what_else_is_refused() -> None:
    round_ = draw(absent={1: ["layers.0.down"]})
    for rule in ("fedit", "fedsa"):
        with pytest.raises(
            flk.AdapterError, match=r"client 1 \(site-1\), module layers\.0\.down: is missing"
        ):
            flk.merge(round_.adapters, rule=rule)
    assert flk.merge(round_.adapters, rule="florist").weight == 3
    with pytest.raises(ValueError, match=r"rtol must lie in \[0, 1\), found 1"):
        flk.merge(round_.adapters, rule="florist", rtol=1)
    with pytest.raises(ValueError, match="rtol must be 0 for rule 'fedit', which averages"):
        flk.merge(draw().adapters, rule="fedit", rtol=0.1)
    with pytest.raises(flk.AdapterError, match=r"client 1 .*weight -1"):
        flk.merge(draw().adapters, rule="fedit", weights=[1, -1, 1])


@pytest.mark.parametrize("rule", ["florist", "ffa", "fedsvd", "rolora"])
def test_a_client_without_a_module_counts_as_zero_in_a_tree(rule: str) -> None:
    round_ = draw(
        ranks=(4,) * 6,
        alphas=(8,) * 6,
        weights=(1, 2, 3, 4, 5, 6),
        common_a=rule in FIXED_A,
        absent={1: ["layers.0.down"], 4: ["layers.1.attn.q"]},
    )
    result, flat = both(round_, rule, **({"energy": 1.0} if rule == "florist" else {}))
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - update(flat.adapter, module))
        assert_within(torch.tensor(gap), room(round_, module), f"{rule}, {module}")


@pytest.mark.parametrize(("rule", "options"), [*WHOLE.items(), *MEANS.items()])
@pytest.mark.parametrize("absent", [{}, {1: ["layers.0.down"]}], ids=["complete", "absent"])
def test_a_tree_whose_root_renormalizes(
    absent: dict[int, list[str]], rule: str, options: dict[str, Any]
) -> None:
    """The weight of a merged client cannot tell that a client lacks a module."""
    equal: dict[str, Any] = {"ranks": (4,) * 4, "alphas": (8,) * 4, "weights": (1, 2, 3, 4)}
    round_ = draw(common_a=True, absent=absent, **equal)
    clients, same = round_.adapters, {"rule": rule, "absent": "renormalize", **options}
    if absent:
        with pytest.raises(
            flk.AdapterError, match=r"^client 1 \(site-1\), module layers.0.down: is mis"
        ):
            flk.merge(clients[:3], weights=[1, 2, 3], **same)
        return
    low = flk.merge(clients[:3], weights=[1, 2, 3], dtype=torch.float64, **same)
    root, flat = (
        flk.aggregate(adapters, weights=weights, dtype=torch.float64, **same)
        for adapters, weights in (
            ([low.adapter, clients[3]], [low.weight, 4]),
            (clients, round_.weights),
        )
    )
    for module in round_.modules:
        gap = norm(update(root.adapter, module) - update(flat.adapter, module))
        assert_within(torch.tensor(gap), room(round_, module), f"{rule}, {module}")


def with_magnitudes(adapter: flk.Adapter, seed: int) -> flk.Adapter:
    """The same client, of DoRA."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.rand(m, generator=generator)
        for module, (m, _) in SIZES.items()
    }
    config = {**adapter.config, "use_dora": True}
    return flk.Adapter.from_state_dict({**adapter.state_dict(), **tensors}, config)


@pytest.mark.parametrize("rule", [rule for rule in (*WHOLE, *MEANS) if rule != "flora"])
def test_a_tree_of_dora(rule: str) -> None:
    """The mean of the nodes' mean magnitudes is the mean of all; of FedSA they stay behind."""
    drawn = draw(common_a=True, ranks=(4,) * 4, alphas=(8,) * 4, weights=(1, 2, 3, 4))
    clients = [with_magnitudes(adapter, k) for k, adapter in enumerate(drawn.adapters)]
    options: dict[str, Any] = {"rule": rule, **WHOLE.get(rule, MEANS.get(rule, {}))}
    with pytest.raises(flk.AdapterError, match="magnitudes='average'"):
        flk.merge(clients, **options)
    asked: dict[str, Any] = {"magnitudes": "average", "dtype": torch.float64, **options}
    nodes = [
        flk.merge(clients[part], weights=drawn.weights[part], **asked)
        for part in (slice(3), slice(3, 4))
    ]
    adapters, weights = zip(*nodes, strict=True)
    root = flk.aggregate(adapters, weights=weights, **asked).adapter.factors
    flat = flk.aggregate(clients, weights=drawn.weights, **asked).adapter.factors
    for module, item in flat.items():
        found, wanted = (x.magnitude for x in (root[module], item))
        assert found is wanted is None if rule == "fedsa" else torch.allclose(found, wanted)
        gap = norm(
            root[module].b @ root[module].a * root[module].scaling - item.b @ item.a * item.scaling
        )
        assert_within(torch.tensor(gap), room(drawn, module), f"{rule}, {module}")
