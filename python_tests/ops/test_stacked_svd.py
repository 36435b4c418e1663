"""stacked_svd and stacked_svd_list against the truncated SVD of the dense update."""

import pytest
import torch
from assertions import (
    EPS,
    EXACT_PRODUCT,
    FAST_PRODUCT,
    PRODUCT_ROUNDINGS,
    SPECTRUM_TERMS,
    BadCall,
    assert_compiles,
    assert_near_optimal,
    assert_orthonormal_rows,
    assert_ranks,
    assert_refuses,
    assert_same_bits,
    assert_same_update,
    assert_singular_values,
    assert_within,
    assert_zero_beyond,
    poisoned_memory,
    product_tolerance,
    strided_in_nan,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import (
    CANCELLED,
    CASES,
    DEVICE,
    DTYPES,
    EXACT_AND_ROUNDED,
    FAMILIES,
    THRESHOLD_RANKS,
    Batch,
    Large,
    Shape,
    canceling,
    case_id,
    large_cases,
    normal,
    orthonormal_columns,
)

import fedlora_kernels as flk
from fedlora_kernels import ops, reference

raw = torch.ops.fedlora

ENERGIES = (0.5, 0.9, 0.99, 1 - 1e-6, 1.0)
GAP = 1e-6
"""Truncations are compared directly where c R eps magnitude^2 / (lambda_p - lambda_p+1) is less."""

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def assert_truncated_svd(
    batch: Batch,
    result: Result,
    decomposition: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    energy: float,
    max_rank: int | None,
    precision: str,
) -> None:
    """Everything the operator promises, with the dense SVD (U, sigma [L, R], V^T) at hand.

    sigma is the specification's: zero where it counts as zero.
    """
    b_global, a_global, sigma, ranks = (part.cpu() for part in result)
    left, values, right = decomposition
    width = batch.attainable_rank if max_rank is None else max_rank
    dense, magnitude = batch.dense(), batch.magnitude()
    assert b_global.dtype == a_global.dtype == batch.dtype
    assert b_global.shape == (batch.modules, batch.b.shape[1], width)
    assert a_global.shape == (batch.modules, width, batch.a.shape[2])

    assert_ranks(ranks, values, magnitude, energy, max_rank, precision)
    assert bool((ranks <= width).all())
    assert_zero_beyond(b_global, a_global, ranks)
    assert_singular_values(sigma, values, ranks, magnitude, precision)
    assert_near_optimal(b_global, a_global, dense, ranks, magnitude, precision)
    assert_orthonormal_rows(a_global, sigma, ranks, precision)

    resolution = EPS[torch.float64] if precision == "exact" else EPS[torch.float32]
    noise = SPECTRUM_TERMS * batch.stacked_rank * resolution * magnitude.square()
    lengths = b_global.double().norm(dim=1)
    for module, rank in enumerate(ranks.tolist()):
        error = (lengths[module, :rank].square() - sigma[module, :rank].square()).abs()
        bound = noise[module] + PRODUCT_ROUNDINGS * EPS[batch.dtype] * magnitude[module] ** 2
        assert_within(error, bound, "Sigma is in B")
        following = values[module, rank] if rank < values.shape[1] else 0.0
        gap = float(values[module, rank - 1] ** 2 - following**2) if rank else 0.0
        if rank and gap > 0 and float(noise[module]) / gap <= GAP:
            best = left[module, :, :rank] * values[module, :rank] @ right[module, :rank]
            product = b_global[module].double() @ a_global[module].double()
            error = torch.linalg.matrix_norm(product - best)
            slack = product_tolerance(batch.dtype, precision) + float(noise[module]) / gap
            assert_within(error, slack * magnitude[module], "the best truncation")


def dense_svd(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, the specification's singular values [L, R] and V^T of the dense updates."""
    left, _, right = torch.linalg.svd(batch.dense(), full_matrices=False)
    return left, reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)[2], right


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_family(case: tuple[str, torch.dtype], precision: str) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    decomposition = dense_svd(batch)
    for energy in ENERGIES if precision == "exact" else ENERGIES[:-1]:
        for max_rank in (None, 3):
            with poisoned_memory():
                result = raw.stacked_svd(*batch.inputs(), energy, max_rank, precision)
            assert_truncated_svd(batch, result, decomposition, energy, max_rank, precision)


@pytest.mark.parametrize("case", large_cases())
def test_large_ranks(case: Large) -> None:
    batch = case.build(torch.float32)
    with poisoned_memory():
        result = raw.stacked_svd(*batch.inputs(), 0.9, None, "exact")
    assert_truncated_svd(batch, result, dense_svd(batch), 0.9, None, "exact")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_list_is_the_stack(case: tuple[str, torch.dtype]) -> None:
    batch = FAMILIES[case[0]].build(case[1])
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    with poisoned_memory():
        result = raw.stacked_svd_list(bs, as_, batch.scale.to(DEVICE), 0.99, None, "exact")
    assert_truncated_svd(batch, result, dense_svd(batch), 0.99, None, "exact")


@pytest.mark.parametrize("shape", CANCELLED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clients_that_cancel_have_rank_zero(dtype: torch.dtype, shape: Shape) -> None:
    """Exactly, and up to the rounding of the weights; on every route."""
    for weights in EXACT_AND_ROUNDED:
        b, a, scale = canceling(dtype, shape, weights)
        for result in (
            reference.stacked_svd(b, a, scale, 1.0),
            raw.stacked_svd(b.to(DEVICE), a.to(DEVICE), scale.to(DEVICE), 1.0),
        ):
            b_global, a_global, sigma, ranks = result
            for tensor in (b_global, a_global, sigma, ranks):
                assert not tensor.any(), weights


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_exactly_on_the_threshold(dtype: torch.dtype, precision: str) -> None:
    """No neighbours accepted: the 4 R eps of the rule is there for these."""
    batch = FAMILIES["energy_on_threshold"].build(dtype)
    for energy, expected in THRESHOLD_RANKS.items():
        if energy == 1.0 and precision == "fast":
            continue
        *_, ranks = raw.stacked_svd(*batch.inputs(), energy, None, precision)
        assert ranks.tolist() == list(expected), energy


@pytest.mark.parametrize("name", ["independent", "all_zero", "wide_stack", "single_client"])
def test_max_rank_beyond_what_is_attainable_pads_with_zeros(name: str) -> None:
    batch = FAMILIES[name].build(torch.float32)
    max_rank = batch.stacked_rank + batch.b.shape[1] + batch.a.shape[2]
    with poisoned_memory():
        result = raw.stacked_svd(*batch.inputs(), 1.0, max_rank)
    assert_truncated_svd(batch, result, dense_svd(batch), 1.0, max_rank, "exact")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_energy_one_is_the_ideal_update(dtype: torch.dtype) -> None:
    for name, family in FAMILIES.items():
        if dtype in family.dtypes:
            batch = FAMILIES[name].build(dtype)
            b_global, a_global, *_ = raw.stacked_svd(*batch.inputs(), 1.0)
            assert_same_update(b_global, a_global, batch.dense(), dtype, batch.magnitude())


def test_error_and_captured_energy_add_up() -> None:
    batch = FAMILIES["independent"].build(torch.float64)
    dense = batch.dense()
    total = dense.square().sum((1, 2))
    for energy in (0.5, 0.9, 0.99):
        b_global, a_global, sigma, ranks = (
            part.cpu() for part in raw.stacked_svd(*batch.inputs(), energy)
        )
        error = (dense - b_global @ a_global).square().sum((1, 2))
        kept = torch.arange(sigma.shape[1]) < ranks[:, None]
        captured = (sigma.square() * kept).sum(1)
        assert_within((error + captured - total).abs(), EXACT_PRODUCT * total, "Pythagoras")
        assert bool((captured >= (energy - EXACT_PRODUCT) * total).all())


def test_modules_do_not_mix() -> None:
    """Each module of a batch as if it were alone: thresholds and scales are its own."""
    for name in ("mixed_modules", "energy_on_threshold", "tile_edges"):
        batch = FAMILIES[name].build(torch.float32)
        b, a, scale = batch.inputs()
        together = raw.stacked_svd(b, a, scale, 0.9)
        for module in range(batch.modules):
            part = slice(module, module + 1)
            alone = raw.stacked_svd(b[part].clone(), a[part].clone(), scale[part].clone(), 0.9)
            assert alone[3].tolist() == together[3][part].tolist()
            product = together[0][part].cpu().double() @ together[1][part].cpu().double()
            magnitude = batch.magnitude()[part]
            assert_same_update(alone[0], alone[1], product, torch.float32, magnitude)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous(dtype: torch.dtype, precision: str) -> None:
    for name in ("heterogeneous_ranks", "wide_stack"):
        batch = FAMILIES[name].build(dtype)
        b, a, scale = batch.inputs()
        strided = strided_in_nan(b), strided_in_nan(a), strided_in_nan(scale[None])[0]
        result = raw.stacked_svd(*strided, 0.9, None, precision)
        assert_truncated_svd(batch, result, dense_svd(batch), 0.9, None, precision)
        bs, as_ = ([strided_in_nan(f.to(DEVICE)) for f in side] for side in batch.client_factors())
        result = raw.stacked_svd_list(bs, as_, scale, 0.9, None, precision)
        assert_truncated_svd(batch, result, dense_svd(batch), 0.9, None, precision)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype: torch.dtype, precision: str) -> None:
    for name in ("tile_edges", "wide_stack", "clustered"):
        arguments = (*FAMILIES[name].build(dtype).inputs(), 0.9, 5, precision)
        assert_same_bits(raw.stacked_svd(*arguments), raw.stacked_svd(*arguments))


def test_float32_scale() -> None:
    batch = FAMILIES["zero_weight"].build(torch.float32)
    b, a, scale = batch.inputs()
    assert_same_bits(raw.stacked_svd(b, a, scale.float(), 0.9), raw.stacked_svd(b, a, scale, 0.9))


def test_inputs_are_left_alone() -> None:
    arguments = FAMILIES["independent"].build(torch.float64).inputs()
    before = tuple(part.clone() for part in arguments)
    raw.stacked_svd(*arguments, 0.9)
    assert_same_bits(arguments, before)


def assert_same_answer(first: Result, second: Result, batch: Batch) -> None:
    """Equal ranks, and products and singular values equal up to the dtype's rounding."""
    assert first[3].tolist() == second[3].tolist()
    product = second[0].cpu().double() @ second[1].cpu().double()
    assert_same_update(first[0], first[1], product, batch.dtype, batch.magnitude())
    relative = SPECTRUM_TERMS * batch.stacked_rank * EPS[batch.dtype]
    difference = (first[2] - second[2]).abs().amax(1).cpu()
    assert_within(difference, relative * batch.magnitude(), "singular values")


ROUNDS = st.tuples(
    st.sampled_from([("independent", 0.9), ("independent", 1.0), ("heterogeneous_ranks", 0.5)]),
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 10_000),
)
"""A family and an energy, a dtype and a seed."""


@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=ROUNDS)
def test_gauge_invariance(drawn: tuple[tuple[str, float], torch.dtype, int]) -> None:
    """A_k -> Q A_k and B_k -> B_k Q^-1 for an invertible Q of each client change nothing."""
    (name, energy), dtype, seed = drawn
    batch = FAMILIES[name].build(dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    bs, as_ = [], []
    for b, a in zip(
        batch.b.double().split(batch.ranks, dim=2),
        batch.a.double().split(batch.ranks, dim=1),
        strict=True,
    ):
        rank = b.shape[2]
        turn = orthonormal_columns(generator, rank, rank)
        stretch = torch.linspace(0.5, 2.0, rank, dtype=torch.float64)
        bs.append(b @ turn.T / stretch)
        as_.append((stretch[:, None] * turn) @ a)
    b, a = torch.cat(bs, dim=2).to(dtype), torch.cat(as_, dim=1).to(dtype)
    scale = batch.scale.to(DEVICE)
    moved = raw.stacked_svd(b.to(DEVICE), a.to(DEVICE), scale, energy)
    # The factors were rounded again: twice the rounding of a result.
    plain = raw.stacked_svd(*batch.inputs(), energy)
    product = plain[0].cpu().double() @ plain[1].cpu().double()
    assert moved[3].tolist() == plain[3].tolist()
    error = torch.linalg.matrix_norm(moved[0].cpu().double() @ moved[1].cpu().double() - product)
    slack = gap_factor(plain, batch) * 2 * product_tolerance(dtype)
    assert_within(error, slack * batch.magnitude(), "update in another gauge")


def gap_factor(result: Result, batch: Batch) -> torch.Tensor:
    """[L], how much a truncation at the result's ranks amplifies a change of the update."""
    values = dense_svd(batch)[1]
    factors = []
    for module, rank in enumerate(result[3].tolist()):
        following = float(values[module, rank]) if rank < values.shape[1] else 0.0
        last, first = float(values[module, rank - 1]), float(values[module, 0])
        factors.append(2 * first / (last - following))
    return torch.tensor(factors, dtype=torch.float64)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=ROUNDS, data=st.data())
def test_order_of_clients_changes_rounding_only(
    drawn: tuple[tuple[str, float], torch.dtype, int], data: st.DataObject
) -> None:
    (name, energy), dtype, seed = drawn
    batch = FAMILIES[name].build(dtype, seed)
    other = batch.reordered(data.draw(st.permutations(range(batch.clients))))
    moved = raw.stacked_svd(*other.inputs(), energy)
    assert_same_answer(moved, raw.stacked_svd(*batch.inputs(), energy), batch)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=ROUNDS, data=st.data())
def test_splitting_a_client_changes_nothing(
    drawn: tuple[tuple[str, float], torch.dtype, int], data: st.DataObject
) -> None:
    """One client as two with half the weight each: the stack is rank-deficient then."""
    (name, energy), dtype, seed = drawn
    batch = FAMILIES[name].build(dtype, seed)
    client = data.draw(st.integers(0, batch.clients - 1))
    start = sum(batch.ranks[:client])
    columns = slice(start, start + batch.ranks[client])
    b = torch.cat([batch.b, batch.b[:, :, columns]], dim=2)
    a = torch.cat([batch.a, batch.a[:, columns]], dim=1)
    scale = batch.scale.clone()
    scale[:, columns] /= 2
    scale = torch.cat([scale, scale[:, columns]], dim=1)
    split = raw.stacked_svd(
        b.to(DEVICE), a.to(DEVICE), scale.to(DEVICE), energy, batch.attainable_rank
    )
    plain = raw.stacked_svd(*batch.inputs(), energy)
    split = (*split[:2], split[2][:, : batch.stacked_rank], split[3])
    assert_same_answer(split, plain, batch)


def test_order_of_clients_at_energy_one_in_every_family() -> None:
    for name, family in FAMILIES.items():
        batch = family.build(torch.float32)
        other = batch.reordered(list(reversed(range(batch.clients))))
        b_global, a_global, *_ = raw.stacked_svd(*other.inputs(), 1.0)
        expected = batch.dense()
        assert_same_update(b_global, a_global, expected, torch.float32, batch.magnitude()), name


def test_fast_refuses_what_float32_cannot_resolve() -> None:
    arguments = FAMILIES["independent"].build(torch.float32).inputs()
    for energy in (1.0, 1 - 1e-7):
        with pytest.raises(ValueError, match="fast"):
            ops.stacked_svd(*arguments, energy, None, "fast")
        with pytest.raises(RuntimeError, match="fast"):
            raw.stacked_svd(*arguments, energy, None, "fast")
    ops.stacked_svd(*arguments, 1 - 1e-6, None, "fast")


def test_opcheck() -> None:
    for name, dtype in (
        ("heterogeneous_ranks", torch.float32),
        ("wide_stack", torch.bfloat16),
        ("independent", torch.float64),
    ):
        batch = FAMILIES[name].build(dtype)
        torch.library.opcheck(raw.stacked_svd.default, (*batch.inputs(), 0.9, 4))
    torch.library.opcheck(raw.stacked_svd.default, (*batch.inputs(), 0.9, None, "fast"))
    bs, as_ = ([factor.to(DEVICE) for factor in side] for side in batch.client_factors())
    torch.library.opcheck(raw.stacked_svd_list.default, (bs, as_, batch.scale.to(DEVICE), 0.9))


def test_compiles() -> None:
    calls, list_calls = [], []
    for name in ("independent", "sign_flipped"):
        batch = FAMILIES[name].build(torch.float32)
        calls.append((*batch.inputs(), 0.9, 3))
        bs, as_ = ([f.to(DEVICE) for f in side[:2]] for side in batch.client_factors())
        scale = batch.scale[:1, : 2 * batch.ranks[0]].clone().to(DEVICE)
        list_calls.append((bs, as_, scale, 0.9))
    assert_compiles(ops.stacked_svd, calls)
    assert_compiles(ops.stacked_svd_list, list_calls)


def test_compiles_with_inductor() -> None:
    batch = FAMILIES["independent"].build(torch.float32)
    assert_compiles(ops.stacked_svd, [(*batch.inputs(), 0.9, 3)], backend="inductor")


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_ranks_are_the_zero_update(
    dtype: torch.dtype, precision: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """R = 0, without a word on stderr, where LAPACK would call it an illegal value."""
    b, a = (torch.empty(shape, dtype=dtype, device=DEVICE) for shape in ((2, 7, 0), (2, 0, 9)))
    scale = torch.empty(2, 0, dtype=torch.float64, device=DEVICE)
    with poisoned_memory():
        b_g, a_g, sigma, ranks = raw.stacked_svd(b, a, scale, 0.9, 3, precision)
    assert [tuple(x.shape) for x in (b_g, a_g, sigma)] == [(2, 7, 3), (2, 3, 9), (2, 0)]
    assert not b_g.any()
    assert not a_g.any()
    assert ranks.tolist() == [0, 0]
    assert capfd.readouterr() == ("", "")


def bad_calls() -> dict[str, BadCall]:
    b, a = torch.ones(2, 7, 4), torch.ones(2, 4, 9)
    scale = torch.ones(2, 4, dtype=torch.float64)
    bs = [b[0, :, :2], b[0, :, 2:], b[1, :, :2], b[1, :, 2:]]
    as_ = [a[0, :2], a[0, 2:], a[1, :2], a[1, 2:]]
    return {
        "b_is_a_matrix": (ValueError, "stacked_svd", (b[0], a, scale, 0.9)),
        "a_is_a_matrix": (ValueError, "stacked_svd", (b, a[0], scale, 0.9)),
        "b_of_one_module": (ValueError, "stacked_svd", (b[:1], a, scale, 0.9)),
        "ranks_of_b_and_a_differ": (ValueError, "stacked_svd", (b[:, :, :3], a, scale, 0.9)),
        "both_transposed": (ValueError, "stacked_svd", (b.mT, a.mT, scale, 0.9)),
        "scale_of_one_dimension": (ValueError, "stacked_svd", (b, a, scale[0], 0.9)),
        "scale_of_another_rank": (ValueError, "stacked_svd", (b, a, scale[:, :3], 0.9)),
        "no_energy": (ValueError, "stacked_svd", (b, a, scale, 0.0)),
        "energy_over_1": (ValueError, "stacked_svd", (b, a, scale, 1.01)),
        "energy_nan": (ValueError, "stacked_svd", (b, a, scale, float("nan"))),
        "max_rank_0": (ValueError, "stacked_svd", (b, a, scale, 0.9, 0)),
        "unknown_precision": (ValueError, "stacked_svd", (b, a, scale, 0.9, None, "precise")),
        "a_of_another_dtype": (TypeError, "stacked_svd", (b, a.double(), scale, 0.9)),
        "integers": (TypeError, "stacked_svd", (b.int(), a.int(), scale, 0.9)),
        "integer_scale": (TypeError, "stacked_svd", (b, a, scale.int(), 0.9)),
        "no_tensors": (ValueError, "stacked_svd_list", ([], [], scale, 0.9)),
        "fewer_a_than_b": (ValueError, "stacked_svd_list", (bs, as_[:2], scale, 0.9)),
        "three_tensors_of_two_modules": (
            ValueError,
            "stacked_svd_list",
            (bs[:3], as_[:3], scale, 0.9),
        ),
        "scale_of_one_dimension_for_a_list": (
            ValueError,
            "stacked_svd_list",
            (bs, as_, scale[0], 0.9),
        ),
        "scale_of_another_rank_for_a_list": (
            ValueError,
            "stacked_svd_list",
            (bs, as_, scale[:, :3], 0.9),
        ),
        "rows_of_b_differ": (
            ValueError,
            "stacked_svd_list",
            ([*bs[:3], bs[3][:6]], as_, scale, 0.9),
        ),
        "client_ranks_differ": (
            ValueError,
            "stacked_svd_list",
            ([*bs[:3], bs[3][:, :1]], as_, scale, 0.9),
        ),
        "max_rank_negative": (ValueError, "stacked_svd_list", (bs, as_, scale, 0.9, -1)),
        "fast_at_full_energy": (
            ValueError,
            "stacked_svd_list",
            (bs, as_, scale, 1.0, None, "fast"),
        ),
        "a_of_another_dtype_in_the_list": (
            TypeError,
            "stacked_svd_list",
            (bs, [f.double() for f in as_], scale, 0.9),
        ),
        "integers_in_the_list": (
            TypeError,
            "stacked_svd_list",
            ([f.int() for f in bs], [f.int() for f in as_], scale, 0.9),
        ),
        "integer_scale_for_a_list": (TypeError, "stacked_svd_list", (bs, as_, scale.int(), 0.9)),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    assert_refuses(*bad_calls()[mistake])


def test_list_errors_name_the_tensor() -> None:
    bs = [torch.ones(7, 2), torch.ones(6, 2)]
    as_ = [torch.ones(2, 9), torch.ones(2, 9)]
    with pytest.raises(ValueError, match=r"b\[1\]"):
        ops.stacked_svd_list(bs, as_, torch.ones(1, 4), 0.9)


@pytest.mark.parametrize("name", FAMILIES)
def test_reference_is_the_paper_pipeline(name: str) -> None:
    """Three SVDs as FLoRIST writes them and one SVD of the dense update: the same adapter."""
    batch = FAMILIES[name].build(torch.float64)
    bs, as_ = batch.client_factors()
    *_, ranks = reference.stacked_svd(batch.b, batch.a, batch.scale, 1.0)
    b_global, a_global, *_ = reference.stacked_svd(batch.b, batch.a, batch.scale, 0.9)
    for module in range(batch.modules):
        clients = slice(module * batch.clients, (module + 1) * batch.clients)
        scalings, weights = batch.scalings[module].tolist(), batch.weights.tolist()
        arguments = (bs[clients], as_[clients], scalings, weights)
        # Its SVD of the stack is accurate relative to the longest column, ours to each client's.
        lengths = torch.linalg.matrix_norm(batch.b[module]) * torch.linalg.matrix_norm(
            batch.a[module] * batch.scale[module, :, None]
        )
        bound = EXACT_PRODUCT * batch.magnitude()[module] + 16 * EPS[torch.float64] * lengths
        exact = reference.rules.florist(*arguments, energy=1.0)
        error = torch.linalg.matrix_norm(exact - reference.rules.ideal_update(*arguments))
        assert_within(error, bound, "energy 1")
        if name not in ("clustered", "energy_on_threshold"):
            truncated = reference.rules.florist(*arguments, energy=0.9)
            error = torch.linalg.matrix_norm(truncated - b_global[module] @ a_global[module])
            assert_within(error, bound, "energy 0.9")
        assert int(ranks[module]) <= batch.attainable_rank


def test_fast_on_factors_of_several_chunks() -> None:
    """float32 accumulation, chunked: the leading part of long factors within FAST_PRODUCT."""
    generator = torch.Generator().manual_seed(5)
    b = normal(generator, 1, 1201, 8).float().to(DEVICE)
    a = normal(generator, 1, 8, 803).float().to(DEVICE)
    scale = torch.ones(1, 8, dtype=torch.float64, device=DEVICE)
    exact = raw.stacked_svd(b, a, scale, 0.9, None, "exact")
    fast = raw.stacked_svd(b, a, scale, 0.9, None, "fast")
    assert exact[3].tolist() == fast[3].tolist()
    relative = (exact[2] - fast[2]).abs() / exact[2][:, :1]
    rank = int(exact[3])
    assert_within(relative[:, :rank].cpu(), FAST_PRODUCT, "singular values")


@pytest.mark.skipif(
    DEVICE.type != "cuda" or flk.backend() != "cuda",
    reason="CUDA graphs need a GPU and its kernels",
)
@pytest.mark.parametrize("rank", [16, 128])
def test_a_captured_graph_repeats_the_call(rank: int) -> None:
    """Nothing waits for the device or decides on the host, with and without a leading part."""
    generator = torch.Generator().manual_seed(6)
    b = normal(generator, 3, 200, rank).bfloat16().to(DEVICE)
    a = normal(generator, 3, rank, 190).bfloat16().to(DEVICE)
    scale = torch.ones(3, rank, dtype=torch.float64, device=DEVICE)
    expected = ops.stacked_svd(b, a, scale, 0.9, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.stacked_svd(b, a, scale, 0.9, 8)
    for result in captured:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for result, same in zip(captured, expected, strict=True):
        assert torch.equal(result, same)
