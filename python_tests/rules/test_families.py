"""Every rule on every matrix family that it admits, in every dtype, beside its dense reference.

Rules with options, memory or clients of a special kind have a test of this kind in their own files.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from assertions import EPS
from federation import (
    AVERAGING_RULES,
    PRODUCT_RULES,
    Federation,
    assert_ideal,
    assert_report,
    norm,
    of_batch,
    product_bound,
    update,
    whole_update,
    with_common,
)
from matrices import CASES, FAMILIES, case_id

import fedlora_kernels as flk
from fedlora_kernels import reference

Compare = Callable[[Federation, flk.Aggregation], None]


def exact(round_: Federation, result: flk.Aggregation) -> None:
    """The ideal update."""
    assert_ideal(result, round_)


def averages(round_: Federation, result: flk.Aggregation) -> None:
    """The update of FedIT, FFA or truncated FedEx, up to the rounding of the factors."""
    dense = getattr(reference.rules, result.rule.name)
    options = {"residual_rank": CUT} if result.residual is not None else {}
    for module in round_.modules:
        expected = dense(*round_.of(module), **options)
        room = (1e-9 + 4 * EPS[round_.dtype]) * round_.spread(module)
        if not options:
            assert norm(update(result.adapter, module) - expected) <= room, module
            continue
        ideal = round_.ideal(module)  # any best residual of this rank will do
        found = norm(ideal - whole_update(result, module))
        assert abs(found - norm(ideal - expected)) <= room, module


def personal(round_: Federation, result: flk.Aggregation) -> None:
    """Every client's B beside the mean of A; the report is about their mean."""
    updates = {}
    for module in round_.modules:
        terms = round_.of(module)
        expected = reference.rules.fedsa(*terms)
        for k, dense in enumerate(expected):
            received = result.client_adapter(k)
            assert torch.equal(received.factors[module].b, terms[0][k])
            room = (1e-9 + 4 * EPS[round_.dtype]) * norm(terms[0][k].double()) * abs(terms[2][k])
            room *= sum(w * norm(a.double()) for a, w in zip(terms[1], terms[3], strict=True))
            assert norm(update(received, module) - dense) <= room, f"client {k}, {module}"
        updates[module] = torch.stack(
            [w * dense for dense, w in zip(expected, terms[3], strict=True)]
        ).sum(0)
    assert_report(result, round_, updates)


def truncations(round_: Federation, result: flk.Aggregation) -> None:
    """No update of the rank is closer to dW, and of FLoRIST no smaller rank holds the energy."""
    for module in round_.modules:
        ideal, row = round_.ideal(module), result.report[module]
        room = product_bound(round_, module, round_.dtype)
        error = norm(ideal - update(result.adapter, module))
        assert error <= float(reference.rules.svd_floor(ideal, row.rank)) + room, module
        if result.rule.name == "flexlora":
            for k, dense in enumerate(reference.rules.flexlora(*round_.of(module))):
                found = norm(ideal - update(result.client_adapter(k), module))
                assert found <= norm(ideal - dense) + 2 * room, f"client {k}, {module}"
            continue
        allowed = 0.1**0.5 * norm(ideal)
        noise = room + 1e-6 * round_.magnitude(module)
        assert error <= allowed + noise
        if row.rank > 1:
            assert float(reference.rules.svd_floor(ideal, row.rank - 1)) >= allowed - noise


def closest(round_: Federation, result: flk.Aggregation) -> None:
    """As near to dW as a joint Newton method on the dense residual comes."""
    for module in round_.modules:
        ideal = round_.ideal(module)
        best = norm(ideal - reference.rules.flora_na(*round_.of(module)))
        found = norm(ideal - update(result.adapter, module))
        room = (1e-9 + 4 * EPS[round_.dtype]) * round_.spread(module)
        assert found <= best + 1e-3 * round_.magnitude(module) + room, module


CUT = 2
"""The rank of FedEx' residual where it is cut."""

COMPARED: Mapping[tuple[str, str], Compare] = {
    ("fedit", ""): averages,
    ("ffa", ""): averages,
    ("fedsa", ""): personal,
    ("flora", "exact"): exact,
    ("flexlora", "exact"): exact,
    ("flexlora", ""): truncations,
    ("florist", "exact"): exact,
    ("florist", ""): truncations,
    ("fedex", "exact"): exact,
    ("fedex", "cut"): averages,
    ("flora_na", ""): closest,
}
"""Rule and setting -> what its result is compared with."""


@pytest.mark.parametrize(("rule", "setting"), COMPARED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_dense_reference(case: tuple[str, torch.dtype], rule: str, setting: str) -> None:
    name, dtype = case
    family = FAMILIES[name]
    round_ = of_batch(family.build(dtype))
    if rule in AVERAGING_RULES and not family.equal_ranks:
        with pytest.raises(flk.AdapterError, match="hetlora"):
            round_.aggregate(rule)
        return
    if rule == "ffa":
        round_ = with_common(round_, "a")
    settings = {"exact": PRODUCT_RULES.get(rule, {}), "cut": {"residual_rank": CUT}, "": {}}
    result = round_.aggregate(rule, **settings[setting])
    COMPARED[rule, setting](round_, result)
    if rule != "fedsa":
        assert_report(result, round_)


@pytest.mark.parametrize("rule", ["hetlora", "raflora", "rbla", "lora_fair"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_report(case: tuple[str, torch.dtype], rule: str) -> None:
    """Rules whose updates are compared in their own files."""
    name, dtype = case
    if rule not in AVERAGING_RULES or FAMILIES[name].equal_ranks:
        round_ = of_batch(FAMILIES[name].build(dtype))
        assert_report(round_.aggregate(rule), round_)


def test_every_rule_is_compared_here_or_in_its_own_file(request: pytest.FixtureRequest) -> None:
    here = request.path.parent
    for rule in flk.rules.names():
        if not any(rule == known for known, _ in COMPARED):
            text = (here / f"test_{rule}.py").read_text(encoding="utf-8")
            assert "FAMILIES[name].build(dtype)" in text, rule
            assert "reference.rules." in text or "assert_exact" in text, rule
