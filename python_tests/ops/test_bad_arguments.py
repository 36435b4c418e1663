"""Bad arguments, and numbers that no dtype holds: one clear error, and nothing is written."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import PRODUCT_RULES, Drawn, Federation, assert_ideal, draw, federation
from refusals import assert_refused

import fedlora_kernels as flk

MODULE = "layers.0.down"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        pytest.param([1.0, 1.0], r"2 weights for 3 clients", id="too_few"),
        pytest.param([1.0] * 4, r"4 weights for 3 clients", id="too_many"),
        pytest.param([], r"0 weights for 3 clients", id="none"),
        pytest.param([1.0, -1.0, 1.0], r"client 1 \(site-1\): weight -1", id="negative"),
        pytest.param([1.0, 1.0, math.nan], r"client 2 \(site-2\): weight nan", id="nan"),
        pytest.param([math.inf, 1.0, 1.0], r"client 0 \(site-0\): weight inf", id="infinite"),
        pytest.param([0.0, 0.0, 0.0], r"all weights are zero", id="all_zero"),
        pytest.param([1.0, "many", 1.0], r"client 1 \(site-1\): weight many", id="text"),
        pytest.param([1.0, 1.0, None], r"client 2 \(site-2\): weight None", id="missing"),
        pytest.param([10**400, 1.0, 1.0], r"client 0 \(site-0\): weight 1000", id="huge"),
    ],
)
def test_weights(weights: list[Any], words: str, sites: list[str]) -> None:
    assert_refused(sites, words, weights=weights)


def test_weights_of_extreme_size() -> None:
    """Sums that overflow or vanish are no reason for NaN."""
    round_ = draw()
    for scale in (1e308, 1e-320):
        result = flk.aggregate(list(round_.adapters), rule="flora", weights=[scale] * 3)
        assert all(x.isfinite().all() for x in result.adapter.state_dict().values())
        assert result.adapter.factors[MODULE].a.any()


def test_no_clients() -> None:
    with pytest.raises(flk.AdapterError, match="no clients"):
        flk.aggregate([], rule="fedit")


def test_unknown_rule_lists_the_rules(sites: list[str]) -> None:
    words = "unknown rule 'fedavg'.*" + ".*".join(flk.rules.names())
    assert_refused(sites, words, error=ValueError, rule="fedavg")


@pytest.mark.parametrize("rule", flk.rules.names())
def test_unknown_option_lists_the_options(rule: str, sites: list[str]) -> None:
    words = rf"rule '{rule}' has no option 'temperature'; its options: "
    assert_refused(sites, words, error=TypeError, rule=rule, temperature=1.0)


@pytest.mark.parametrize(
    "energy",
    [0, 0.0, 1.5, math.nan, -1.0],
    ids=["integer_zero", "zero", "over_one", "nan", "negative"],
)
def test_energy_out_of_range(energy: float, sites: list[str]) -> None:
    assert_refused(sites, "energy", error=ValueError, rule="florist", energy=energy)


@pytest.mark.parametrize("rule", ["florist", "flexlora"])
@pytest.mark.parametrize("rank", [0, -3], ids=["zero", "negative"])
def test_rank_out_of_range(rule: str, rank: int, sites: list[str]) -> None:
    assert_refused(sites, rf"rank.*{rank}", error=ValueError, rule=rule, rank=rank)


@pytest.mark.parametrize("option", ["absent", "precision"])
def test_words_that_mean_nothing(option: str, sites: list[str]) -> None:
    assert_refused(sites, rf"{option}.*'x'", error=ValueError, **{option: "x"})


# Numbers that a dtype cannot hold.


def scaled(dtype: torch.dtype, factor: float, **options: Any) -> Federation:
    """Clients whose factors are ``factor`` times normal."""
    drawn = [
        {
            m: Drawn((x.b * factor).to(dtype), (x.a * factor).to(dtype), x.scaling)
            for m, x in c.items()
        }
        for c in draw(dtype=torch.float64, **options).drawn
    ]
    return federation(drawn)


@pytest.mark.parametrize("rule", ["florist", "flexlora", "flora"])
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 3e3), (torch.float32, 1e30)], ids=str
)
def test_an_aggregate_that_its_dtype_cannot_hold(
    rule: str, dtype: torch.dtype, factor: float
) -> None:
    """Sigma goes into B: singular values overflow where the factors do not."""
    round_ = scaled(dtype, factor)
    if rule == "flora":  # nothing is multiplied
        assert_ideal(round_.aggregate(rule), round_)
        return
    with pytest.raises(flk.AdapterError, match=rf"^module layers.*: .*overflows {dtype}.*wider"):
        round_.aggregate(rule)
    assert_ideal(round_.aggregate(rule, **PRODUCT_RULES[rule], dtype=torch.float64), round_)


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_scaling_whose_square_no_float64_holds(rule: str) -> None:
    """It would make norms infinite or NaN, and every rank zero."""
    round_ = draw(alphas=(8, 1e200, 8), common_a=True)
    words = (
        r"client 1 \(site-1\), module layers.*: scaling \* B A is too large: its square overflows"
    )
    with pytest.raises(flk.AdapterError, match=words):
        round_.aggregate(rule)


@pytest.mark.parametrize("side", ["B", "A"])
def test_factors_whose_squares_no_float64_holds(side: str) -> None:
    round_ = draw(dtype=torch.float64)
    item = round_.drawn[1][MODULE]
    huge = {"B": (1e160 * item.b, item.a), "A": (item.b, 1e160 * item.a)}[side]
    words = rf"client 1 \(site-1\), module {MODULE}: {side} holds .*too large to square"
    with pytest.raises(flk.AdapterError, match=words):
        round_.replaced(1, MODULE, *huge).aggregate("florist")


def test_a_client_whose_scaling_is_too_small_for_the_update(tmp_path: Path) -> None:
    """FlexLoRA divides B by the client's own scaling."""
    result = draw(alphas=(8, 1e-40, 8)).aggregate("flexlora")
    words = r"client 1 \(site-1\), module .* overflows torch.float32 at scaling 2.5e-41"
    with pytest.raises(flk.AdapterError, match=words):
        result.client_adapter(1)
    with pytest.raises(flk.AdapterError, match=words):
        result.save(tmp_path / "global")
    assert list(tmp_path.iterdir()) == []
