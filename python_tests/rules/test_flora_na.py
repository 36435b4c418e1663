"""FLoRA-NA as a rule: the closest averages, between the SVD floor and FedIT (arXiv 2509.26399)."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import EPS
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
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

FAMILY_DTYPES = (torch.float32, torch.bfloat16)
MIXTURES = tuple(case for case in FAMILY_CASES if case[1] in FAMILY_DTYPES)

ERROR_NOISE = 2e-7
"""sqrt(c R eps) with R = 52: a reported error is the root of a difference of Gram sums."""


@pytest.mark.parametrize("case", MIXTURES, ids=case_id)
def test_between_the_svd_floor_and_fedit(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    closest, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    for module in round_.modules:
        ours, theirs = closest.report[module], plain.report[module]
        magnitude = round_.spread(module)
        noise = ERROR_NOISE * (magnitude / ours.norm if ours.norm else 1.0)
        assert ours.relative_error <= theirs.relative_error + noise
        assert ours.relative_error >= ours.svd_floor - noise


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_update_is_as_good_as_the_dense_minimization(case: str, dtype: torch.dtype) -> None:
    """A joint Newton method on the dense residual finds nothing better (up to its own minima)."""
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("flora_na")
    assert_report(result, round_)
    for module in round_.modules:
        ideal = round_.ideal(module)
        found = norm(update(result.adapter, module) - ideal)
        best = norm(reference.rules.flora_na(*round_.of(module)) - ideal)
        assert found <= best + (1e-3 + 2 * EPS[dtype]) * round_.magnitude(module)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("alphas", [(8, 8, 8), (4, 8, 16)], ids=["equal", "mixed"])
def test_factors_are_averages_of_the_clients(alphas: tuple[float, ...], dtype: torch.dtype) -> None:
    """A_hat in the span of the A_u and B_hat in the span of the B_u, one coefficient a client."""
    round_ = draw(alphas=alphas, dtype=dtype)
    result = round_.aggregate("flora_na").adapter
    for module in round_.modules:
        bs, as_, _, _ = round_.of(module)
        for blocks, found in ((bs, result.factors[module].b), (as_, result.factors[module].a)):
            basis = torch.stack([block.double().flatten() for block in blocks], dim=1)
            target = found.double().flatten()
            fitted = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
            assert float((fitted - target).norm()) <= EPS[dtype] * float(target.norm())


@pytest.mark.parametrize("rslora", [False, True])
def test_common_scaling_stays_in_the_config(rslora: bool) -> None:
    result = draw(alphas=(8, 8, 8), rslora=rslora).aggregate("flora_na").adapter
    assert (result.config["lora_alpha"], result.config["use_rslora"]) == (8, rslora)
    folded = draw(alphas=(4, 8, 16), rslora=rslora).aggregate("flora_na").adapter
    assert {factors.scaling for factors in folded.factors.values()} == {1.0}


def flipped(dtype: torch.dtype, clients: int) -> Federation:
    """The same update in every client, every second one with both factors negated."""
    one = draw(ranks=(4,), alphas=(8,), weights=(1,), dtype=dtype).drawn[0]
    drawn = []
    for k in range(clients):
        sign = -1 if k % 2 else 1
        drawn.append({m: type(x)(sign * x.b, sign * x.a, x.scaling) for m, x in one.items()})
    return federation(drawn, [1.0] * clients)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("clients", [2, 3, 4])
def test_sign_flipped_clients_reach_error_zero(clients: int, dtype: torch.dtype) -> None:
    """FedIT loses the update (all of it for two clients), the surrogate loses nothing."""
    round_ = flipped(dtype, clients)
    result, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    for module in round_.modules:
        ideal = round_.ideal(module)
        error = norm(update(result.adapter, module) - ideal)
        # p and q round once each beside the factors, which are exact multiples of one another.
        assert error <= (1e-7 + EPS[dtype]) * round_.magnitude(module)
        assert result.report[module].relative_error <= ERROR_NOISE
        assert plain.report[module].relative_error > 0.8


@pytest.mark.parametrize("name", ["dominant_client", "badly_scaled_1e2", "independent"])
def test_gains_where_clients_differ_in_scale(name: str) -> None:
    round_ = of_batch(FAMILIES[name].build(torch.float32))
    closest, plain = round_.aggregate("flora_na"), round_.aggregate("fedit")
    assert closest.report.relative_error < 0.95 * plain.report.relative_error


@pytest.mark.parametrize("options", [{"max_sweeps": 0}, {"tol": -1.0}], ids=str)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw().aggregate("flora_na", **options)


def test_more_sweeps_are_never_worse() -> None:
    round_ = draw(**EQUAL_RANK_CASES["wide_stack"])
    errors = [
        round_.aggregate("flora_na", max_sweeps=count).report.relative_error
        for count in (1, 2, 5, 50)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


# one pair for all modules

ADAM = 1e-6
"""What the issue allows above Adam's minimum, a share of the sum of ||dW||^2."""

SHARED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def squared(result: flk.Aggregation, round_: Federation) -> float:
    """The squared errors of all modules, summed."""
    return sum(
        norm(update(result.adapter, module) - round_.ideal(module)) ** 2
        for module in round_.modules
    )


def roundings(round_: Federation, dtype: torch.dtype = torch.float64) -> float:
    """What rounding the factors adds to the sum of squared errors."""
    return sum(
        ((ERROR_NOISE + 2 * EPS[dtype]) * round_.spread(module)) ** 2 for module in round_.modules
    )


def shared_mixture(round_: Federation, result: flk.Aggregation) -> float:
    """How far the factors of all modules are from mixtures of the clients' with common weights."""
    stacks: dict[str, list[list[torch.Tensor]]] = {"b": [], "a": []}
    found: dict[str, list[torch.Tensor]] = {"b": [], "a": []}
    for module in round_.modules:
        bs, as_, scalings, _ = round_.of(module)
        factors = result.adapter.factors[module]
        scaled = [s * b.double().flatten() for b, s in zip(bs, scalings, strict=True)]
        stacks["b"].append(scaled)
        found["b"].append(factors.scaling * factors.b.double().flatten())
        stacks["a"].append([a.double().flatten() for a in as_])
        found["a"].append(factors.a.double().flatten())
    worst = 0.0
    for side, blocks in stacks.items():
        basis = torch.stack([torch.cat(client) for client in zip(*blocks, strict=True)], dim=1)
        target = torch.cat(found[side])
        fitted = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
        worst = max(worst, float((fitted - target).norm() / target.norm()))
    return worst


@pytest.mark.parametrize(
    "case", [case for case in FAMILY_CASES if case[1] in SHARED_DTYPES], ids=case_id
)
def test_a_shared_pair_lies_between_fedit_and_a_pair_per_module(
    case: tuple[str, torch.dtype],
) -> None:
    """The optimum per module is the better of the rule's and least squares that start from the
    shared pair.
    """
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    options = {"dtype": torch.float64}
    shared = squared(round_.aggregate("flora_na", shared=True, **options), round_)
    fedit = squared(round_.aggregate("fedit", **options), round_)
    each = squared(round_.aggregate("flora_na", **options), round_)
    room = roundings(round_)
    assert shared <= fedit + room
    assert shared >= min(each, from_the_shared_pair(round_)) - room


def from_the_shared_pair(round_: Federation) -> float:
    """Every module's own least squares, begun at the pair that all modules share."""
    from fedlora_kernels.ops._surrogate import alternate
    from fedlora_kernels.rules.flora_na import _problem

    grams = flk.Round(round_.adapters, weights=round_.weights).grams
    pair = flk.rules.FLoRANA(shared=True).prepared(grams).pair
    found = 0.0
    for batch in grams:
        start = torch.stack(pair).expand(len(batch.modules), 2, -1)
        problem = _problem(batch).bilinear
        *_, trace = alternate(problem, start, 50, 1e-12)
        found += float(trace[:, -1].sum())
    return found


ADAM_CASES: dict[str, dict[str, Any]] = {
    **{name: EQUAL_RANK_CASES[name] for name in ("mixed_scalings", "odd_rank", "zero_client")},
    "loud_client": {"alphas": (4, 64, 4), "weights": (1, 1, 1)},
    "five_clients": {"ranks": (2,) * 5, "alphas": (2, 4, 8, 2, 2), "weights": (5, 4, 3, 2, 1)},
}


@pytest.mark.parametrize("centered", [False, True], ids=["plain", "around"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ADAM_CASES)
def test_a_shared_pair_is_at_least_as_good_as_adams(
    case: str, dtype: torch.dtype, centered: bool
) -> None:
    round_ = draw(**ADAM_CASES[case], dtype=dtype)
    last = draw(**{**ADAM_CASES[case], "dtype": dtype}, seed=7).adapters[0]
    options: dict[str, Any] = {"around": last} if centered else {}
    result = round_.aggregate("flora_na", shared=True, dtype=torch.float64, **options)
    pairs = [last.factors[module] for module in round_.modules] if centered else None
    dense = reference.rules.flora_na_shared(
        [round_.of(module) for module in round_.modules],
        pairs and [(pair.scaling * pair.b.double(), pair.a) for pair in pairs],
    )
    best = sum(
        norm(found - round_.ideal(module)) ** 2
        for found, module in zip(dense, round_.modules, strict=True)
    )
    total = sum(norm(round_.ideal(module)) ** 2 for module in round_.modules)
    assert squared(result, round_) <= best + ADAM * total
    assert_report(result, round_)


@pytest.mark.parametrize("alphas", [(8, 8, 8), (4, 8, 16)], ids=["equal", "mixed"])
def test_a_shared_pair_is_the_same_in_all_modules(alphas: tuple[float, ...]) -> None:
    round_ = draw(alphas=alphas)
    assert shared_mixture(round_, round_.aggregate("flora_na", shared=True)) <= 1e-6
    assert shared_mixture(round_, round_.aggregate("flora_na")) > 1e-3


@pytest.mark.parametrize("absent", ["zero", "renormalize"])
def test_a_shared_pair_is_never_above_fedit_where_modules_are_absent(absent: str) -> None:
    round_ = draw(**EQUAL_RANK_CASES["absent_modules"])
    shared, plain = (
        round_.aggregate(rule, absent=absent, dtype=torch.float64, **options).report
        for rule, options in (("flora_na", {"shared": True}), ("fedit", {}))
    )
    errors = [
        sum((row.relative_error * row.norm) ** 2 for row in report.values())
        for report in (shared, plain)
    ]
    assert errors[0] <= errors[1] + roundings(round_)


def test_a_shared_pair_for_too_many_clients_is_refused() -> None:
    many = draw(ranks=(1,) * 65, alphas=(1,) * 65, weights=(1,) * 65)
    with pytest.raises(flk.AdapterError, match="65 clients, expected at most 64 for one pair"):
        many.aggregate("flora_na", shared=True)
    assert many.aggregate("flora_na").report


# around the last global adapter


def test_changes_from_the_last_global_adapter_are_what_is_mixed() -> None:
    """The weights of the clients and of the last adapter sum to 1 in both factors."""
    round_ = draw(alphas=(8, 8, 8))
    last = draw(alphas=(8, 8, 8), seed=9).adapters[1]
    result = round_.aggregate("flora_na", around=last, dtype=torch.float64).adapter
    for module in round_.modules:
        bs, as_, _, _ = round_.of(module)
        center, found = last.factors[module], result.factors[module]
        for blocks, first, mixed in ((bs, center.b, found.b), (as_, center.a, found.a)):
            basis = torch.stack([(x - first).double().flatten() for x in blocks], dim=1)
            target = (mixed - first).flatten()
            fitted = basis @ torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
            assert float((fitted - target).norm()) <= 1e-6 * float(target.norm())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", ["mixed_scalings", "equal_scalings", "zero_client", "wide_stack"])
def test_around_is_never_above_fedit(case: str, shared: bool) -> None:
    """Also around what the clients themselves are, which leaves no change to mix."""
    round_ = draw(**EQUAL_RANK_CASES[case])
    plain = squared(round_.aggregate("fedit", dtype=torch.float64), round_)
    for last in (draw(**EQUAL_RANK_CASES[case], seed=9).adapters[0], round_.adapters[0]):
        options: dict[str, Any] = {"around": last, "shared": shared, "dtype": torch.float64}
        found = squared(round_.aggregate("flora_na", **options), round_)
        assert found <= plain + roundings(round_)


def test_around_takes_a_folder_and_what_was_carried(tmp_path: Path) -> None:
    first, second = draw(), draw(seed=3)
    begun = first.aggregate("flora_na", around="last")
    plain = first.aggregate("flora_na")
    for key, tensor in begun.adapter.state_dict().items():
        assert torch.equal(tensor, plain.adapter.state_dict()[key])
    begun.carried.save(tmp_path / "last")
    results = [
        second.aggregate("flora_na", around="last", carried=begun.carried),
        second.aggregate("flora_na", around=begun.adapter),
        second.aggregate("flora_na", around=str(tmp_path / "last")),
    ]
    for result in results[1:]:
        for key, tensor in result.adapter.state_dict().items():
            assert torch.equal(tensor, results[0].adapter.state_dict()[key])
    assert results[1].carried is None
    with pytest.raises(TypeError, match="has no memory"):
        second.aggregate("flora_na", around=begun.adapter, carried=begun.adapter)


def test_around_needs_every_module_on_both_sides() -> None:
    module = "layers.0.down"
    whole, partial = draw(), draw(absent={1: [module]})
    words = rf"the adapter given with `around`, module {module}: is missing"
    for shared in (False, True):
        with pytest.raises(flk.AdapterError, match=words):
            whole.aggregate("flora_na", around=partial.adapters[1], shared=shared)
        with pytest.raises(flk.AdapterError, match=rf"client 1, module {module}: is missing"):
            partial.aggregate("flora_na", around=whole.adapters[0], shared=shared)
