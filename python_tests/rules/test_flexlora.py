"""FlexLoRA: the truncated SVD of dW, client k at its own rank (arXiv 2402.11505)."""

from typing import Any

import pytest
import torch
from assertions import EPS, assert_within
from federation import (
    CASES,
    WORKING_DTYPES,
    assert_report,
    draw,
    norm,
    product_bound,
    update,
)

from fedlora_kernels import reference


def assert_best(found: torch.Tensor, ideal: torch.Tensor, rank: int, bound: float) -> None:
    """No rank-p matrix is closer, and the update is the truncation itself where there is a gap."""
    floor = float(reference.rules.svd_floor(ideal, rank))
    assert int(torch.linalg.matrix_rank(found)) <= rank
    assert_within(torch.linalg.matrix_norm(found - ideal), floor + bound, f"rank {rank}")
    values = torch.linalg.svdvals(ideal)
    if rank < len(values) and values[0] > 0:
        gap = float(values[rank - 1] - values[rank])
        expected = reference.rules.truncate(ideal, rank)
        if gap > 0.02 * float(values[0]):
            room = 4 * bound * float(values[0]) / gap
            assert_within(torch.linalg.matrix_norm(found - expected), room, "truncation")


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_global_adapter_is_the_best_of_the_largest_rank(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("flexlora")
    for module in round_.modules:
        largest = max(b.shape[1] for b in round_.of(module)[0])
        rank = min(largest, *round_.ideal(module).shape)
        bound = product_bound(round_, module, dtype)
        assert_best(update(result.adapter, module), round_.ideal(module), rank, bound)
        assert result.adapter.factors[module].scaling == 1.0
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_client_k_receives_its_own_rank_scaling_and_config(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("flexlora")
    for k, client in enumerate(round_.drawn):
        received = result.client_adapter(k)
        assert received.config == round_.adapters[k].config
        assert received.factors.keys() == client.keys()
        for module, drawn in client.items():
            factors = received.factors[module]
            assert factors.scaling == drawn.scaling
            assert factors.b.shape == drawn.b.shape
            assert factors.a.shape == drawn.a.shape
            assert factors.b.dtype == dtype
            rank = min(drawn.b.shape[1], *round_.ideal(module).shape)
            # B is rounded a second time when Sigma is divided by the client's scaling.
            bound = 2 * product_bound(round_, module, dtype)
            assert_best(update(received, module), round_.ideal(module), rank, bound)


@pytest.mark.parametrize("rank", [1, 5, 12, 13, 500])
def test_rank_option(rank: int) -> None:
    round_ = draw(**CASES["wide_mixed_stack"])
    result = round_.aggregate("flexlora", rank=rank)
    for module in round_.modules:
        ideal = round_.ideal(module)
        width = min(rank, 30, *ideal.shape)
        assert result.adapter.factors[module].rank == width
        bound = product_bound(round_, module, torch.float32)
        assert_best(update(result.adapter, module), ideal, width, bound)


def test_a_has_orthonormal_rows_and_b_carries_the_singular_values() -> None:
    round_ = draw()
    result = round_.aggregate("flexlora")
    for module in round_.modules:
        factors = result.adapter.factors[module]
        a, b = factors.a.double(), factors.b.double()
        eye = torch.eye(len(a), dtype=torch.float64)
        assert_within((a @ a.mT - eye).abs().max(), 8 * EPS[torch.float32], "rows of A")
        values = torch.linalg.svdvals(round_.ideal(module))[: len(a)]
        assert_within(
            (b.norm(dim=0) - values).abs().max(), 8 * EPS[torch.float32] * values[0], "Sigma in B"
        )


def test_absent_modules_renormalized() -> None:
    round_ = draw(**CASES["mixed_ranks_absent"])
    result = round_.aggregate("flexlora", absent="renormalize", rank=100)
    for module in round_.modules:
        ideal = round_.ideal(module, renormalize=True)
        error = norm(update(result.adapter, module) - ideal)
        assert error <= 2 * product_bound(round_, module, torch.float32)


def test_ranks_of_every_client_come_from_one_factorization(monkeypatch: Any) -> None:
    """One call of the operator for each batch, however many clients and ranks there are."""
    from fedlora_kernels import ops

    calls = []
    original = ops.spectrum

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "spectrum", counted)
    round_ = draw(**CASES["wide_mixed_stack"])
    result = round_.aggregate("flexlora")
    for k in range(4):
        result.client_adapter(k)
    assert len(calls) == 2  # two sizes of modules
