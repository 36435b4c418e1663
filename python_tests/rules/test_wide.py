"""Wide modules, R near min(m, n) or beyond: the same rules on the dense update."""

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import (
    AVERAGING_RULES,
    CASES,
    EPS,
    PRODUCT_RULES,
    Drawn,
    Federation,
    assert_ideal,
    assert_report,
    draw,
    federation,
    norm,
    of_batch,
    update,
    write_client,
)
from matrices import FAMILIES, normal, orthonormal_columns

import fedlora_kernels as flk
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.gram_space import batches, leading, wide
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.leading import leading_eigenpairs
from fedlora_kernels.gram_space.wide import Wide


@pytest.fixture
def everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "is_wide", lambda stacked_rank, size: True)
    monkeypatch.setattr(wide, "RUN", 5)  # several runs, several tiles
    monkeypatch.setattr(wide, "ROWS", 7)


def test_what_is_wide() -> None:
    assert batches.is_wide(1600, (2048, 2048))
    assert batches.is_wide(16000, (4096, 11008))
    assert not batches.is_wide(1600, (4096, 4096))
    assert not batches.is_wide(45, (17, 24))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("everything_is_wide")
def test_every_family_gives_the_ideal_update_and_its_report(name: str) -> None:
    family = FAMILIES[name]
    for dtype in {torch.float32, torch.bfloat16}.intersection(family.dtypes):
        round_ = of_batch(family.build(dtype))
        for rule, options in PRODUCT_RULES.items():
            if rule not in AVERAGING_RULES:
                result = round_.aggregate(rule, **options)
                assert_ideal(result, round_)
                assert_report(result, round_)
        if family.equal_ranks:
            assert_report(round_.aggregate("fedit"), round_)


@pytest.mark.parametrize("rule", flk.rules.names())
@pytest.mark.usefixtures("everything_is_wide")
def test_every_rule_reports_the_dense_errors(rule: str) -> None:
    round_ = draw(common_a=flk.rules.find(rule).trains != "both")
    result = round_.aggregate(rule)
    if rule != "fedsa":  # whose clients keep their own B
        assert_report(result, round_)
    assert all(isinstance(grams, Wide) for grams in flk.Round(round_.adapters).grams)


@pytest.mark.parametrize("case", ["all_zero_round", "zero_weight", "absent_modules"])
@pytest.mark.usefixtures("everything_is_wide")
def test_rounds_out_of_the_ordinary(case: str) -> None:
    round_ = draw(**CASES[case])
    result = round_.aggregate("florist", energy=1.0)
    assert_ideal(result, round_)
    assert_report(result, round_)


@pytest.mark.usefixtures("everything_is_wide")
def test_nan_names_its_client_and_module() -> None:
    round_ = draw()
    round_.adapters[1].factors["layers.0.down"].b[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=r"client 1 .*module layers.0.down: B holds NaN"):
        round_.aggregate("florist")


SIZES = {"layers.0.q": (96, 80), "layers.1.down": (72, 120)}


def shared_start(dtype: torch.dtype, clients: int, rank: int) -> Federation:
    """One A, moved by each client."""
    generator = torch.Generator().manual_seed(3)
    start = {module: normal(generator, rank, n) for module, (_, n) in SIZES.items()}
    drawn = []
    for _ in range(clients):
        client = {}
        for module, (m, n) in SIZES.items():
            b = normal(generator, m, rank) + normal(generator, m, 1)
            a = start[module] + 0.3 * normal(generator, rank, n)
            client[module] = Drawn(b.to(dtype), a.to(dtype), 2.0)
        drawn.append(client)
    return federation(drawn, [1.0 + k % 5 for k in range(clients)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_ranks_than_dimensions_reach_the_optimum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy's SVD of the dense update in float64, without an R x R matrix."""

    def refuse(self: Grams) -> None:
        raise AssertionError("an R x R matrix was made")

    round_ = shared_start(dtype, clients=36, rank=16)  # R = 576, of 80 and 72 dimensions
    with monkeypatch.context() as patched:
        patched.setattr(Grams, "_read", refuse)
        fedit, florist, flexlora = flk.Round(round_.adapters, weights=round_.weights).aggregate(
            ["fedit", flk.rules.FLoRIST(energy=0.9), "flexlora"], dtype=torch.float32
        )
        for result in (fedit, florist, flexlora):
            assert_report(result, round_)
    for module in round_.modules:
        ideal = round_.ideal(module)
        squares = np.linalg.svd(ideal.numpy(), compute_uv=False) ** 2
        total = squares.sum()
        rank = florist.report[module].rank
        assert rank == int((np.cumsum(squares) < 0.9 * total).sum()) + 1
        for result in (florist, flexlora):
            kept = result.report[module].rank
            optimum = np.sqrt(squares[kept:].sum() / total)
            found = norm(update(result.adapter, module) - ideal) / norm(ideal)
            assert abs(found - optimum) <= 1e-6


def test_a_stream_makes_no_blocks_of_wide_modules(tmp_path: Path) -> None:
    round_ = shared_start(torch.float32, clients=9, rank=64)
    expected = round_.aggregate("florist")
    stream = flk.Stream("florist", state=tmp_path / "s")
    for k, client in enumerate(round_.drawn):
        stream.add(write_client(tmp_path / f"site-{k}", client), round_.weights[k])
    result = stream.result()
    assert_report(result, round_)
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - update(expected.adapter, module))
        assert gap <= 1e-5 * norm(round_.ideal(module))
    first, last = (tmp_path / "s" / "blocks" / str(k) / "0.safetensors" for k in (0, 8))
    assert first.stat().st_size > 4 * 64 * 64 * 8
    assert last.stat().st_size < 100  # no tensor


# ---- the leading eigenpairs --------------------------------------------------------------------


def factor_of(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """F, with these eigenvalues of F^T F, twice as long as it is wide."""
    generator = torch.Generator().manual_seed(seed)
    vectors = orthonormal_columns(generator, len(values), len(values))
    left = orthonormal_columns(generator, 2 * len(values), len(values))
    return (left * values.sqrt()) @ vectors.mT


def shaped(head: list[float], tail: float, size: int = 320) -> torch.Tensor:
    """Leading values, and a flat tail."""
    values = torch.full((size,), tail, dtype=torch.float64)
    values[: len(head)] = torch.tensor(head, dtype=torch.float64)
    return values


EIGENVALUES = {
    "a gap": shaped([9.0, 5.0, 4.0], 1e-3),
    "a tail that holds more than the last value": shaped([9.0, 5.0, 4.0], 0.5),
    "repeated": shaped([4.0] * 6, 1e-2),
    "rank deficient": shaped([9.0, 5.0, 4.0], 0.0),
    "no gap": torch.linspace(1, 0, 320, dtype=torch.float64),
    "zero": shaped([], 0.0),
}


@pytest.mark.parametrize("name", EIGENVALUES)
@pytest.mark.parametrize(("energy", "cap"), [(0.5, 320), (0.9, 320), (1.0, 3), (1.0, 320)])
def test_leading_eigenpairs_are_those_of_the_whole(name: str, energy: float, cap: int) -> None:
    expected = EIGENVALUES[name]
    factor = factor_of(expected)
    matrix = factor.mT @ factor
    values, vectors = leading_eigenpairs(factor, energy, cap)
    count = len(values)
    noise = 64 * len(matrix) * EPS[torch.float64] * float(expected[0])
    assert count == len(expected) or count == cap or values.sum() >= energy * expected.sum()
    assert torch.all((values - expected[:count]).abs() <= noise + 1e-8 * expected[:count])
    assert norm(matrix @ vectors - vectors * values) <= noise + 1e-8 * float(expected[0])
    assert norm(vectors.mT @ vectors - torch.eye(count, dtype=torch.float64)) <= 1e-12 * count


def test_a_missed_eigenvalue_is_seen() -> None:
    """Neither bound takes pairs for the leading ones when a larger one is left out."""
    values = EIGENVALUES["a tail that holds more than the last value"]
    factor = factor_of(values)
    matrix = factor.mT @ factor
    found, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))
    trace = float(values.sum())
    assert leading._none_missed(matrix, found[:3], vectors[:, :3])
    assert not leading._none_missed(matrix, found[[0, 2]], vectors[:, [0, 2]])
    assert not leading._all_known(trace, found[[0, 2]], 2, len(matrix))
    without = torch.cat([found[:1], found[2:40]])
    assert not leading._all_known(trace, without, 2, len(matrix))
    gap = float(EIGENVALUES["a gap"].sum())
    assert leading._all_known(gap, torch.tensor([9.0, 5.0, 4.0]), 3, len(matrix))
    assert leading._all_known(gap, torch.tensor([9.0, 5.0, 4.0]), 1, len(matrix))
    assert not leading._all_known(gap, torch.tensor([9.0]), 1, len(matrix)), "9 beside 9.3"


def test_whole_decompositions_are_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (sizes.append(len(x)), eigh(x))[1])
    for name in ("a gap", "a tail that holds more than the last value"):
        factor = factor_of(EIGENVALUES[name])
        leading_eigenpairs(factor, 1.0, 3)
        assert max(sizes) < factor.shape[1] // 2
