"""aggregate under a memory limit: the same bits, in groups of modules, in bounded memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anonymous import peak
from federation import Drawn, draw, write_client

import fedlora_kernels as flk

SIZES = {f"layers.{i}.q": (24, 16 + i % 2) for i in range(7)}


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_limit_changes_the_groups_and_no_bit(rule: str) -> None:
    round_ = draw(sizes=SIZES, common_a=flk.rules.find(rule).trains != "both")
    expected = round_.aggregate(rule)
    told: list[tuple[int, int]] = []
    result = round_.aggregate(
        rule, memory_limit=1, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(done, len(SIZES)) for done in range(1, len(SIZES) + 1)]
    state, other = result.adapter.state_dict(), expected.adapter.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert result.adapter.config == expected.adapter.config
    assert result.report.keys() == expected.report.keys()


def test_a_limit_is_at_least_a_byte() -> None:
    with pytest.raises(ValueError, match="memory_limit must be at least 1 byte, found 0"):
        draw().aggregate("fedit", memory_limit=0)


def test_nothing_stays_in_the_scratch_folder(tmp_path: Path) -> None:
    result = draw().aggregate("florist", memory_limit=1, scratch=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(pair.b.isfinite().all() for pair in result.adapter.factors.values())


AGGREGATE = """
def combined(prefix, **more):
    clients = [flk.Adapter.load(f"{root}/{prefix}-{k}") for k in range(3)]
    result = flk.aggregate(clients, rule=rule, scratch=root, **more, **options)
    result.save(f"{root}/out-{prefix}-{rule}")
"""


@pytest.mark.parametrize(
    ("rule", "options"), [("fedit", {}), ("florist", {"energy": 1.0}), ("flora", {})]
)
def test_peak_anonymous_memory_is_within_the_limit(
    rule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """64 modules, of clients and a result that are larger than the limit."""
    drawn = draw(ranks=(8, 8, 8), sizes={"layers.0.q": (4096, 4096)})
    for k, client in enumerate(drawn.drawn):
        write_client(tmp_path / f"one-{k}", client)
        own = client["layers.0.q"]
        many = {
            f"layers.{i}.q": Drawn(own.b.clone(), own.a.clone(), own.scaling) for i in range(64)
        }
        write_client(tmp_path / f"site-{k}", many)
    factors = 64 * 2 * 4096 * 8 * 4
    limit = factors // 2  # 8 MiB; a client is 16 MiB, a stack of all clients 48
    warm = f"rule, root, options = sys.argv[1], sys.argv[2], {options}\n" + AGGREGATE
    used = peak(
        warm + 'combined("one")\n', f'combined("site", memory_limit={limit})\n', rule, tmp_path
    )
    assert used <= limit, f"{rule}: {used} bytes"
    saved = flk.Adapter.load(tmp_path / f"out-site-{rule}")
    assert saved.bytes >= factors > limit
