"""select_rank against the definition of the energy rule."""

import pytest
import torch
from assertions import (
    BadCall,
    assert_compiles,
    assert_refuses,
    assert_same_bits,
    poisoned_memory,
    strided_in_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    CASES,
    DEVICE,
    DTYPES,
    FAMILIES,
    THRESHOLD_RANKS,
    THRESHOLD_VALUES,
    case_id,
)

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

ENERGIES = (1e-9, 0.5, 0.9, 0.99, 1 - 1e-6, 1.0)
EPS = torch.finfo(torch.float64).eps


def values_of(*modules: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values [L, R] and their total energy [L] on the device under test."""
    sigma = torch.tensor(modules, dtype=torch.float64, device=DEVICE)
    return sigma, sigma.square().sum(1)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_as_the_reference(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    _, _, sigma, _ = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    total = sigma.square().sum(1)
    for energy in ENERGIES:
        for cap in (None, 1, 3, 1000):
            expected = reference.select_rank(sigma, total, energy, cap)
            with poisoned_memory():
                ranks = raw.select_rank(sigma.to(DEVICE), total.to(DEVICE), energy, cap)
            assert ranks.device.type == DEVICE.type
            assert ranks.dtype == torch.int64
            assert ranks.tolist() == expected.tolist(), (energy, cap)


@pytest.mark.parametrize("energy", THRESHOLD_RANKS)
def test_exactly_on_the_threshold(energy: float) -> None:
    padded = tuple((*sorted(values, reverse=True), 0.0) for values in THRESHOLD_VALUES)
    sigma, total = values_of(*padded)
    assert raw.select_rank(sigma, total, energy).tolist() == list(THRESHOLD_RANKS[energy])
    assert reference.select_rank(sigma, total, energy).tolist() == list(THRESHOLD_RANKS[energy])


def test_threshold_has_a_width_of_rounding() -> None:
    """4 R eps of the total are forgiven, ten times that is not."""
    sigma, total = values_of((1.0, 1.0, 0.0, 0.0))
    forgiven = 4 * sigma.shape[1] * EPS
    assert raw.select_rank(sigma, total, 0.5).tolist() == [1]
    assert raw.select_rank(sigma, total, 0.5 + forgiven / 2).tolist() == [1]
    assert raw.select_rank(sigma, total, 0.5 + 10 * forgiven).tolist() == [2]


def test_negligible_values_count_as_zero() -> None:
    """lambda = R eps lambda_1 is out, twice that is in, and the total may include it."""
    stacked_rank = 8
    inside = (2 * stacked_rank * EPS) ** 0.5
    outside = (stacked_rank * EPS / 2) ** 0.5
    padding = (0.0,) * (stacked_rank - 3)
    # A large number of them: the threshold asks for more than the leading one holds.
    sigma, total = values_of((1.0, inside, outside, *padding), (1.0, outside, outside, *padding))
    total = total * (1 + 64 * stacked_rank * EPS)
    assert raw.select_rank(sigma, total, 1.0).tolist() == [2, 1]
    assert reference.select_rank(sigma, total, 1.0).tolist() == [2, 1]


def test_zero_update_has_rank_zero_beside_others() -> None:
    sigma, total = values_of((0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    for energy in ENERGIES:
        assert raw.select_rank(sigma, total, energy).tolist() == [0, 1, 0]


def test_at_least_one_and_at_most_the_cap() -> None:
    sigma, total = values_of((1.0, 1.0, 1.0, 1.0))
    assert raw.select_rank(sigma, total, 1e-12).tolist() == [1]
    assert raw.select_rank(sigma, total, 1.0, 2).tolist() == [2]
    assert raw.select_rank(sigma, total, 1.0, 99).tolist() == [4]


def test_values_not_computed() -> None:
    """The total holds energy that the leading values do not: all of them are taken."""
    sigma, total = values_of((3.0, 2.0, 0.0, 0.0))
    assert raw.select_rank(sigma, total + 4.0, 0.9).tolist() == [2]
    assert raw.select_rank(sigma, total + 4.0, 0.5).tolist() == [1]


@pytest.mark.parametrize("exponent", [-150, -100, 0, 100, 150])
def test_magnitudes(exponent: int) -> None:
    sigma, total = values_of((3.0, 2.0, 1.0), (3.0, 3.0, 0.0))
    factor = 10.0**exponent
    expected = raw.select_rank(sigma, total, 0.9).tolist()
    assert raw.select_rank(sigma * factor, total * factor**2, 0.9).tolist() == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=9),
    energy=st.floats(1e-3, 1.0),
    tighter=st.floats(0.0, 1.0),
)
def test_invariants(values: list[float], energy: float, tighter: float) -> None:
    """Monotone in the energy, invariant to powers of two, enough and not more than enough."""
    sigma, total = values_of(tuple(sorted(values, reverse=True)))
    rank = int(raw.select_rank(sigma, total, energy)[0])
    assert rank == int(reference.select_rank(sigma.cpu(), total.cpu(), energy)[0])
    assert rank >= int(raw.select_rank(sigma, total, max(energy * tighter, 1e-6))[0])
    assert rank == int(raw.select_rank(sigma * 1024, total * 1024**2, energy)[0])
    squares = sigma[0].square()
    rounding = 8 * len(values) * EPS * float(total)
    assert float(squares[rank:].sum()) <= (1 - energy) * float(total) + rounding
    if rank > 1:
        assert float(squares[rank - 1 :].sum()) >= (1 - energy) * float(total) - rounding


def test_deterministic_and_strided() -> None:
    sigma, total = values_of((3.0, 2.0, 1.0), (3.0, 3.0, 0.0))
    assert_same_bits(raw.select_rank(sigma, total, 0.9), raw.select_rank(sigma, total, 0.9))
    strided = strided_in_nan(sigma[None])[0]
    assert_same_bits(raw.select_rank(strided, total, 0.9), raw.select_rank(sigma, total, 0.9))


def test_opcheck() -> None:
    sigma, total = values_of((3.0, 2.0, 1.0), (3.0, 3.0, 0.0))
    torch.library.opcheck(raw.select_rank.default, (sigma, total, 0.9))
    torch.library.opcheck(raw.select_rank.default, (sigma, total, 0.9, 2))


def test_compiles() -> None:
    small = values_of((3.0, 2.0, 1.0), (3.0, 3.0, 0.0))
    large = values_of(*((5.0, 4.0, 3.0, 2.0, 1.0),) * 3)
    assert_compiles(ops.select_rank, [(*small, 0.9, 2), (*large, 0.9, 3)])


def bad_calls() -> dict[str, BadCall]:
    sigma = torch.ones(2, 3, dtype=torch.float64)
    total = torch.ones(2, dtype=torch.float64)
    return {
        "sigma_float32": (TypeError, "select_rank", (sigma.float(), total, 0.9)),
        "total_energy_float32": (TypeError, "select_rank", (sigma, total.float(), 0.9)),
        "sigma_of_one_dimension": (ValueError, "select_rank", (sigma[0], total, 0.9)),
        "total_energy_of_one_module": (ValueError, "select_rank", (sigma, total[:1], 0.9)),
        "total_energy_of_two_dimensions": (ValueError, "select_rank", (sigma, total[:, None], 0.9)),
        "no_energy": (ValueError, "select_rank", (sigma, total, 0.0)),
        "energy_negative": (ValueError, "select_rank", (sigma, total, -0.5)),
        "energy_over_1": (ValueError, "select_rank", (sigma, total, 1.0000001)),
        "energy_nan": (ValueError, "select_rank", (sigma, total, float("nan"))),
        "max_rank_0": (ValueError, "select_rank", (sigma, total, 0.9, 0)),
        "max_rank_negative": (ValueError, "select_rank", (sigma, total, 0.9, -3)),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_family_on_the_threshold_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    """The singular values that test_stacked_svd relies on, from the stored factors."""
    batch = FAMILIES["energy_on_threshold"].build(dtype)
    _, _, sigma, _ = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    expected = torch.tensor([sorted(row, reverse=True) for row in THRESHOLD_VALUES])
    quotient = sigma / sigma[:, :1] - expected / expected[:, :1].double()
    assert float(quotient.abs().max()) <= 16 * EPS
