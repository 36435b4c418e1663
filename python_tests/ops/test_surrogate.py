"""surrogate against a joint dense minimization of the same distance."""

import pytest
import torch
from assertions import (
    EPS,
    SPECTRUM_TERMS,
    BadCall,
    assert_compiles,
    assert_refuses,
    assert_same_bits,
    assert_within,
    poisoned_memory,
    strided_in_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DEVICE, EQUAL_RANK_CASES, FAMILIES, Batch, case_id

from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

MARGIN = 1e-5
"""Share of ||dW||^2 that 50 alternating sweeps may still be above the minimum."""

CONVERGED = 1e-9
"""The same after 1000 sweeps."""

Surrogate = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def arguments(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Float64 Gram matrices, weights and scalings on the device under test."""
    gram_b, gram_a = reference.gram(batch.b, rows=False), reference.gram(batch.a, rows=True)
    return tuple(x.to(DEVICE) for x in (gram_b, gram_a, batch.weights, batch.scalings))


def distance(batch: Batch, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f(p, q) [L] from dense matrices, and the rounding to expect of it in Gram space."""
    b_hat = torch.einsum(
        "lk,lmkr->lmr", q * batch.scalings, batch.b.double().unflatten(2, (batch.clients, -1))
    )
    a_hat = torch.einsum("lk,lkrn->lrn", p, batch.a.double().unflatten(1, (batch.clients, -1)))
    size = torch.linalg.matrix_norm(b_hat) * torch.linalg.matrix_norm(a_hat) + batch.magnitude()
    rounding = SPECTRUM_TERMS * batch.stacked_rank * EPS[torch.float64] * size.square()
    return (batch.dense() - b_hat @ a_hat).square().sum((1, 2)), rounding


def assert_surrogate(batch: Batch, result: Surrogate) -> None:
    """What holds for any solver and any number of sweeps."""
    p, q, objective = (part.cpu() for part in result)
    assert p.dtype == q.dtype == objective.dtype == torch.float64
    assert p.shape == q.shape == (batch.modules, batch.clients)
    assert bool(torch.isfinite(p).all())
    assert bool(torch.isfinite(q).all())
    assert bool((objective[:, 1:] <= objective[:, :-1]).all()), "the objective rises"
    assert_within((p.norm(dim=1) - q.norm(dim=1)).abs(), 1e-12 * p.norm(dim=1), "|p| = |q|")

    mean = batch.weights.expand(batch.modules, -1)
    fedit, rounding = distance(batch, mean, mean)
    assert_within((objective[:, 0] - fedit).abs(), rounding, "FedIT's objective")
    achieved, rounding = distance(batch, p, q)
    assert_within((objective[:, -1] - achieved).abs(), rounding, "the objective at p and q")
    rank = batch.ranks[0]
    floor = reference.rules.svd_floor(batch.dense(), rank).square()
    assert_within(floor - objective[:, -1], rounding, "below the SVD floor")


@pytest.mark.parametrize("case", EQUAL_RANK_CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    with poisoned_memory():
        result = raw.surrogate(*arguments(batch))
    assert_surrogate(batch, result)
    expected = reference.surrogate(*(x.cpu() for x in arguments(batch)))[2][:, -1]
    _, rounding = distance(batch, *(part.cpu() for part in result[:2]))
    excess = result[2][:, -1].cpu() - expected
    assert_within(excess, MARGIN * batch.dense().square().sum((1, 2)) + rounding, "the minimum")


@pytest.mark.parametrize(
    "name",
    [
        "independent",
        "zero_client",
        "duplicate_clients",
        "rank_deficient",
        "badly_scaled_1e2",
        "badly_scaled_1e6",
        "tiny_times_huge",
    ],
)
def test_many_sweeps_reach_the_minimum(name: str) -> None:
    sweeps = 1000
    batch = FAMILIES[name].build(torch.float64)
    result = raw.surrogate(*arguments(batch), sweeps, 0.0)
    assert result[2].shape == (batch.modules, sweeps + 1)
    assert_surrogate(batch, result)
    expected = reference.surrogate(*(x.cpu() for x in arguments(batch)))[2][:, -1]
    _, rounding = distance(batch, *(part.cpu() for part in result[:2]))
    excess = result[2][:, -1].cpu() - expected
    bound = CONVERGED * batch.dense().square().sum((1, 2)) + rounding
    assert_within(excess, bound, "the minimum after many sweeps")


@pytest.mark.parametrize("seed", range(4))
def test_sign_flipped_factors_reach_zero(seed: int) -> None:
    """FedIT's mean is exactly zero, and its start a saddle: the dominant client's is not."""
    batch = FAMILIES["sign_flipped"].build(torch.float64, seed)
    *_, objective = raw.surrogate(*arguments(batch))
    total = batch.dense().square().sum((1, 2))
    assert_within((objective[:, 0].cpu() - total).abs(), 1e-12 * total, "FedIT loses everything")
    assert_within(objective[:, -1].cpu(), 1e-12 * total, "the surrogate loses nothing")


@pytest.mark.parametrize("sweeps", [1, 2, 7])
def test_number_of_sweeps(sweeps: int) -> None:
    batch = FAMILIES["independent"].build(torch.float64)
    result = raw.surrogate(*arguments(batch), sweeps, 0.0)
    assert result[2].shape == (batch.modules, sweeps + 1)
    assert_surrogate(batch, result)
    assert bool((result[2][:, -1] < result[2][:, 0]).all())


def test_tolerance_stops_early_and_repeats_the_last_value() -> None:
    batch = FAMILIES["independent"].build(torch.float64)
    *_, objective = raw.surrogate(*arguments(batch), 50, 1e-3)
    for module in objective:
        last_change = int((module[1:] < module[:-1]).nonzero().max())
        assert last_change < 25
    *_, precise = raw.surrogate(*arguments(batch), 50, 0.0)
    assert bool((precise[:, -1] <= objective[:, -1]).all())


def test_single_client_is_exact() -> None:
    batch = FAMILIES["single_client"].build(torch.float64)
    p, q, objective = (part.cpu() for part in raw.surrogate(*arguments(batch)))
    total = batch.dense().square().sum((1, 2))
    assert_within(objective.abs().amax(1), 1e-12 * total, "objective of one client")
    assert_within((p * q - 1).abs(), 1e-12, "p q = 1")


def test_modules_do_not_mix() -> None:
    batch = FAMILIES["mixed_modules"].build(torch.float64)
    gram_b, gram_a, weights, scale = arguments(batch)
    together = raw.surrogate(gram_b, gram_a, weights, scale)[2].cpu()
    total = batch.dense().square().sum((1, 2))
    for module in range(batch.modules):
        part = slice(module, module + 1)
        alone = raw.surrogate(gram_b[part], gram_a[part], weights, scale[part])[2].cpu()
        error = (alone[0] - together[module]).abs()
        assert_within(error, 1e-9 * total[module], f"objective of module {module}")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["independent", "signed_scalings", "rank_one_clients"]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_order_of_clients(name: str, seed: int, data: st.DataObject) -> None:
    """The whole trace of the objective is the same, and p and q move with the clients."""
    batch = FAMILIES[name].build(torch.float64, seed)
    order = data.draw(st.permutations(range(batch.clients)))
    p, q, objective = raw.surrogate(*arguments(batch), 8, 0.0)
    p_moved, q_moved, moved = raw.surrogate(*arguments(batch.reordered(order)), 8, 0.0)
    total = batch.dense().square().sum((1, 2))
    assert_within((moved - objective).abs().amax(1).cpu(), 1e-9 * total, "objective")
    sign = (p_moved * p[:, order]).sum(1, keepdim=True).sign()
    for have, want in ((p_moved, p), (q_moved, q)):
        error = (sign * have - want[:, order]).abs().amax(1).cpu()
        assert_within(error, 1e-6 * want.norm(dim=1).cpu(), "coefficients")


def test_splitting_a_client_does_not_cost_anything() -> None:
    """Two copies with half the weight span what one client spans: H is singular, f the same."""
    batch = FAMILIES["independent"].build(torch.float64)
    rank = batch.ranks[0]
    twice = Batch(
        "split",
        0,
        batch.dtype,
        torch.cat([batch.b, batch.b[:, :, :rank]], dim=2),
        torch.cat([batch.a, batch.a[:, :rank]], dim=1),
        (*batch.ranks, rank),
        torch.cat([batch.weights[:1] / 2, batch.weights[1:], batch.weights[:1] / 2]),
        torch.cat([batch.scalings, batch.scalings[:, :1]], dim=1),
    )
    single = raw.surrogate(*arguments(batch), 1000, 0.0)
    double = raw.surrogate(*arguments(twice), 1000, 0.0)
    assert_surrogate(twice, double)
    total = batch.dense().square().sum((1, 2))
    error = (single[2][:, [0, -1]] - double[2][:, [0, -1]]).abs().amax(1).cpu()
    assert_within(error, CONVERGED * total, "objective with a client split in two")


def test_scalings_are_folded_into_b() -> None:
    batch = FAMILIES["signed_scalings"].build(torch.float64)
    gram_b, gram_a, weights, scale = arguments(batch)
    rows = scale.repeat_interleave(batch.ranks[0], dim=1)
    folded = rows[:, :, None] * gram_b * rows[:, None, :]
    first = raw.surrogate(gram_b, gram_a, weights, scale)[2]
    second = raw.surrogate(folded, gram_a, weights, torch.ones_like(scale))[2]
    total = batch.dense().square().sum((1, 2))
    assert_within((first - second).abs().amax(1).cpu(), 1e-9 * total, "objective")


def test_deterministic_float32_weights_and_strides() -> None:
    batch = FAMILIES["zero_client"].build(torch.float32)
    gram_b, gram_a, weights, scale = arguments(batch)
    first = raw.surrogate(gram_b, gram_a, weights, scale)
    assert_same_bits(first, raw.surrogate(gram_b, gram_a, weights, scale))
    rounded = raw.surrogate(gram_b, gram_a, weights.float(), scale.float())
    assert rounded[0].dtype == rounded[2].dtype == torch.float64
    strided = raw.surrogate(
        strided_in_nan(gram_b),
        strided_in_nan(gram_a),
        strided_in_nan(weights[None, None])[0, 0],
        strided_in_nan(scale[None])[0],
    )
    total = batch.dense().square().sum((1, 2))
    assert_within((first[2] - strided[2]).abs().amax(1).cpu(), 1e-9 * total, "objective")


def test_opcheck() -> None:
    inputs = arguments(FAMILIES["independent"].build(torch.float32))
    torch.library.opcheck(raw.surrogate.default, inputs)
    torch.library.opcheck(raw.surrogate.default, (*inputs, 3, 1e-6))


def test_compiles() -> None:
    batches = [FAMILIES[name].build(torch.float32) for name in ("independent", "sign_flipped")]
    assert_compiles(ops.surrogate, [(*arguments(batch), 6, 1e-9) for batch in batches])


def bad_calls() -> dict[str, BadCall]:
    gram = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    scale = torch.ones(2, 3, dtype=torch.float64)
    return {
        "gram_b_float32": (TypeError, "surrogate", (gram.float(), gram, weights, scale)),
        "gram_a_float32": (TypeError, "surrogate", (gram, gram.float(), weights, scale)),
        "integer_weights": (TypeError, "surrogate", (gram, gram, weights.int(), scale)),
        "integer_scale": (TypeError, "surrogate", (gram, gram, weights, scale.int())),
        "two_dimensions": (ValueError, "surrogate", (gram[0], gram[0], weights, scale)),
        "ranks_differ": (ValueError, "surrogate", (gram, gram[:, :3, :3], weights, scale)),
        "gram_b_not_square": (ValueError, "surrogate", (gram[:, :, :5], gram, weights, scale)),
        "weights_of_two_dimensions": (ValueError, "surrogate", (gram, gram, weights[None], scale)),
        "two_weights_for_three_clients": (
            ValueError,
            "surrogate",
            (gram, gram, weights[:2], scale),
        ),
        "scale_of_one_dimension": (ValueError, "surrogate", (gram, gram, weights, scale[0])),
        "scale_of_one_module": (ValueError, "surrogate", (gram, gram, weights, scale[:1])),
        "rank_no_multiple_of_clients": (
            ValueError,
            "surrogate",
            (gram, gram, weights[[0, 1, 2, 0]], scale[:, [0, 1, 2, 0]]),
        ),
        "no_sweeps": (ValueError, "surrogate", (gram, gram, weights, scale, 0)),
        "tol_negative": (ValueError, "surrogate", (gram, gram, weights, scale, 5, -1.0)),
        "tol_nan": (ValueError, "surrogate", (gram, gram, weights, scale, 5, float("nan"))),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].equal_ranks])
def test_reference_is_a_stationary_point(name: str) -> None:
    """The specification itself: its objective is right, and no small step lowers it."""
    batch = FAMILIES[name].build(torch.float64)
    inputs = tuple(x.cpu() for x in arguments(batch))
    p, q, objective = reference.surrogate(*inputs, max_sweeps=4)
    assert_surrogate(batch, (p, q, objective))
    generator = torch.Generator().manual_seed(0)
    total = batch.dense().square().sum((1, 2))
    for size in (1e-2, 1e-3):
        step = [size * torch.randn(p.shape, generator=generator).double() for _ in range(2)]
        moved, rounding = distance(batch, p * (1 + step[0]), q * (1 + step[1]))
        assert_within(objective[:, -1] - moved, 1e-12 * total + rounding, "a step nearby")
