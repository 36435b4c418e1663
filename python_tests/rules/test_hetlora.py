"""HetLoRA: zero-padded means, weighted by the norms of the updates (arXiv 2401.06432)."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import EPS, EXACT_PRODUCT, assert_within
from federation import (
    CASES,
    WORKING_DTYPES,
    Federation,
    assert_average,
    assert_report,
    draw,
    federation,
    norm,
    of_batch,
    product_bound,
)
from federation import update as update_of
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

from fedlora_kernels import reference

OPTIONS: list[dict[str, Any]] = [
    {},
    {"per_module": True},
    {"example_weighted": True},
    {"per_module": True, "example_weighted": True},
    {"norm_weighted": False},
]
DTYPES = (*WORKING_DTYPES, torch.float16, torch.float64)


def client_norms(round_: Federation) -> list[float]:
    """||dW_k|| over all modules."""
    return [
        math.sqrt(sum(norm(item.update()) ** 2 for item in client.values()))
        for client in round_.drawn
    ]


def shares(round_: Federation, module: str, options: dict[str, Any]) -> list[float]:
    """v_k of the clients that have the module, from the dense updates."""
    own = [w / sum(round_.weights) for w in round_.weights]
    present = [k for k, client in enumerate(round_.drawn) if module in client]
    if not options.get("norm_weighted", True):
        return [own[k] for k in present]
    counted = own if options.get("example_weighted") else [float(w > 0) for w in own]
    if options.get("per_module"):
        sizes = [norm(c[module].update()) if module in c else 0.0 for c in round_.drawn]
        counted = [c if k in present else 0.0 for k, c in enumerate(counted)]
        whole = sum(own[k] for k in present)
    else:
        sizes, whole = client_norms(round_), 1.0
    weighted = [c * size for c, size in zip(counted, sizes, strict=True)]
    weighted = weighted if sum(weighted) > 0 else counted
    return [whole * weighted[k] / (sum(weighted) or 1.0) for k in present]


def padded_means(
    round_: Federation, module: str, options: dict[str, Any], renormalize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k v_k [s_k B_k | 0] and sum_k v_k [A_k ; 0] / sum_k v_k."""
    bs, as_, scalings, _ = round_.of(module)
    weights = shares(round_, module, options)
    total = sum(weights) or 1.0
    if renormalize:
        weights, total = [w / total for w in weights], 1.0
    widest = max(b.shape[1] for b in bs)
    mean_b = torch.zeros(bs[0].shape[0], widest, dtype=torch.float64)
    mean_a = torch.zeros(widest, as_[0].shape[1], dtype=torch.float64)
    for b, a, s, w in zip(bs, as_, scalings, weights, strict=True):
        mean_b[:, : b.shape[1]] += w * s * b.double()
        mean_a[: a.shape[0]] += w / total * a.double()
    return mean_b, mean_a


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_global_adapter(case: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("hetlora", **options)
    for module in round_.modules:
        assert_average(result.adapter, module, *padded_means(round_, module, options))
    assert_report(result, round_)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case[1] in DTYPES], ids=case_id)
def test_families_equal_the_reference(
    case: tuple[str, torch.dtype], options: dict[str, Any]
) -> None:
    """Client k's update, on every hard stack."""
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    result = round_.aggregate("hetlora", **options)
    given_options = {k: v for k, v in options.items() if k != "per_module"}
    norms = None if options.get("per_module") else client_norms(round_)
    for module in round_.modules:
        expected = reference.rules.hetlora(*round_.of(module), norms=norms, **given_options)
        means = padded_means(round_, module, options)
        for k, dense in enumerate(expected):
            found = update_of(result.client_adapter(k), module)
            # B is rounded a second time when it is divided by the client's scaling.
            bound = (EXACT_PRODUCT + 3 * EPS[dtype]) * norm(means[0]) * norm(means[1])
            assert_within(torch.linalg.matrix_norm(found - dense), bound, f"client {k}, {module}")


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_client_k_takes_its_first_rows_and_columns(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("hetlora")
    for k, client in enumerate(round_.drawn):
        received = result.client_adapter(k)
        assert received.config == round_.adapters[k].config
        assert received.factors.keys() == client.keys()
        for module, drawn in client.items():
            rank = drawn.b.shape[1]
            b, a = padded_means(round_, module, {})
            b, a = b[:, :rank], a[:rank]
            factors = received.factors[module]
            assert (factors.rank, factors.scaling) == (rank, drawn.scaling)
            # B is rounded a second time when it is divided by the client's scaling.
            bound = (EXACT_PRODUCT + 2 * EPS[dtype]) * norm(b) * norm(a)
            error = torch.linalg.matrix_norm(update_of(received, module) - b @ a)
            assert_within(error, bound, f"client {k}, {module}")


@pytest.mark.parametrize("options", [{}, {"per_module": True}], ids=str)
def test_numbers_of_examples_do_not_count_and_the_report_says_so(
    options: dict[str, Any], tmp_path: Path
) -> None:
    results = [
        draw(weights=weights).aggregate("hetlora", **options)
        for weights in ((50, 20, 30), (1, 1, 1), (3, 900, 1))
    ]
    for one, other in itertools.pairwise(results):
        for module, factors in one.adapter.factors.items():
            assert torch.equal(factors.b, other.adapter.factors[module].b)
            assert torch.equal(factors.a, other.adapter.factors[module].a)
    assert "numbers of examples) were not used" in results[0].report.note
    results[0].save(tmp_path / "global")
    written = json.loads((tmp_path / "global" / "report.json").read_text())
    assert written["note"] == results[0].report.note


@pytest.mark.parametrize("options", [{"example_weighted": True}, {"norm_weighted": False}], ids=str)
def test_numbers_of_examples_count_where_that_is_asked_for(options: dict[str, Any]) -> None:
    one, other = (
        draw(weights=weights).aggregate("hetlora", **options) for weights in ((5, 2, 3), (1, 1, 1))
    )
    for module, factors in one.adapter.factors.items():
        assert norm(factors.a - other.adapter.factors[module].a) > 0.05 * norm(factors.a)
    assert one.report.note == ""


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_client_of_weight_zero_is_absent(options: dict[str, Any]) -> None:
    """Also where every update is zero, and only what is left counts."""
    for zero in ((), (0, 1, 2)):
        drawn = draw(weights=(3, 0, 1), zero=zero)
        less = federation([drawn.drawn[0], drawn.drawn[2]], [3, 1]).aggregate("hetlora", **options)
        for module, factors in drawn.aggregate("hetlora", **options).adapter.factors.items():
            assert norm(factors.a - less.adapter.factors[module].a) <= 1e-6 * norm(factors.a)
            assert norm(factors.b - less.adapter.factors[module].b) <= 1e-6 * norm(factors.b)


def test_clients_count_equally_where_every_update_is_zero() -> None:
    drawn = draw(zero=(0, 1, 2))
    for module, factors in drawn.aggregate("hetlora").adapter.factors.items():
        expected = torch.stack([client[module].a for client in drawn.drawn]).mean(0)
        assert norm(factors.a - expected) <= 4 * EPS[torch.float32] * norm(expected)


def test_one_weight_follows_the_norm_over_all_modules() -> None:
    """A client that is loud in one module counts more in every module."""
    round_ = draw(weights=(1, 1, 1), alphas=(4, 4, 4))
    loud, quiet = "layers.0.down", "layers.0.attn.q"
    item = round_.drawn[2][loud]
    round_ = round_.replaced(2, loud, 100 * item.b, item.a)
    own = round_.drawn[2][quiet].a.double()
    whole = round_.aggregate("hetlora").adapter.factors[quiet].a.double()
    alone = round_.aggregate("hetlora", per_module=True).adapter.factors[quiet].a.double()
    assert norm(whole - own) < 0.1 * norm(own)
    assert norm(alone - own) > 0.5 * norm(own)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    split=st.integers(0, 2),
    part=st.sampled_from((0.5, 0.25, 0.01)),
    per_module=st.booleans(),
)
def test_splitting_a_client_changes_nothing_where_examples_count(
    seed: int, split: int, part: float, per_module: bool
) -> None:
    """And something where they do not: two halves of a client are two clients."""
    drawn = draw(ranks=(4, 2, 3), seed=seed)
    weights = list(drawn.weights)
    weights[split] *= part
    rest = drawn.weights[split] - weights[split]
    other = federation([*drawn.drawn, drawn.drawn[split]], [*weights, rest])
    for examples in (True, False):
        options = {"example_weighted": examples, "per_module": per_module}
        one, two = (item.aggregate("hetlora", **options).adapter for item in (drawn, other))
        for module in drawn.modules:
            gap = norm(update_of(one, module) - update_of(two, module))
            bound = 2 * product_bound(drawn, module, torch.float32, "hetlora")
            assert gap <= bound if examples else gap > bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_absent_modules_renormalized(options: dict[str, Any]) -> None:
    round_ = draw(**CASES["mixed_ranks_absent"])
    result = round_.aggregate("hetlora", absent="renormalize", **options)
    for module in round_.modules:
        assert_average(result.adapter, module, *padded_means(round_, module, options, True))
