"""FFA-LoRA: one fixed A, the mean of B (arXiv 2403.12313)."""

import pytest
import torch
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
    Drawn,
    assert_average,
    assert_ideal,
    assert_report,
    draw,
    federation,
)

import fedlora_kernels as flk


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_mean_of_b_beside_the_common_a_is_exact(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype, common_a=True)
    result = round_.aggregate("ffa")
    for module in round_.modules:
        b, _ = round_.means(module)
        assert_average(result.adapter, module, b, round_.of(module)[1][0].double())
        assert torch.equal(result.adapter.factors[module].a, round_.of(module)[1][0])
    assert_ideal(result, round_)
    assert_report(result, round_)


def test_only_b_travels() -> None:
    round_ = draw(common_a=True)
    result = round_.aggregate("ffa")
    assert sorted(result.shared) == sorted(
        f"base_model.model.{module}.lora_B.weight" for module in round_.modules
    )
    b_bytes = sum(item.b.nbytes for item in round_.drawn[0].values())
    assert result.bytes_up == [b_bytes] * 3
    assert result.bytes_down == [b_bytes] * 3


@pytest.mark.parametrize("culprit", [1, 2])
def test_a_client_whose_a_differs_in_one_entry_is_named(culprit: int) -> None:
    round_ = draw(common_a=True)
    module = "layers.0.down"
    old = round_.drawn[culprit][module]
    a = old.a.clone()
    a[1, 7] = torch.nextafter(a[1, 7], torch.tensor(torch.inf))
    with pytest.raises(flk.AdapterError, match=rf"site-{culprit}.*{module}"):
        round_.replaced(culprit, module, old.b, a).aggregate("ffa")


def test_the_same_a_in_different_dtypes_is_the_same() -> None:
    """A bf16 start that one client stored as fp32 is still one A."""
    round_ = draw(common_a=True, dtype=torch.bfloat16, ranks=(4, 4), alphas=(4, 4), weights=(1, 3))
    wide = {
        module: Drawn(item.b.float(), item.a.float(), item.scaling)
        for module, item in round_.drawn[1].items()
    }
    mixed = federation([round_.drawn[0], wide], round_.weights)
    result = mixed.aggregate("ffa")
    assert_ideal(result, mixed)


def test_clients_that_train_a_core_between_fixed_factors() -> None:
    """B C_k A with one B and one A, and sums of two such terms: the mean of the cores is exact."""
    one, two = (draw(common_a=True, alphas=(8, 8, 8), seed=seed).drawn for seed in (0, 1))
    generator = torch.Generator().manual_seed(4)
    drawn, cores = [], []
    for _ in one:
        core = torch.randn(2, 4, 4, generator=generator)
        cores.append(core.double())
        client = {}
        for module, first in one[0].items():
            second = two[0][module]
            b = torch.cat([first.b @ core[0], second.b @ core[1]], dim=1)
            client[module] = Drawn(b, torch.cat([first.a, second.a]), 2.0)
        drawn.append(client)
    weights = (1.0, 2.0, 5.0)
    mean = sum(w / 8 * core for w, core in zip(weights, cores, strict=True))
    result = federation(drawn, weights).aggregate("ffa").adapter
    for module, first in one[0].items():
        terms = zip((first, two[0][module]), torch.as_tensor(mean), strict=True)
        expected = sum(2 * x.b.double() @ core @ x.a.double() for x, core in terms)
        torch.testing.assert_close(result.delta(module), expected, rtol=1e-5, atol=1e-4)
