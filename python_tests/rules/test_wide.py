"""Wide modules, R near min(m, n) or beyond: the same rules on the dense update."""

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import (
    AVERAGING_RULES,
    CASES,
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
from matrices import FAMILIES, normal

import fedlora_kernels as flk
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.gram_space import batches
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.wide import Wide


@pytest.fixture
def everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "is_wide", lambda stacked_rank, size: True)


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
CLIENTS, RANK = 36, 16


def shared_start(dtype: torch.dtype) -> Federation:
    """R = 576 of modules of 80 and 72 dimensions: one A, moved by each client."""
    generator = torch.Generator().manual_seed(3)
    start = {module: normal(generator, RANK, n) for module, (_, n) in SIZES.items()}
    drawn = []
    for _ in range(CLIENTS):
        client = {}
        for module, (m, n) in SIZES.items():
            b = normal(generator, m, RANK) + normal(generator, m, 1)
            a = start[module] + 0.3 * normal(generator, RANK, n)
            client[module] = Drawn(b.to(dtype), a.to(dtype), 2.0)
        drawn.append(client)
    return federation(drawn, [1.0 + k % 5 for k in range(CLIENTS)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_ranks_than_dimensions_reach_the_optimum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy's SVD of the dense update in float64, without an R x R matrix."""

    def refuse(self: Grams) -> None:
        raise AssertionError("an R x R matrix was made")

    round_ = shared_start(dtype)
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
    round_ = shared_start(torch.float32)
    expected = round_.aggregate("florist")
    stream = flk.Stream("florist", state=tmp_path / "s")
    for k, client in enumerate(round_.drawn):
        stream.add(write_client(tmp_path / f"site-{k}", client), round_.weights[k])
    result = stream.result()
    assert_report(result, round_)
    for module in round_.modules:
        gap = norm(update(result.adapter, module) - update(expected.adapter, module))
        assert gap <= 1e-5 * norm(round_.ideal(module))
    kept = [(tmp_path / "s" / "blocks" / str(k)).stat() for k in range(CLIENTS)]
    last = tmp_path / "s" / "blocks" / str(CLIENTS - 1) / "0.safetensors"
    assert len(kept) == CLIENTS
    assert last.stat().st_size < 100
