"""The inner products and every robust rule's weights, against dense updates in float64."""

import itertools
import math

import pytest
import torch
from attacks import ATTACKS, attacked, points
from federation import CASES, Drawn, Federation, draw, federation, of_batch
from matrices import FAMILIES, normal

import fedlora_kernels as flk
from fedlora_kernels import reference
from fedlora_kernels.gram_space import batches
from fedlora_kernels.gram_space import wide as wide_grams
from fedlora_kernels.gram_space.updates import ROUNDING, Updates

EPS = torch.finfo(torch.float64).eps
PRODUCT_TERMS = 8.0
"""c of c R eps N_j N_k on an inner product, N_k = s_k sum_i ||b_ki|| ||a_ki|| over all modules."""
MEDIAN = 1e-6
"""Between the weights of two ways to the geometric median: what L-BFGS leaves."""


def lengths(round_: Federation) -> torch.Tensor:
    """N_k, [K]."""
    return torch.tensor(
        [
            sum(
                abs(x.scaling) * float((x.b.double().norm(dim=0) * x.a.double().norm(dim=1)).sum())
                for x in client.values()
            )
            for client in round_.drawn
        ],
        dtype=torch.float64,
    )


def stacked_rank(round_: Federation) -> int:
    return max(sum(c[m].a.shape[0] for c in round_.drawn if m in c) for m in round_.modules)


def assert_products(round_: Federation, found: torch.Tensor) -> None:
    expected = reference.robust.products(points(round_))
    sizes = lengths(round_)
    bound = PRODUCT_TERMS * stacked_rank(round_) * EPS * sizes[:, None] * sizes[None, :]
    assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_inner_products_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    for dtype in family.dtypes:
        round_ = of_batch(family.build(dtype))
        found = flk.Round(round_.adapters).updates.products
        assert_products(round_, found)
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("in_runs", [False, True])
def test_inner_products_per_module_and_summed(
    case: str, wide: bool, in_runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(batches, "is_wide", lambda stacked_rank, size: True)
    if in_runs:
        monkeypatch.setattr(wide_grams, "RUN", 5)
    drawn = draw(**CASES[case], seed=3)
    round_ = flk.Round(drawn.adapters)
    assert_products(drawn, round_.updates.products)
    per_module = round_.client_products()
    assert list(per_module) == drawn.modules
    for module, found in per_module.items():
        one = [{n: x for n, x in client.items() if n == module} for client in drawn.drawn]
        assert_products(Federation(tuple(one), (), drawn.weights), found)


def expected(robust: flk.Robust, dense: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reference's weights, with the defaults that the documentation states."""
    count, name = len(dense), robust.name
    if name == "clip":
        return weights
    if name == "krum":
        return reference.robust.krum(dense, (count - 3) // 2)
    if name == "multi_krum":
        attackers = (count - 3) // 2
        return reference.robust.multi_krum(dense, weights, attackers, count - attackers - 2)
    if name == "geometric_median":
        return reference.robust.geometric_median(dense, weights)
    assert isinstance(robust, flk.robust.Trimmed)
    return reference.robust.trimmed(dense, weights, (count - 1) // 2, robust.by)


EVERY = [*(flk.robust.make(name) for name in flk.robust.names()), flk.robust.Trimmed(by="center")]


@pytest.mark.parametrize("robust", EVERY, ids=repr)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("clients", [5, 9, 10])
def test_weights_are_those_of_dense_updates(robust: flk.Robust, attack: str, clients: int) -> None:
    found = attacked(attack, 1, clients)
    weighed = flk.Round(found.round_.adapters, weights=found.round_.weights).weighed(robust)
    assert weighed.weighing is not None
    wanted = expected(robust, found.points, found.shares)
    assert torch.allclose(
        torch.tensor(weighed.weighing.weights, dtype=torch.float64), wanted, atol=MEDIAN
    )
    scales = torch.tensor(weighed.weighing.scales, dtype=torch.float64)
    factors = reference.robust.clip(found.points) if robust.name == "clip" else torch.ones(clients)
    assert torch.allclose(scales, factors.double(), rtol=1e-12)
    norms = [client.norm for client in weighed.weighing.clients]
    assert torch.allclose(
        torch.tensor(norms, dtype=torch.float64), found.points.norm(dim=1), rtol=1e-12
    )


def test_every_robust_rule_is_compared() -> None:
    assert {robust.name for robust in EVERY} == set(flk.robust.names())


@pytest.mark.parametrize("norm", [0.5, 40.0, 1e9])
def test_clipping_to_a_number(norm: float) -> None:
    found = attacked("scale by 100", 2)
    weighed = flk.Round(found.round_.adapters).weighed("clip", norm=norm)
    scales = torch.tensor(weighed.weighing.scales, dtype=torch.float64)
    assert torch.allclose(scales, reference.robust.clip(found.points, norm), rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_geometric_median_is_a_minimum(seed: int) -> None:
    """Its sum of distances is no larger than the reference's, also where it is one of the points
    (three of them around an obtuse angle), far from the start, or close to an attacker.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 3 + seed
    dense = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    if seed % 2:
        dense[0] *= 1e6
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    updates = Updates(dense @ dense.mT, [str(k) for k in range(count)])
    mix = updates.geometric_median(weights)
    assert math.isclose(float(mix.sum()), 1)
    best = (dense - reference.robust.median_point(dense, weights)).norm(dim=1)
    ours = (dense - mix @ dense).norm(dim=1)
    assert float(weights @ ours) <= float(weights @ best) * (1 + 1e-6)
    assert torch.allclose(updates.distances(mix), ours, rtol=1e-9)


@pytest.mark.parametrize("size", [1e2, 1e8, 1e16, 1e60, 1e140])
def test_a_far_client_takes_no_digits_from_the_others(size: float) -> None:
    """Weights of float64 clients do not change with an attacker's size, once it is far away."""
    found = attacked("collude", 1, 7)
    first = {
        name: Drawn(size * x.b.double(), x.a.double(), x.scaling)
        for name, x in found.round_.drawn[0].items()
    }
    others = [
        {name: Drawn(x.b.double(), x.a.double(), x.scaling) for name, x in client.items()}
        for client in found.round_.drawn[1:]
    ]
    round_ = federation([first, *others])
    dense, ones = points(round_), torch.ones(7, dtype=torch.float64)
    median = reference.robust.median_point(dense[1:] / 100, ones[1:])
    for name in flk.robust.names():
        found_weights = flk.Round(round_.adapters).weighed(name).weighing.weights
        weights = torch.tensor(found_weights, dtype=torch.float64)
        if name == "clip":
            continue
        assert float(weights[0]) <= 10 / size
        point = (weights[1:] / weights[1:].sum()) @ dense[1:]
        assert float((point / 100 - median).norm()) <= 2 * found.radius / 100


def test_equal_clients_have_no_distance() -> None:
    """Rounding between equal clients is under ROUNDING; then all count as before."""
    one = attacked("collude", 0, 1).round_.drawn[0]
    for count in (1, 2, 3, 8):
        round_ = federation([one] * count, [1.0 + k for k in range(count)])
        updates = flk.Round(round_.adapters).updates
        assert not updates.squared_distances.any()
        shares = flk.Round(round_.adapters, weights=round_.weights).weights
        for robust in (flk.robust.Clip(), flk.robust.GeometricMedian()):
            result = round_.aggregate("florist", robust=robust)
            assert torch.allclose(
                torch.tensor(result.weighing.weights, dtype=torch.float64), shares
            )
            assert result.weighing.scales == [1.0] * count


def test_distances_are_as_exact_as_stated() -> None:
    """Two clients that differ by a share of their norm, down to what float64 resolves."""
    generator = torch.Generator().manual_seed(0)
    b, a = normal(generator, 64, 8), normal(generator, 8, 48)
    change = normal(generator, 64, 8)
    for share in (1e-2, 1e-4, 1e-6):
        drawn = [{"m.0.q": Drawn(b + x * change, a, 1.0)} for x in (0.0, share)]
        dense = points(Federation(tuple(drawn), (), (1.0, 1.0)))
        true = float((dense[0] - dense[1]).square().sum())
        updates = flk.Round(federation(drawn).adapters).updates
        allowed = ROUNDING * float(updates.products.diagonal().sum())
        assert abs(float(updates.squared_distances[0, 1]) - true) <= allowed


def test_zero_clients_are_points_like_others() -> None:
    found = attacked("collude", 0, 7)
    zero = {
        name: Drawn(torch.zeros_like(x.b), x.a, x.scaling)
        for name, x in found.round_.drawn[0].items()
    }
    some = federation([zero, *found.round_.drawn[1:]])
    for name in flk.robust.names():
        weighed = flk.Round(some.adapters).weighed(name).weighing
        assert weighed.scales[0] == 1
        assert weighed.clients[0].norm == 0
    for name in ("krum", "multi_krum", "trimmed"):
        assert flk.Round(some.adapters).weighed(name).weighing.weights[0] == 0
    nothing = federation([zero] * 7)
    for name in flk.robust.names():
        result = nothing.aggregate("florist", robust=name)
        assert sum(result.weighing.weights) == pytest.approx(1)
        assert all(row.norm == 0 for row in result.report.values())


def test_a_client_of_weight_0_takes_no_part() -> None:
    found = attacked("scale by 100", 3, 8)
    adapters = found.round_.adapters
    weights = [0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 1.0, 1.0]
    for name in flk.robust.names():
        all_ = flk.Round(adapters, weights=weights).weighed(name).weighing
        rest = flk.Round(adapters[3:], weights=weights[3:]).weighed(name).weighing
        assert all_.weights[:3] == [0, 0, 0]
        assert all_.weights[3:] == pytest.approx(rest.weights, rel=1e-9)
        assert all_.scales == [1.0] * 3 + rest.scales


def test_the_order_of_the_clients_changes_nothing() -> None:
    found = attacked("collude", 2, 7)
    for name in flk.robust.names():
        base = found.round_.aggregate("florist", robust=name).weighing
        for order in itertools.islice(itertools.permutations(range(7)), 0, 5040, 1117):
            adapters = [found.round_.adapters[k] for k in order]
            weights = [found.round_.weights[k] for k in order]
            moved = flk.Round(adapters, weights=weights).weighed(name).weighing
            assert [base.weights[k] for k in order] == pytest.approx(moved.weights, rel=1e-6)
            assert [base.scales[k] for k in order] == pytest.approx(moved.scales, rel=1e-9)


@pytest.mark.parametrize("robust", EVERY, ids=repr)
@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_single_precision_weighs_as_double_does(
    robust: flk.Robust, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where clients differ by less than float32 sums can tell, as they do late in training."""
    monkeypatch.setattr("attacks.OWN", share)
    adapters = attacked("collude", 0, 7).round_.adapters
    exact, fast = (flk.Round(adapters, precision=name) for name in ("exact", "fast"))
    assert torch.equal(fast.updates.products, exact.updates.products)
    expected_weighing = exact.weighed(robust).weighing
    assert fast.weighed(robust).weighing == expected_weighing
    assert fast.aggregate("florist", robust=robust).weighing == expected_weighing
