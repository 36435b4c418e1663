"""Attacks: what each robust rule stops, within its file's bound, and what none of them stops."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import ATTACKS, Attacked, attacked, points
from federation import FIXED_A, Drawn, Federation, federation, update

import fedlora_kernels as flk
from fedlora_kernels.adapters.error import AdapterError

PAGE = Path(__file__).parents[2] / "docs" / "robust.md"

FLOAT32 = 1e-5
"""Of ||dW||: what rounding the result's factors to the clients' float32 leaves."""


def clip(robust: flk.Robust, a: Attacked) -> float:
    norms = a.points.norm(dim=1)
    limit = float(norms.median())
    over = (a.shares * (norms - limit).clamp_min(0))[a.honest].sum()
    return a.share * (limit + float(a.mean.norm())) + float(over)


def krum(robust: Any, a: Attacked) -> float:
    count = len(a.points)
    assumed = (count - 3) // 2 if robust.attackers is None else robust.attackers
    keep = 1 if robust.name == "krum" else count - assumed - 2
    scores = []
    for k in a.honest:
        squares = sorted(float((a.points[k] - x).square().sum()) for x in a.points)[1:]
        scores.append(sum(squares[: count - assumed - 2]))
    return math.sqrt(sorted(scores)[keep - 1] / (count - 2 * assumed - 2)) + a.radius


def geometric_median(robust: flk.Robust, a: Attacked) -> float:
    return 2 * (1 - a.share) / (1 - 2 * a.share) * a.radius * (1 + 1e-5)  # of the smoothing


def trimmed(robust: Any, a: Attacked) -> float:
    if robust.by == "neighbors":
        return a.diameter + a.radius
    return a.radius * (1 + 4 * (1 - a.share) / (1 - 2 * a.share)) * (1 + 1e-5)


BOUNDS = {
    "clip": clip,
    "krum": krum,
    "multi_krum": krum,
    "geometric_median": geometric_median,
    "trimmed": trimmed,
}
MOST = {"clip": 4, "krum": 3, "multi_krum": 3, "geometric_median": 4, "trimmed": 4}
"""Attackers among 9 clients that each robust rule can bear."""

EVERY = [*(flk.robust.make(name) for name in flk.robust.names()), flk.robust.Trimmed(by="center")]


def result_of(found: Attacked, rule: str = "florist", **options: Any) -> flk.Aggregation:
    more = {"energy": 1.0} if rule == "florist" else {}
    return found.round_.aggregate(rule, **more, **options)


def point(result: flk.Aggregation, round_: Federation) -> torch.Tensor:
    """The result's update of all modules as one row."""
    return torch.cat([update(result.adapter, module).flatten() for module in round_.modules])


def distance(result: flk.Aggregation, found: Attacked) -> float:
    """||result - h|| / ||h||."""
    away = point(result, found.round_) - found.mean
    return float(away.norm() / found.mean.norm())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("robust", EVERY, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_the_honest_mean_is_recovered_within_the_bound(
    robust: flk.Robust, attack: str, seed: int
) -> None:
    for attackers in {0, 1, 3, MOST[robust.name]}:
        if attackers > MOST[robust.name]:
            continue
        found = attacked(attack, attackers, seed=seed)
        bound = BOUNDS[robust.name](robust, found) / float(found.mean.norm())
        assert distance(result_of(found, robust=robust), found) <= bound + FLOAT32


def test_without_a_robust_rule_the_attacks_work() -> None:
    """Three of nine: the mean is off by more than an honest client is."""
    for attack in ATTACKS:
        found = attacked(attack, 3)
        assert distance(result_of(found), found) * float(found.mean.norm()) > found.radius


@pytest.mark.parametrize("robust", EVERY, ids=repr)
def test_without_attackers_the_mean_stays_near(robust: flk.Robust) -> None:
    found = attacked("collude", 0)
    assert distance(result_of(found, robust=robust), found) * float(found.mean.norm()) <= (
        found.radius * 1.01
    )


@pytest.mark.parametrize("robust", EVERY, ids=repr)
@pytest.mark.parametrize("rule", flk.rules.names())
def test_every_rule_takes_the_weights(rule: str, robust: flk.Robust) -> None:
    """The result is that of clients which were scaled by hand, with the weights by hand."""
    found = attacked("scale by 100", 2, common_a=rule in FIXED_A)
    if robust.name == "clip" and flk.rules.find(rule).sends == "a":
        with pytest.raises(ValueError, match="scales B, and rule 'fedsa' aggregates A alone"):
            result_of(found, rule, robust=robust)
        return
    options = {}
    if robust.name == "geometric_median" and flk.rules.make(rule).reweighs:
        with pytest.raises(ValueError, match="weighs clients by itself"):
            result_of(found, rule, robust=robust)
        options = {"norm_weighted": False}
    result = result_of(found, rule, robust=robust, **options)
    weighing = result.weighing
    assert weighing is not None
    assert weighing.robust == robust
    scaled = [
        {name: Drawn(x.b, x.a, x.scaling * scale) for name, x in client.items()}
        for client, scale in zip(found.round_.drawn, weighing.scales, strict=True)
    ]
    by_hand = federation(scaled, weighing.weights)
    expected = by_hand.aggregate(rule, **({"energy": 1.0} if rule == "florist" else {}), **options)
    mine, theirs = point(result, found.round_), point(expected, by_hand)
    assert float((mine - theirs).norm()) <= FLOAT32 * max(1.0, float(theirs.norm()))
    if result.rule.personal:  # its B is zero
        for module, item in expected.adapter.factors.items():
            assert torch.allclose(result.adapter.factors[module].a, item.a, rtol=1e-6)
    for module, row in expected.report.items():
        assert result.report[module].norm == pytest.approx(row.norm, rel=1e-9)
        assert result.report[module].relative_error == pytest.approx(
            row.relative_error, rel=1e-6, abs=1e-7
        )
    if result.delivery.differs:
        for k, adapter in enumerate(found.round_.adapters):
            assert result.client_adapter(k).config == adapter.config


def test_the_report_says_who_counted_how_much(tmp_path: Path) -> None:
    found = attacked("scale by 100", 2)
    result = result_of(found, robust=flk.robust.MultiKrum(attackers=2, keep=3))
    assert result.report.weighing is result.weighing
    rows = {client.name: client for client in result.report.weighing.clients}
    assert list(rows) == [f"site-{k}" for k in range(9)]
    assert rows["site-0"].weight == rows["site-1"].weight == 0
    assert sum(row.weight > 0 for row in rows.values()) == 3
    assert [row.given for row in rows.values()] == pytest.approx(found.shares.tolist())
    result.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text())["robust"]
    assert written["name"] == "multi_krum"
    assert written["options"] == {"attackers": 2, "keep": 3}
    assert [client["weight"] for client in written["clients"]] == result.weighing.weights
    plain = result_of(found)
    assert plain.weighing is None
    assert plain.report.weighing is None


def test_one_round_serves_several_rules() -> None:
    found = attacked("send noise", 2)
    round_ = flk.Round(found.round_.adapters, weights=found.round_.weights)
    several = round_.aggregate(["florist", "fedit"], robust="trimmed")
    assert [result.rule.name for result in several] == ["florist", "fedit"]
    weighed = round_.weighed("trimmed")
    for module, row in weighed.aggregate("florist").report.items():
        assert row == several[0].report[module]
    with pytest.raises(ValueError, match="was weighed already, by trimmed"):
        weighed.weighed("krum")
    plain = round_.aggregate("florist")
    fresh = found.round_.aggregate("florist")
    for module, item in fresh.adapter.factors.items():
        assert torch.equal(item.b, plain.adapter.factors[module].b)
    shares = [client.weight for client in weighed.inspect().clients]
    assert shares == weighed.weighing.weights


@pytest.mark.parametrize("options", [{}, {"memory_limit": 1}, {"absent": "renormalize"}])
def test_rounds_in_little_memory_and_absent_modules(options: dict[str, Any]) -> None:
    found = attacked("scale by 100", 2)
    drawn = [dict(client) for client in found.round_.drawn]
    del drawn[4]["layers.0.down"], drawn[0]["layers.1.attn.q"]
    some = federation(drawn, found.round_.weights)
    dense = points(some)
    for name in flk.robust.names():
        result = some.aggregate("florist", energy=1.0, robust=name, **options)
        assert [client.norm for client in result.weighing.clients] == pytest.approx(
            dense.norm(dim=1).tolist(), rel=1e-9
        )
        if name in ("krum", "multi_krum", "trimmed"):
            assert result.weighing.weights[:2] == [0, 0]
        if "absent" not in options:
            counted = zip(result.weighing.weights, result.weighing.scales, dense, strict=True)
            wanted = sum(w * c * row for w, c, row in counted)
            assert float((point(result, some) - wanted).norm()) <= FLOAT32 * float(wanted.norm())


def test_heads_and_biases_use_the_weights() -> None:
    found = attacked("scale by 100", 2)
    key = "base_model.model.classifier.weight"
    heads = [torch.full((3, 2), 1000.0 if k < 2 else float(k)) for k in range(9)]
    round_ = federation(
        found.round_.drawn, found.round_.weights, extras=[{key: head} for head in heads]
    )
    for name in flk.robust.names():
        result = round_.aggregate("florist", robust=name)
        wanted = sum(w * h for w, h in zip(result.weighing.weights, heads, strict=True))
        assert torch.allclose(result.adapter.extras[key], wanted, rtol=1e-5)
    clipped = round_.aggregate("florist", robust="clip")
    assert float(clipped.adapter.extras[key].max()) > 100  # clipping leaves heads as they are


def test_rules_with_memory_take_the_weights() -> None:
    found = attacked("scale by 100", 2)
    for rule in ("eclora", "fedrot"):
        first = found.round_.aggregate(rule, robust="trimmed")
        second = found.round_.aggregate(rule, robust="trimmed", carried=first.carried)
        assert second.weighing.weights == first.weighing.weights
        by_hand = flk.aggregate(
            found.round_.adapters,
            rule=rule,
            weights=second.weighing.weights,
            carried=first.carried,
        )
        difference = point(second, found.round_) - point(by_hand, found.round_)
        assert float(difference.norm()) <= FLOAT32 * float(found.mean.norm())


# ---- what none of them stops -------------------------------------------------------------------


@pytest.mark.parametrize("robust", EVERY, ids=repr)
def test_a_colluding_majority_wins(robust: flk.Robust) -> None:
    """Five of nine with one update: the result is nearer to theirs than to the honest mean."""
    found = attacked("collude", 5)
    row = point(result_of(found, robust=robust), found.round_)
    assert float((row - found.points[0]).norm()) < float((row - found.mean).norm())


def test_given_weights_are_believed_where_they_count() -> None:
    """One attacker that claims nearly all examples moves the geometric median, and not Krum."""
    found = attacked("collude", 1)
    claimed = Federation(found.round_.drawn, found.round_.adapters, (1e6, *[1.0] * 8))
    for name, believed in (("geometric_median", True), ("krum", False), ("trimmed", False)):
        weights = claimed.aggregate("florist", robust=name).weighing.weights
        assert (weights[0] > 0.99) == believed
        assert (weights[0] == 0) == (not believed)


def test_small_deviations_pass() -> None:
    """An attacker that stays as near to the others as honest clients do counts like them."""
    found = attacked("flip signs", 0)
    near = {name: Drawn(x.b, x.a, 0.9 * x.scaling) for name, x in found.round_.drawn[0].items()}
    round_ = federation([near, *found.round_.drawn[1:]], found.round_.weights)
    for name in ("clip", "geometric_median"):
        weighing = round_.aggregate("florist", robust=name).weighing
        assert weighing.weights[0] > 0.5 * float(found.shares[0])


def test_factors_of_an_ordinary_product_spoil_an_average() -> None:
    """B / 1e4 and 1e4 A have the product B A, so no weight changes; the result of a rule that sees
    products alone does not either, and the average of the A's is the attacker's.
    """
    found = attacked("flip signs", 0)
    odd = {
        name: Drawn(x.b / 1e4, x.a * 1e4, x.scaling) for name, x in found.round_.drawn[0].items()
    }
    moved = Attacked(federation([odd, *found.round_.drawn[1:]], found.round_.weights), ())
    for robust in (flk.robust.Clip(), flk.robust.GeometricMedian()):
        before = result_of(found, robust=robust)
        after = result_of(moved, robust=robust)
        assert after.weighing.weights == pytest.approx(before.weighing.weights, rel=1e-4)
        assert distance(after, found) <= distance(before, found) + 1e-4
        assert distance(result_of(moved, "fedit", robust=robust), found) > 10


# ---- what is refused ---------------------------------------------------------------------------


def test_nan_is_refused_by_name() -> None:
    found = attacked("send noise", 1)
    bad = found.round_.adapters[0].factors["layers.0.down"].b
    bad[0, 0] = math.nan
    for name in flk.robust.names():
        with pytest.raises(
            AdapterError, match=r"client 0 \(site-0\), module layers.0.down: B holds"
        ):
            result_of(found, robust=name)


def test_an_update_too_large_is_refused_by_name() -> None:
    found = attacked("send noise", 0)
    huge = {
        name: Drawn(1e150 * x.b.double(), 1e10 * x.a.double(), x.scaling)
        for name, x in found.round_.drawn[0].items()
    }
    round_ = federation([huge, *found.round_.drawn[1:]], [1e-100, *found.round_.weights[1:]])
    with pytest.raises(AdapterError, match=r"client 0 \(site-0\).*overflows float64"):
        round_.aggregate("florist", robust="krum")


def test_too_few_clients_are_refused() -> None:
    found = attacked("send noise", 1, 6)
    for robust, needed in (
        (flk.robust.Krum(attackers=2), "attackers=2 needs at least 2 * attackers + 3 clients"),
        (flk.robust.MultiKrum(attackers=2), "attackers=2 needs at least 2 * attackers + 3 clients"),
        (flk.robust.MultiKrum(attackers=1, keep=4), "keeps at most 3, found keep=4"),
        (flk.robust.Trimmed(attackers=3), "attackers=3 needs at least 2 * attackers + 1 clients"),
    ):
        with pytest.raises(
            AdapterError, match=re.escape(f"6 clients of positive weight: {robust.name}")
        ):
            result_of(found, robust=robust)
        with pytest.raises(AdapterError, match=re.escape(needed)):
            result_of(found, robust=robust)
    with pytest.raises(AdapterError, match="2 clients of positive weight: krum"):
        flk.aggregate(found.round_.adapters[:2], rule="florist", robust="krum")


def test_bad_options_are_refused() -> None:
    robust = flk.robust
    with pytest.raises(ValueError, match="unknown robust rule 'median'; expected one of krum"):
        robust.make("median")
    with pytest.raises(TypeError, match="robust rule 'krum' has no option 'keep'; its options: at"):
        robust.make("krum", keep=2)
    with pytest.raises(TypeError, match=r"fields of the robust rule: Krum\(attackers=\.\.\.\)"):
        robust.make(robust.Krum(), attackers=2)
    for bad, said in (
        (lambda: robust.Clip(norm=0.0), "norm must be a finite number > 0, found 0.0"),
        (lambda: robust.Clip(norm=math.nan), "norm must be a finite number > 0, found nan"),
        (lambda: robust.Krum(attackers=-1), "attackers must not be negative, found -1"),
        (lambda: robust.MultiKrum(keep=0), "keep must be at least 1, found 0"),
        (lambda: robust.Trimmed(by="mean"), "by must be neighbors or center, found 'mean'"),
        (lambda: robust.GeometricMedian(smoothing=0.0), r"smoothing must lie in \(0, 1\)"),
        (lambda: robust.GeometricMedian(tol=-1.0), "tol must not be negative"),
        (lambda: robust.GeometricMedian(max_steps=0), "max_steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


def test_vera_needs_its_projections() -> None:
    from vera import vera_clients

    with pytest.raises(AdapterError, match="VeRA vectors without their projections"):
        flk.aggregate(vera_clients(projections=False), rule="fedsa", robust="trimmed")


# ---- the page ----------------------------------------------------------------------------------


def test_the_pages_table_is_what_the_attacks_give() -> None:
    """docs/robust.md, ||result - h|| / ||h|| with 3 attackers of 9: to a few percent, since
    backends round differently.
    """
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("<!-- attacks -->") : text.index("<!-- end -->")]
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in table.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert rows[0][1:] == [*ATTACKS, "no attack"]
    written = {row[0].strip("`"): list(map(float, row[1:])) for row in rows[1:]}
    assert written == {
        name: [pytest.approx(value, rel=0.05, abs=5e-4) for value in values]
        for name, values in measured().items()
    }


def measured() -> dict[str, list[float]]:
    """The table's numbers."""
    every = {"none": None, **{name: flk.robust.make(name) for name in flk.robust.names()}}
    rounds = [*(attacked(attack, 3) for attack in ATTACKS), attacked("collude", 0)]
    return {
        name: [distance(result_of(found, robust=robust), found) for found in rounds]
        for name, robust in every.items()
    }


if __name__ == "__main__":
    print("| robust |", " | ".join([*ATTACKS, "no attack"]), "|")
    for robust_name, numbers in measured().items():
        print(f"| `{robust_name}` |", " | ".join(f"{x:.2g}" for x in numbers), "|")
