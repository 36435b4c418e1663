"""HetLoRA: zero-padded means, weighted by the norms of the updates (arXiv 2401.06432)."""

import pytest
import torch
from assertions import EPS, EXACT_PRODUCT, assert_within
from federation import CASES, WORKING_DTYPES, Federation, assert_average, assert_report, draw, norm
from federation import update as update_of

PRESENT = [case for case in CASES if "absent" not in case]


def padded_means(
    round_: Federation, module: str, norm_weighted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_k v_k [s_k B_k | 0] and sum_k v_k [A_k ; 0], v_k ~ w_k ||s_k B_k A_k|| or w_k."""
    bs, as_, scalings, weights = round_.of(module)
    if norm_weighted:
        norms = [
            w * abs(s) * norm(b.double() @ a.double())
            for b, a, s, w in zip(bs, as_, scalings, weights, strict=True)
        ]
        if sum(norms) > 0:
            weights = [value / sum(norms) for value in norms]
    widest = max(b.shape[1] for b in bs)
    mean_b = torch.zeros(bs[0].shape[0], widest, dtype=torch.float64)
    mean_a = torch.zeros(widest, as_[0].shape[1], dtype=torch.float64)
    for b, a, s, w in zip(bs, as_, scalings, weights, strict=True):
        mean_b[:, : b.shape[1]] += w * s * b.double()
        mean_a[: a.shape[0]] += w * a.double()
    return mean_b, mean_a


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("norm_weighted", [True, False])
@pytest.mark.parametrize("case", PRESENT)
def test_global_adapter(case: str, norm_weighted: bool, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("hetlora", norm_weighted=norm_weighted)
    for module in round_.modules:
        assert_average(result.adapter, module, *padded_means(round_, module, norm_weighted))
    assert_report(result, round_)


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", PRESENT)
def test_client_k_takes_its_first_rows_and_columns(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**CASES[case], dtype=dtype)
    result = round_.aggregate("hetlora")
    for k, client in enumerate(round_.drawn):
        received = result.client_adapter(k)
        assert received.config == round_.adapters[k].config
        assert received.factors.keys() == client.keys()
        for module, drawn in client.items():
            rank = drawn.b.shape[1]
            b, a = padded_means(round_, module, norm_weighted=True)
            b, a = b[:, :rank], a[:rank]
            factors = received.factors[module]
            assert (factors.rank, factors.scaling) == (rank, drawn.scaling)
            # B is rounded a second time when it is divided by the client's scaling.
            bound = (EXACT_PRODUCT + 2 * EPS[dtype]) * norm(b) * norm(a)
            error = torch.linalg.matrix_norm(update_of(received, module) - b @ a)
            assert_within(error, bound, f"client {k}, {module}")


def test_norm_weighting_follows_the_norms_and_not_the_ranks() -> None:
    """A client with ten times the update gets ten times the weight."""
    round_ = draw(weights=(1, 1, 1), alphas=(4, 4, 4))
    module = "layers.0.down"
    loud = round_.drawn[2][module]
    round_ = round_.replaced(2, module, 10 * loud.b, loud.a)
    bs, as_, _, _ = round_.of(module)
    norms = torch.tensor([norm(b.double() @ a.double()) for b, a in zip(bs, as_, strict=True)])
    shares = norms.double() / norms.double().sum()
    expected = sum(float(v) * a.double() for v, a in zip(shares, as_, strict=True))
    found = round_.aggregate("hetlora").adapter.factors[module].a.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = round_.aggregate("hetlora", norm_weighted=False).adapter.factors[module].a.double()
    assert norm(plain - expected) > 0.1 * norm(expected)


@pytest.mark.parametrize("norm_weighted", [True, False])
def test_absent_modules_renormalized(norm_weighted: bool) -> None:
    round_ = draw(**CASES["mixed_ranks_absent"])
    result = round_.aggregate("hetlora", absent="renormalize", norm_weighted=norm_weighted)
    for module in round_.modules:
        b, a = padded_means(round_, module, norm_weighted)
        total = 1.0 if norm_weighted else sum(round_.of(module)[3])
        assert_average(result.adapter, module, b / total, a / total)
