"""What every rule must satisfy, on drawn federations."""

import weakref
from dataclasses import asdict
from typing import Any

import pytest
import torch
from assertions import EPS, assert_within
from federation import (
    AVERAGING_RULES,
    BY_HOLDERS,
    FIXED_A,
    PRODUCT_RULES,
    WORKING_DTYPES,
    Drawn,
    Federation,
    assert_ideal,
    assert_report,
    draw,
    federation,
    norm,
    product_bound,
    update,
    whole_update,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlora_kernels as flk

EXAMPLES = 12
MODULE = "net.0.q"

sides = st.integers(1, 24)
alphas = st.sampled_from((1.0, 2.0, 3.0, 8.0, 16.0))
weights = st.sampled_from((1.0, 2.0, 5.0, 17.0, 100.0))
dtypes = st.sampled_from(WORKING_DTYPES)


@st.composite
def rounds(draws: st.DrawFn, equal_ranks: bool = False) -> Federation:
    """One to four clients of two modules, m != n, ranks from 1 to beyond m and n."""
    count = draws(st.integers(1, 4))
    ranks = draws(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    m = draws(sides)
    n = draws(sides.filter(lambda side: side != m))
    return draw(
        ranks=[ranks[0]] * count if equal_ranks else ranks,
        alphas=draws(st.lists(alphas, min_size=count, max_size=count)),
        weights=draws(st.lists(weights, min_size=count, max_size=count)),
        sizes={MODULE: (m, n), "net.1.v": (n, m)},
        dtype=draws(dtypes),
        rslora=draws(st.booleans()),
        seed=draws(st.integers(0, 10_000)),
    )


def rounds_for(rule: str) -> st.SearchStrategy[Federation]:
    return rounds(equal_ranks=rule in AVERAGING_RULES)


def product_of(rule: str, round_: Federation) -> flk.Aggregation:
    return round_.aggregate(rule, **PRODUCT_RULES[rule])


def assert_same_updates(one: flk.Aggregation, other: flk.Aggregation, round_: Federation) -> None:
    """Equal whole updates up to the rounding of both results' factors."""
    for module in round_.modules:
        gap = torch.linalg.matrix_norm(whole_update(one, module) - whole_update(other, module))
        bound = 2 * product_bound(round_, module, round_.dtype, one.rule.name)
        assert_within(gap, bound, f"{module}: two results")


@settings(max_examples=EXAMPLES)
@given(st.data())
@pytest.mark.parametrize("rule", PRODUCT_RULES)
def test_product_rules_give_the_ideal_update(rule: str, data: st.DataObject) -> None:
    round_ = data.draw(rounds_for(rule))
    result = product_of(rule, round_)
    assert_ideal(result, round_)
    assert_report(result, round_)


def gauged(round_: Federation, exact: bool, seed: int) -> Federation:
    """A_k -> Q A_k and B_k -> B_k Q^-1 with another invertible Q for each client and module.

    Exact: Q is a signed permutation times powers of two, which no dtype rounds.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for client in round_.drawn:
        changed = {}
        for module, item in client.items():
            r = item.a.shape[0]
            order = torch.randperm(r, generator=generator)
            powers = 2.0 ** torch.randint(-3, 4, (r,), generator=generator)
            signs = torch.randint(0, 2, (r,), generator=generator) * 2.0 - 1
            q = torch.diag(powers * signs)[order].double()
            if not exact:
                q = q @ torch.linalg.qr(torch.randn(r, r, generator=generator).double()).Q
            b, a = item.b.double() @ torch.linalg.inv(q), q @ item.a.double()
            changed[module] = Drawn(b.to(item.b.dtype), a.to(item.a.dtype), item.scaling)
        drawn.append(changed)
    return federation(drawn, round_.weights)


@settings(max_examples=EXAMPLES)
@given(st.data())
@pytest.mark.parametrize("rule", PRODUCT_RULES)
def test_gauge_changes_nothing(rule: str, data: st.DataObject) -> None:
    """The choice of basis inside a client's factors is not information."""
    round_ = data.draw(rounds_for(rule))
    exact = round_.dtype == torch.bfloat16
    other = gauged(round_, exact, seed=data.draw(st.integers(0, 99)))
    for module in round_.modules:
        moved = norm(round_.ideal(module) - other.ideal(module))
        assert moved <= (1e-12 if exact else EPS[torch.float32]) * other.magnitude(module)
    one, two = product_of(rule, round_), product_of(rule, other)
    for module in round_.modules:
        gap = torch.linalg.matrix_norm(whole_update(one, module) - whole_update(two, module))
        bound = product_bound(round_, module, round_.dtype, rule)
        bound += 2 * product_bound(other, module, round_.dtype, rule)
        assert_within(gap, bound, f"{module}: gauge")


@settings(max_examples=EXAMPLES)
@given(st.data())
@pytest.mark.parametrize(
    "rule",
    [*PRODUCT_RULES, "fedit", "fedsa", "hetlora", "flora_na", "raflora", "rbla", "lora_fair"],
)
def test_order_of_clients_changes_nothing(rule: str, data: st.DataObject) -> None:
    round_ = data.draw(rounds_for(rule))
    order = data.draw(st.permutations(range(len(round_.drawn))))
    other = federation([round_.drawn[k] for k in order], [round_.weights[k] for k in order])
    options = PRODUCT_RULES.get(rule, {})
    one, two = round_.aggregate(rule, **options), other.aggregate(rule, **options)
    if rule != "flora_na":  # two starts may be equally good
        assert_same_updates(one, two, round_)
    for module in round_.modules:
        first, second = one.report[module], two.report[module]
        noise = 1e-6 * round_.scale(module, rule) / first.norm if first.norm else 0.0
        assert first.rank == second.rank
        assert abs(first.relative_error - second.relative_error) <= noise
        assert abs(first.svd_floor - second.svd_floor) <= noise


@settings(max_examples=EXAMPLES)
@given(st.data())
@pytest.mark.parametrize("rule", [*PRODUCT_RULES, "fedit", "hetlora", "rbla"])
def test_splitting_a_client_in_two_halves_changes_nothing(rule: str, data: st.DataObject) -> None:
    round_ = data.draw(rounds_for(rule))
    k = data.draw(st.integers(0, len(round_.drawn) - 1))
    shares = list(round_.weights)
    shares[k] /= 2
    other = federation([*round_.drawn, round_.drawn[k]], [*shares, shares[k]])
    # Of the norms alone, without n_k, two halves of a client are two clients.
    options = PRODUCT_RULES.get(rule, {"example_weighted": True} if rule == "hetlora" else {})
    assert_same_updates(round_.aggregate(rule, **options), other.aggregate(rule, **options), round_)


@settings(max_examples=EXAMPLES)
@given(round_=rounds())
def test_florist_flexlora_and_flora_agree_with_the_dense_update(round_: Federation) -> None:
    results = {rule: product_of(rule, round_) for rule in ("flora", "flexlora", "florist")}
    for module in round_.modules:
        ideal = round_.ideal(module)
        for rule, result in results.items():
            error = torch.linalg.matrix_norm(update(result.adapter, module) - ideal)
            assert_within(error, product_bound(round_, module, round_.dtype), f"{rule}, {module}")


@settings(max_examples=EXAMPLES)
@given(round_=rounds(), energy=st.sampled_from((0.3, 0.6, 0.9, 0.99, 1.0)))
def test_error_squared_and_captured_energy_make_the_whole(
    round_: Federation, energy: float
) -> None:
    """||dW - dW_p||^2 + ||dW_p||^2 = ||dW||^2 for a truncated SVD, dense and as reported."""
    result = round_.aggregate("florist", energy=energy)
    for module, row in result.report.items():
        ideal, found = round_.ideal(module), update(result.adapter, module)
        total = norm(ideal) ** 2
        room = product_bound(round_, module, round_.dtype) * norm(ideal)
        assert abs(norm(ideal - found) ** 2 + norm(found) ** 2 - total) <= 4 * room
        assert abs(row.energy * row.norm**2 - norm(found) ** 2) <= 4 * room
        assert row.energy >= energy - 1e-9


@settings(max_examples=EXAMPLES)
@given(round_=rounds(), factor=st.sampled_from((1e-3, 0.25, 7.0, 1000.0)))
def test_only_ratios_of_weights_count(round_: Federation, factor: float) -> None:
    scaled = Federation(round_.drawn, round_.adapters, tuple(factor * w for w in round_.weights))
    assert_same_updates(product_of("florist", round_), product_of("florist", scaled), round_)


@pytest.mark.parametrize("rule", flk.rules.names())
def test_clients_are_not_changed_and_results_repeat_bit_for_bit(rule: str) -> None:
    round_ = draw(common_a=rule in FIXED_A)
    one, two = round_.aggregate(rule), round_.aggregate(rule)
    first, second = one.adapter.state_dict(), two.adapter.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.report == two.report
    for client, drawn in zip(round_.adapters, draw(common_a=rule in FIXED_A).drawn, strict=True):
        for module, item in drawn.items():
            assert torch.equal(client.factors[module].b, item.b)
            assert torch.equal(client.factors[module].a, item.a)


GLOBAL_RULES = [rule for rule in flk.rules.names() if rule not in ("fedsa", *BY_HOLDERS)]


@pytest.mark.skipif(flk.backends.backend() != "cpu", reason="the C++ core's promise")
@pytest.mark.parametrize("rule", flk.rules.names())
def test_threads_change_no_bit(rule: str) -> None:
    """On modules large enough for several threads of the C++ core."""
    sizes = {f"layers.{layer}.q": (300, 260) for layer in range(6)}
    adapters = draw(ranks=(12,) * 8, alphas=(12,) * 8, weights=(1,) * 8, sizes=sizes,
                    common_a=True).adapters  # fmt: skip
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(flk.aggregate(adapters, rule=rule).adapter.factors)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for module, factors in other.items():
            assert torch.equal(factors.b, found[0][module].b)
            assert torch.equal(factors.a, found[0][module].a)


@pytest.mark.parametrize("rule", GLOBAL_RULES)
def test_module_of_one_client_alone_gets_its_share(rule: str) -> None:
    """An absent module is a zero update: what remains is w_k s_k B_k A_k, of rank r_k."""
    alone = "layers.0.down"
    round_ = draw(absent={0: [alone], 2: [alone]}, common_a=rule in FIXED_A)
    # With one norm over all modules, the share of one depends on the others.
    by_examples = {"per_module": True, "example_weighted": True} if rule == "hetlora" else {}
    result = round_.aggregate(rule, **PRODUCT_RULES.get(rule, by_examples))
    ideal = 0.2 * round_.drawn[1][alone].update()
    error = norm(whole_update(result, alone) - round_.ideal(alone))
    assert norm(ideal - round_.ideal(alone)) <= 1e-12 * norm(ideal)
    assert error <= product_bound(round_, alone, torch.float32, rule)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", [*PRODUCT_RULES, "fedit", "flora_na"])
def test_dtype_of_the_result(rule: str, dtype: torch.dtype | None) -> None:
    """A wider dtype is asked for to lose nothing: factors are rounded to it and not before."""
    round_ = draw(dtype=torch.bfloat16)
    result = round_.aggregate(rule, dtype=dtype, **PRODUCT_RULES.get(rule, {}))
    given_dtype = torch.bfloat16 if dtype is None else dtype
    for module in round_.modules:
        factors = result.adapter.factors[module]
        assert (factors.b.dtype, factors.a.dtype) == (given_dtype, given_dtype)
    if rule in PRODUCT_RULES:
        assert_ideal(result, round_)


@pytest.mark.parametrize("rule", ["flora", "flexlora", "florist", "fedit", "fedex", "hetlora"])
def test_uniform_rank_pads_without_a_change(rule: str) -> None:
    sizes: dict[str, Any] = {"a.q": (24, 17), "a.down": (3, 40), "b.q": (24, 17)}
    round_ = draw(sizes=sizes)
    plain = round_.aggregate(rule)
    padded = round_.aggregate(rule, uniform_rank=True)
    widest = max(factors.rank for factors in plain.adapter.factors.values())
    assert {factors.rank for factors in padded.adapter.factors.values()} == {widest}
    assert padded.adapter.config["rank_pattern"] == {}
    assert padded.adapter.config["r"] == widest
    for module in round_.modules:
        assert torch.equal(whole_update(padded, module), whole_update(plain, module)) or norm(
            whole_update(padded, module) - whole_update(plain, module)
        ) <= 1e-12 * round_.magnitude(module)


AVERAGING = ("fedit", "ffa", "fedsa", "flora", "hetlora", "rolora", "lora_a2", "rbla", "fedrot")
"""Rules whose coefficients of a batch need no Gram matrix: they are computed for the report, and
before the first batch is solved where the modules depend on each other.
"""

MANY_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "florist": [{"energies": (0.5, 0.9)}, {"rank_budget": 7}],
    "flexlora": [{"uniform_rank": True}],
    "fedex": [{}, {"residual_rank": 2}],
}


@pytest.mark.parametrize(
    ("rule", "options"),
    [(rule, options) for rule in flk.rules.names() for options in MANY_OPTIONS.get(rule, [{}])],
    ids=str,
)
def test_batches_of_one_module_give_the_same(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many modules' Gram matrices fit at a time, also where the modules compete: those of
    one batch are held at a time, and computed anew for the report.
    """
    round_ = draw(common_a=rule in FIXED_A)
    together = round_.aggregate(rule, **options)
    assert together.report
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    whole = flk.ops.gram_list

    def counted(*arguments: Any, **more: Any) -> torch.Tensor:
        nonlocal most
        gram = whole(*arguments, **more)
        alive.append(weakref.ref(gram))
        most = max(most, sum(found() is not None for found in alive))
        return gram

    monkeypatch.setattr(flk.ops, "gram_list", counted)
    monkeypatch.setattr("fedlora_kernels.gram_space.batches.GRAM_BYTES", 0)
    monkeypatch.setattr("fedlora_kernels._round.KEPT", 0)
    alone = round_.aggregate(rule, **options)
    later = rule in AVERAGING or (rule, options) == ("fedex", {})
    passes = len(alive)
    first = alone.rule.joint and rule not in (
        "rolora",
        "lora_a2",
    )  # which look at the factors themselves
    assert passes == 3 * 2 * (first + (not later))
    assert alone.report
    assert len(alive) == passes + 3 * 2 * later
    assert most == 2
    assert_same_updates(together, alone, round_)
    for one, other in zip(together.curve, alone.curve, strict=True):
        assert asdict(one) == pytest.approx(asdict(other))
    for module in round_.modules:
        first, second = together.report[module], alone.report[module]
        assert together.adapter.factors[module].rank == alone.adapter.factors[module].rank
        assert first.rank == second.rank
        assert first.relative_error == pytest.approx(second.relative_error, abs=1e-7)
        assert first.svd_floor == pytest.approx(second.svd_floor, abs=1e-7)
