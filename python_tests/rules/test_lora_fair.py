"""LoRA-FAIR: the mean of A beside a corrected mean of B (arXiv 2411.14961)."""

from typing import Any

import pytest
import torch
from assertions import EPS
from federation import (
    EQUAL_RANK_CASES,
    Federation,
    assert_report,
    draw,
    norm,
    of_batch,
    update,
)
from matrices import EQUAL_RANK_CASES as FAMILY_CASES
from matrices import FAMILIES, case_id

from fedlora_kernels import reference
from fedlora_kernels.reference.rules import lora_fair_objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAMILY = [case for case in FAMILY_CASES if case[1] in DTYPES]


def means(
    round_: Federation, module: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """B, A and dW in the clients' own scale, and the scaling that was left out."""
    bs, as_, scalings, weights = round_.of(module)
    common = scalings[0] if len(set(scalings)) == 1 and scalings[0] != 0 else 1.0
    total = sum(weights) or 1.0
    b = sum(w * s / common * b.double() for b, s, w in zip(bs, scalings, weights, strict=True))
    a = sum(w / total * a.double() for a, w in zip(as_, weights, strict=True))
    return torch.as_tensor(b), torch.as_tensor(a), round_.ideal(module) / common, common


def dense(round_: Federation, module: str, **options: Any) -> torch.Tensor:
    bs, as_, scalings, weights = round_.of(module)
    return reference.rules.lora_fair(bs, as_, scalings, weights, **options)


def assert_no_worse(round_: Federation, penalty: float = 0.01) -> None:
    """The cosine's objective is at most what L-BFGS finds on the dense problem."""
    result = round_.aggregate("lora_fair", dtype=torch.float64, penalty=penalty)
    for module in round_.modules:
        b, a, target, common = means(round_, module)
        factors = result.adapter.factors[module]
        step = factors.b.double() - b
        best = dense(round_, module, penalty=penalty) / common @ torch.linalg.pinv(a) - b
        if norm(b @ a) <= 1e-12 * norm(b) * norm(a) or not target.any():
            continue  # without a mean product there is no minimizer
        ours, theirs = (
            float(lora_fair_objective(b + x, a, target, x, penalty)) for x in (step, best)
        )
        scale = round_.spread(module) / norm(round_.ideal(module))
        assert ours <= theirs + 1e-9 * max(1.0, scale), f"{module}: {ours}, dense {theirs}"
        assert norm(factors.a.double() - a) <= 1e-12 * norm(a) + 1e-300


@pytest.mark.parametrize("case", FAMILY, ids=case_id)
def test_the_cosine_is_minimized_on_every_family(case: tuple[str, torch.dtype]) -> None:
    name, dtype = case
    assert_no_worse(of_batch(FAMILIES[name].build(dtype)))


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("alphas", [(8, 8, 8), (4, 8, 16)], ids=["equal", "mixed"])
def test_the_cosine_is_minimized_for_every_penalty(
    alphas: tuple[float, ...], penalty: float
) -> None:
    assert_no_worse(draw(alphas=alphas), penalty)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
@pytest.mark.parametrize("case", FAMILY, ids=case_id)
def test_the_ridge_form_equals_the_normal_equations(
    case: tuple[str, torch.dtype], penalty: float
) -> None:
    name, dtype = case
    round_ = of_batch(FAMILIES[name].build(dtype))
    result = round_.aggregate("lora_fair", form="ridge", penalty=penalty)
    for module in round_.modules:
        expected = dense(round_, module, form="ridge", penalty=penalty)
        _, a, _, _ = means(round_, module)
        factors = result.adapter.factors[module]
        rounding = abs(factors.scaling) * norm(factors.b.double()) * norm(a)
        room = (1e-7 + 2 * EPS[dtype]) * (rounding + round_.spread(module))
        assert norm(update(result.adapter, module) - expected) <= room, module


@pytest.mark.parametrize("form", ["cosine", "ridge"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_report(case: str, dtype: torch.dtype, form: str) -> None:
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    assert_report(round_.aggregate("lora_fair", form=form), round_)


def test_the_ridge_form_is_never_above_fedit() -> None:
    round_ = draw()
    plain = round_.aggregate("fedit").report
    for penalty in (0.0, 0.01, 1.0, 1e6):
        found = round_.aggregate("lora_fair", form="ridge", penalty=penalty).report
        for module in round_.modules:
            assert found[module].relative_error <= plain[module].relative_error + 1e-6


@pytest.mark.parametrize("rslora", [False, True])
def test_common_scaling_stays_in_the_config(rslora: bool) -> None:
    result = draw(alphas=(8, 8, 8), rslora=rslora).aggregate("lora_fair").adapter
    assert {item.scaling for item in result.factors.values()} == {8 / (2 if rslora else 4)}
    folded = draw(alphas=(4, 8, 16), rslora=rslora).aggregate("lora_fair").adapter
    assert {item.scaling for item in folded.factors.values()} == {1.0}


@pytest.mark.parametrize("options", [{"form": "best"}, {"penalty": -1.0}], ids=str)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        draw().aggregate("lora_fair", **options)
