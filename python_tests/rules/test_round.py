"""Round: checked once, read once; what travels; rules with memory."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import (
    FIXED_A,
    PRODUCT_RULES,
    Federation,
    draw,
    norm,
    update,
    whole_update,
    write_client,
)
from vera import vera_clients

import fedlora_kernels as flk

MODULE = "layers.0.q"
EVERY = [rule for rule in flk.rules.names() if rule not in FIXED_A]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the operators that read the factors are called."""
    counted: Counter[str] = Counter()
    for name in ("gram_list", "weighted_sum_list", "combine_list", "spectrum"):
        original = getattr(flk.ops, name)

        def counting(
            *arguments: Any, name: str = name, original: Any = original, **more: Any
        ) -> Any:
            counted[name] += 1
            return original(*arguments, **more)

        monkeypatch.setattr(flk.ops, name, counting)
    return counted


def one_batch() -> Federation:
    return draw(sizes={f"layers.{i}.q": (9, 7) for i in range(3)}, ranks=(2, 2, 2))


def round_of(drawn: Federation, **options: Any) -> flk.Round:
    return flk.Round(drawn.adapters, weights=drawn.weights, **options)


def test_rules_reports_and_an_inspection_share_one_gram_pass(calls: Counter[str]) -> None:
    drawn = one_batch()
    round_ = round_of(drawn)
    results = round_.aggregate(EVERY)
    assert [result.rule.name for result in results] == EVERY
    assert all(result.report[MODULE].rank for result in results)
    assert round_.inspect().modules[MODULE].numerical_rank == 6
    assert calls["gram_list"] == 2
    for rule, result in zip(EVERY, results, strict=True):
        alone = drawn.aggregate(rule)
        for module in drawn.modules:
            assert torch.equal(whole_update(alone, module), whole_update(result, module))
        assert alone.report == result.report


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("fedit", {"weighted_sum_list": 2}),
        ("fedsa", {"weighted_sum_list": 1}),
        ("ffa", {"weighted_sum_list": 1}),
        ("flora", {"weighted_sum_list": 1}),
        ("hetlora", {"gram_list": 2, "combine_list": 1}),
        ("flexlora", {"gram_list": 2, "spectrum": 1, "combine_list": 1}),
    ],
)
def test_a_rule_pays_for_what_it_uses(
    rule: str, expected: dict[str, int], calls: Counter[str]
) -> None:
    """And the report of one that averages makes its own Gram pass when it is asked for."""
    drawn = draw(sizes={MODULE: (9, 7)}, ranks=(2, 2, 2), common_a=rule in FIXED_A)
    result = drawn.aggregate(rule)
    assert calls == expected
    assert result.bytes_up
    assert result.bytes_down
    assert calls == expected
    assert result.report[MODULE].norm == pytest.approx(norm(drawn.ideal(MODULE)))
    assert calls["gram_list"] == 2


def test_hetlora_without_norms_computes_no_gram_matrix(calls: Counter[str]) -> None:
    draw().aggregate("hetlora", norm_weighted=False)
    assert calls["gram_list"] == 0


def test_vera_makes_no_factors_before_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = vera_clients()

    def refuse(*arguments: Any) -> None:
        raise AssertionError("factors were made")

    with monkeypatch.context() as patch:
        patch.setattr("fedlora_kernels.adapters.adapter.of_vera", refuse)
        result = flk.aggregate(clients, rule="fedsa")
        assert result.client_adapter(1).vera.keys() == clients[1].vera.keys()
        assert result.bytes_up == result.bytes_down
    assert all(row.norm > 0 for row in result.report.values())


AVERAGES = ("fedit", "ffa", "fedsa", "rolora", "lora_a2", "rbla", "fedrot")
"""Rules whose results took no Gram matrices."""


@pytest.mark.parametrize("rule", flk.rules.names())
def test_a_tensor_that_changed_after_the_round_was_made_is_refused(rule: str) -> None:
    """A report from Gram matrices that were kept is still right."""
    drawn = draw(common_a=True)
    module = drawn.modules[-1]
    ideal = norm(drawn.ideal(module))
    round_ = round_of(drawn)
    result = round_.aggregate(rule)
    with torch.no_grad():
        drawn.adapters[1].factors[module].b.mul_(2)
    words = rf"client 1 \(site-1\), module {module}: a tensor was changed in place"
    with pytest.raises(flk.AdapterError, match=words):
        round_.aggregate(rule)
    if rule in (*AVERAGES, "flora", "fedex"):
        with pytest.raises(flk.AdapterError, match=words):
            _ = result.report
    else:
        assert result.report[module].norm == pytest.approx(ideal)


def test_inference_tensors_are_taken_as_they_are() -> None:
    with torch.inference_mode():
        drawn = draw()
    assert drawn.aggregate("fedit").report == draw().aggregate("fedit").report


def test_a_round_is_checked_when_it_is_made() -> None:
    drawn = draw()
    with pytest.raises(flk.AdapterError, match="no clients"):
        flk.Round([])
    with pytest.raises(flk.AdapterError, match="2 weights for 3 clients"):
        flk.Round(drawn.adapters, weights=[1, 2])
    with pytest.raises(ValueError, match="absent must be one of"):
        flk.Round(drawn.adapters, absent="skip")
    with pytest.raises(ValueError, match="precision must be"):
        flk.Round(drawn.adapters, precision="double")
    drawn.adapters[1].config["base_model_name_or_path"] = "another"
    with pytest.raises(flk.AdapterError, match=r"client 1 \(site-1\): base_model_name_or_path"):
        flk.Round(drawn.adapters)


@pytest.mark.parametrize("heads", ["average", "local"])
@pytest.mark.parametrize("rule", flk.rules.names())
def test_bytes_from_shapes_are_those_of_what_travels(rule: str, heads: str) -> None:
    drawn = draw(common_a=rule in FIXED_A)
    for adapter in drawn.adapters:
        adapter.extras["base_model.model.head.weight"] = torch.ones(3, 5)
    result = drawn.aggregate(rule, heads=heads)
    delivery = result.delivery
    rest = 0 if result.residual is None else result.residual.bytes
    for k, client in enumerate(drawn.adapters):
        sent = sum(x.nbytes for x in delivery.sent(client).values())
        received = sum(x.nbytes for x in delivery.returned(result.client_adapter(k)).values())
        assert (result.bytes_up[k], result.bytes_down[k]) == (sent, rest + received)


@pytest.mark.parametrize("rule", flk.rules.names())
def test_the_widest_rank_is_that_of_the_result(rule: str) -> None:
    made = flk.rules.make(rule)
    drawn = draw(ranks=(2, 2, 2), sizes={MODULE: (9, 7)}, common_a=rule in FIXED_A)
    result = drawn.aggregate(rule)
    rank = result.report[MODULE].rank
    widest = made.widest((2, 2, 2), (9, 7))
    assert rank <= widest if made.bounded else rank == widest


# rules as objects


def test_a_rule_is_its_options() -> None:
    drawn = draw()
    rule = flk.rules.FLoRIST(energy=0.5)
    assert rule == flk.rules.make("florist", energy=0.5)
    assert drawn.aggregate(rule).report == drawn.aggregate("florist", energy=0.5).report
    with pytest.raises(FrozenInstanceError):
        rule.energy = 0.6
    with pytest.raises(
        TypeError, match=r"options are fields of the rule: FLoRIST\(energy=\.\.\.\)"
    ):
        drawn.aggregate(rule, energy=0.5)
    with pytest.raises(ValueError, match="unknown rule 'fedavg'"):
        flk.rules.find("fedavg")


@pytest.mark.parametrize("name", flk.rules.names())
def test_a_rule_is_named_like_its_file_and_exported(name: str) -> None:
    kind = flk.rules.find(name)
    assert kind.__module__ == f"fedlora_kernels.rules.{name}"
    assert getattr(flk.rules, kind.__name__) is kind
    assert flk.rules.make(name) == kind()
    assert {item.help for item in kind.options().values()}.isdisjoint({""})


@dataclass(frozen=True)
class Momentum(flk.Rule):
    """FLoRA's stack with the last update in it: V_t = dW_t + beta V_(t-1)."""

    name, title, paper, exact = "momentum", "Momentum", "0000.00000", "no"
    heterogeneous = True
    beta: float = flk.rules.option(0.5, "share of the last update that stays")

    def solve(self, grams: Any) -> Any:
        return flk.rules.FLoRA().solve(grams)

    def joins(self, carried: flk.Adapter | None) -> Sequence[tuple[flk.Adapter, float]]:
        return () if carried is None else ((carried, self.beta),)

    def carry(self, result: flk.Aggregation) -> flk.Adapter:
        return result.adapter


def test_a_rule_with_memory_takes_what_it_carried() -> None:
    rounds = [draw(seed=seed) for seed in range(3)]
    carried, expected = None, dict.fromkeys(rounds[0].modules, 0.0)
    for drawn in rounds:
        result = drawn.aggregate(Momentum(), carried=carried)
        carried = result.carried
        for module in drawn.modules:
            expected[module] = drawn.ideal(module) + 0.5 * expected[module]
            gap = norm(update(result.adapter, module) - expected[module])
            assert gap <= 1e-5 * norm(expected[module])
            assert result.report[module].norm == pytest.approx(norm(expected[module]), rel=1e-5)
    assert len(result.clients) == 3


def test_a_rule_without_memory_carries_nothing_and_takes_nothing() -> None:
    drawn = draw()
    assert drawn.aggregate("fedit").carried is None
    assert drawn.aggregate("fedit", carried=None).report
    with pytest.raises(TypeError, match="rule 'fedit' has no memory"):
        drawn.aggregate("fedit", carried=drawn.adapters[0])


def test_a_new_rule_is_one_file(tmp_path: Path) -> None:
    """The file that CONTRIBUTING shows, in a copy of the package: name, flag, table and report."""
    root = Path(flk.__file__).parents[1]
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(\"\"\"Shrunk.*?)```", text, re.DOTALL)
    package = tmp_path / "fedlora_kernels"
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(root / "fedlora_kernels", package, ignore=leave)
    (package / "rules" / "shrunk.py").write_text(code, encoding="utf-8")
    for k in range(2):
        write_client(tmp_path / str(k), draw().drawn[k])
    # An editable installation's finder would find its own sources first.
    code = (
        "import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path.insert(0, sys.argv.pop(1)); "
        "from fedlora_kernels.cli import main; main()"
    )
    start = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "FEDLORA_BACKEND": "composed"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*start, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "| `shrunk` | Shrunk FLoRA" in run("rules", "--markdown")
    assert "--factor FLOAT" in run("aggregate", "--help")
    arguments = ("0", "1", "--out", "g", "--rule", "shrunk", "--factor", "0.25", "--json")
    report = json.loads(run("aggregate", *arguments))
    assert report["mean"]["relative_error"] == pytest.approx(0.75)


# memory


@dataclass(frozen=True)
class MomentumSVD(Momentum):
    """The same, decomposed, which takes Gram matrices."""

    name = "momentum_svd"

    def solve(self, grams: Any) -> Any:
        return flk.rules.FLoRIST(energy=1.0).solve(grams)


@pytest.mark.parametrize("memory", [False, True], ids=["without_memory", "with_memory"])
def test_what_a_round_keeps_does_not_grow_with_the_batches(
    memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the batches that a rule with memory joins something to, and after the report."""
    drawn = draw(sizes={f"layers.{i}.q": (9, 7) for i in range(6)}, ranks=(2, 2, 2))
    last = drawn.aggregate("fedit").adapter
    monkeypatch.setattr("fedlora_kernels.gram_space.batches.GRAM_BYTES", 0)
    limit = 2 * 5 * 8 * 8 * 8  # two of the six batches: R = 8 and five matrices of each
    monkeypatch.setattr("fedlora_kernels._round.KEPT", limit)
    made: list[weakref.ref[torch.Tensor]] = []
    original = flk.ops.gram_list

    def counted(*arguments: Any, **more: Any) -> torch.Tensor:
        gram = original(*arguments, **more)
        made.append(weakref.ref(gram))
        return gram

    monkeypatch.setattr(flk.ops, "gram_list", counted)
    round_ = round_of(drawn)
    result = round_.aggregate(
        MomentumSVD() if memory else "florist", carried=last if memory else None
    )
    for _ in range(2):
        held = sum(gram.nbytes for found in made if (gram := found()) is not None)
        assert 0 < held <= limit
        assert result.report


def test_gram_matrices_beyond_the_limit_are_computed_anew(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are the same bits."""
    drawn = one_batch()
    kept = round_of(drawn).aggregate("florist", **PRODUCT_RULES["florist"])
    monkeypatch.setattr("fedlora_kernels._round.KEPT", 0)
    calls.clear()
    round_ = round_of(drawn)
    first = round_.aggregate("florist", **PRODUCT_RULES["florist"])
    assert calls["gram_list"] == 2
    again = round_.aggregate("florist", **PRODUCT_RULES["florist"])
    assert calls["gram_list"] == 4
    assert first.report == again.report == kept.report
    assert calls["gram_list"] == 4
    for module in drawn.modules:
        assert torch.equal(whole_update(first, module), whole_update(kept, module))
