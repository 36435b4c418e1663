"""The loop of docs/rounds.md under each kind of rule: every client starts where the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora_kernels as flk

PAGE = (Path(__file__).parents[2] / "docs" / "rounds.md").read_text(encoding="utf-8")
(LOOP,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXACT = ("flora", "fedex")
EPS = torch.finfo(torch.float32).eps


def run(rule: str, rounds: int) -> dict[str, Any]:
    """What the loop leaves behind."""
    code = LOOP.replace('RULE = "eclora"', f"RULE = {rule!r}")
    code = code.replace("ROUNDS = 3", f"ROUNDS = {rounds}")
    left: dict[str, Any] = {}
    exec(compile(code, "docs/rounds.md", "exec"), left)
    return left


@pytest.mark.parametrize("rule", ["florist", "hetlora", "fedsa", "fedex", "fedmomentum", "flora"])
def test_clients_start_from_what_they_receive(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and start together have the update that client k receives, residual included."""
    monkeypatch.chdir(tmp_path)
    loaded = run(rule, 0)["base"]
    left = run(rule, 1)
    result = left["result"]
    weights = torch.tensor([120.0, 80.0, 300.0], dtype=torch.float64)
    for module in ("0", "2"):
        moved = left["base"][int(module)].weight - loaded[int(module)].weight
        ideal = sum(
            weight * client.delta(module)
            for weight, client in zip(weights / weights.sum(), left["clients"], strict=True)
        )
        for k, start in enumerate(left["starts"]):
            begun = moved.double() + flk.Adapter.load(start).delta(module)
            received = result.client_adapter(k).delta(module)
            if result.residual is not None:
                received = received + result.residual.delta(module)
            # Merging rounds a weight of at most 1 once, and the difference of two weights again.
            assert (begun - received).abs().max() <= 4 * EPS
            if rule in EXACT:
                assert (begun - ideal).abs().max() <= 4 * EPS


@pytest.mark.parametrize("rule", ["eclora", "fedrot", "florg"])
def test_the_memory_is_carried(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second result is not that of the same clients without the memory."""
    monkeypatch.chdir(tmp_path)
    left = run(rule, 2)
    alone = flk.aggregate(left["clients"], rule=rule, weights=left["weights"])
    carried = left["result"].adapter
    assert not torch.equal(carried.factors["0"].a, alone.adapter.factors["0"].a)


def test_a_saved_memory_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = run("eclora", 1)
    left["carried"].save("memory")
    here, there = (
        flk.aggregate(left["clients"], rule="eclora", carried=carried).adapter.factors["0"]
        for carried in (left["carried"], flk.Adapter.load("memory"))
    )
    assert torch.equal(here.b, there.b)
    assert torch.equal(here.a, there.a)


def test_every_rule_is_named() -> None:
    table, _, _ = PAGE[PAGE.index("| rules | each client |") :].partition("\n\n")
    rows = {name: row for row in table.splitlines() for name in re.findall(r"`(\w+)`[,: |]", row)}
    assert set(flk.rules.names()) <= set(rows)
    for name in flk.rules.names():
        rule = flk.rules.find(name)
        assert ("merge" in rows[name]) == (rule.after == "merge"), name
        assert ("clients/k" in rows[name]) == (rule.receives != "global"), name
