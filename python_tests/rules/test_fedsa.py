"""FedSA-LoRA: A is shared, every B and every head stays with its client (arXiv 2410.01463)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import EPS, EXACT_PRODUCT
from federation import (
    EQUAL_RANK_CASES,
    WORKING_DTYPES,
    assert_report,
    client_config,
    draw,
    federation,
    norm,
    update,
)
from vera import VERA_A, VERA_B, vera_clients, vera_config, vera_state

import fedlora_kernels as flk

HEAD = "base_model.model.score.weight"


@pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
@pytest.mark.parametrize("case", EQUAL_RANK_CASES)
def test_client_k_runs_the_mean_a_with_its_own_b(case: str, dtype: torch.dtype) -> None:
    round_ = draw(**EQUAL_RANK_CASES[case], dtype=dtype)
    result = round_.aggregate("fedsa")
    for k, client in enumerate(round_.drawn):
        received = result.client_adapter(k)
        assert received.factors.keys() == client.keys()
        assert received.config == round_.adapters[k].config
        for module, drawn in client.items():
            factors = received.factors[module]
            _, mean = round_.means(module)
            assert torch.equal(factors.b, drawn.b)
            assert factors.scaling == drawn.scaling
            assert norm(factors.a.double() - mean) <= EPS[dtype] * norm(mean)
            assert torch.equal(factors.a, result.adapter.factors[module].a)
    mean_updates = {}
    for module in round_.modules:
        b, a = round_.means(module)
        mean_updates[module] = b @ a
        assert not result.adapter.factors[module].b.any()
    assert_report(result, round_, mean_updates)


@pytest.mark.parametrize("rslora", [False, True])
def test_rslora_keeps_alpha_over_the_root_of_the_rank(rslora: bool) -> None:
    round_ = draw(rslora=rslora, alphas=(8, 8, 8))
    result = round_.aggregate("fedsa")
    scaling = 4.0 if rslora else 2.0
    for k, client in enumerate(round_.drawn):
        received = result.client_adapter(k)
        for module, drawn in client.items():
            _, mean = round_.means(module)
            expected = scaling * drawn.b.double() @ mean
            bound = (EXACT_PRODUCT + EPS[torch.float32]) * scaling * norm(drawn.b) * norm(mean)
            assert norm(update(received, module) - expected) <= bound


def with_heads() -> tuple[Any, list[torch.Tensor]]:
    plain = draw()
    heads = [torch.randn(3, 24, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    return federation(plain.drawn, plain.weights, extras=[{HEAD: head} for head in heads]), heads


def test_heads_stay_local() -> None:
    round_, heads = with_heads()
    result = round_.aggregate("fedsa")
    assert result.adapter.extras == {}
    for k, head in enumerate(heads):
        assert torch.equal(result.client_adapter(k).extras[HEAD], head)
        assert torch.equal(round_.adapters[k].extras[HEAD], head)


def test_shared_state_is_a_alone() -> None:
    round_, _ = with_heads()
    result = round_.aggregate("fedsa")
    keys = {f"base_model.model.{module}.lora_A.weight" for module in round_.modules}
    assert result.shared.keys() == keys
    for module in round_.modules:
        shared = result.shared[f"base_model.model.{module}.lora_A.weight"]
        assert torch.equal(shared, result.adapter.factors[module].a)
    a_bytes = sum(item.a.nbytes for item in round_.drawn[0].values())
    assert result.bytes_up == [a_bytes] * 3
    assert result.bytes_down == [a_bytes] * 3


def test_saved_clients_hold_their_own_b_and_head(tmp_path: Path) -> None:
    round_, heads = with_heads()
    round_.aggregate("fedsa").save(tmp_path / "global")
    for k, head in enumerate(heads):
        saved = flk.Adapter.load(tmp_path / "global" / "clients" / str(k))
        assert torch.equal(saved.extras[HEAD], head)
        for module, drawn in round_.drawn[k].items():
            assert torch.equal(saved.factors[module].b, drawn.b)


# VeRA: W += diag(lambda_b) B diag(lambda_d) A with B and A random, frozen and common.

WEIGHTS = (1.0, 3.0, 4.0)
SHARES = (0.125, 0.375, 0.5)


@pytest.mark.parametrize("projections", [True, False])
def test_vera_shares_lambda_d_and_keeps_lambda_b(projections: bool) -> None:
    result = flk.aggregate(vera_clients(projections), rule="fedsa", weights=WEIGHTS)
    states = [vera_state(k) for k in range(3)]
    for module in ("layers.0.q", "layers.1.q"):
        key_b, key_d = (f"base_model.model.{module}.vera_lambda_{side}" for side in "bd")
        mean = sum(w * s[key_d].double() for w, s in zip(SHARES, states, strict=True))
        torch.testing.assert_close(result.shared[key_d].double(), mean, rtol=1e-6, atol=1e-7)
        for k in range(3):
            received = result.client_adapter(k).state_dict()
            assert torch.equal(received[key_b], states[k][key_b])
            assert torch.equal(received[key_d], result.shared[key_d])
    assert all(key.endswith("vera_lambda_d") for key in result.shared)


def test_vera_report_is_of_the_clients_mean_update() -> None:
    result = flk.aggregate(vera_clients(), rule="fedsa", weights=WEIGHTS)
    states = [vera_state(k) for k in range(3)]
    for module in ("layers.0.q", "layers.1.q"):
        lambda_b, lambda_d = (
            [s[f"base_model.model.{module}.vera_lambda_{side}"].double() for s in states]
            for side in "bd"
        )
        a, b = states[0][VERA_A].double(), states[0][VERA_B].double()
        mean_d = sum(w * d for w, d in zip(SHARES, lambda_d, strict=True))
        ideal = sum(
            w * lb[:, None] * (b * ld) @ a
            for w, lb, ld in zip(SHARES, lambda_b, lambda_d, strict=True)
        )
        mean = sum(
            w * lb[:, None] * (b * mean_d) @ a for w, lb in zip(SHARES, lambda_b, strict=True)
        )
        row = result.report[module]
        assert abs(row.relative_error - norm(ideal - mean) / norm(ideal)) < 1e-5
        assert abs(row.norm - norm(ideal)) < 1e-4 * norm(ideal)


@pytest.mark.parametrize("projections", [True, False])
def test_a_vera_report_says_which_width_its_norms_count(projections: bool) -> None:
    """PEFT's projections are as wide as the widest module; without them there are no norms."""
    report = flk.aggregate(vera_clients(projections), rule="fedsa").report
    said = "VeRA: PEFT cuts the projection to each module's input width"
    assert (said in report.note) == projections
    lora = flk.aggregate(draw().adapters, rule="fedsa").report
    assert "VeRA" not in lora.note


def test_vera_client_adapter_has_its_update() -> None:
    """delta() of what client k receives: diag(lambda_b) B diag(mean lambda_d) A."""
    result = flk.aggregate(vera_clients(), rule="fedsa", weights=WEIGHTS)
    states = [vera_state(k) for k in range(3)]
    module = "layers.0.q"
    key_b, key_d = (f"base_model.model.{module}.vera_lambda_{side}" for side in "bd")
    mean_d = sum(w * s[key_d].double() for w, s in zip(SHARES, states, strict=True))
    for k in range(3):
        expected = states[k][key_b].double()[:, None] * (
            (states[k][VERA_B].double() * mean_d) @ states[k][VERA_A].double()
        )
        found = result.client_adapter(k).delta(module)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_vera_projections_that_differ_are_refused() -> None:
    clients = vera_clients()
    clients[2] = flk.Adapter.from_state_dict(
        vera_state(2), vera_config(projection_prng_key=4), name="site-2"
    )
    with pytest.raises(flk.AdapterError, match=r"site-2.*projection_prng_key"):
        flk.aggregate(clients, rule="fedsa")
    tensors = vera_state(2)
    tensors[VERA_A] = tensors[VERA_A] + 1
    clients[2] = flk.Adapter.from_state_dict(tensors, vera_config(), name="site-2")
    with pytest.raises(flk.AdapterError, match=r"site-2.*vera_A"):
        flk.aggregate(clients, rule="fedsa")


@pytest.mark.parametrize("place", [0, 2])
def test_the_client_without_a_vera_module_is_named(place: int) -> None:
    clients = vera_clients()
    state = {k: x for k, x in vera_state(place).items() if "layers.1" not in k}
    clients[place] = flk.Adapter.from_state_dict(state, vera_config(), name=f"site-{place}")
    assert len(clients[place].vera) == len(clients[1].vera) - 1
    with pytest.raises(flk.AdapterError, match=rf"^client {place} .*layers.1.*has no VeRA vectors"):
        flk.aggregate(clients, rule="fedsa")


def test_vera_projections_of_some_clients_are_refused() -> None:
    clients = [*vera_clients(True)[:2], vera_clients(False)[2]]
    with pytest.raises(
        flk.AdapterError, match=r"has no tensor .*vera_A, unlike client 0.*the same"
    ):
        flk.aggregate(clients, rule="fedsa")


@pytest.mark.parametrize("rule", [rule for rule in flk.rules.names() if rule != "fedsa"])
def test_vera_with_another_rule_is_refused(rule: str) -> None:
    with pytest.raises(flk.AdapterError, match=r"site-0.*VeRA.*fedsa"):
        flk.aggregate(vera_clients(), rule=rule)


def test_vera_and_lora_clients_do_not_mix() -> None:
    lora = draw(ranks=(4,), alphas=(4,), weights=(1,))
    config = {**client_config(lora.drawn[0])}
    assert config["peft_type"] == "LORA"
    with pytest.raises(flk.AdapterError, match=r"site-0.*peft_type"):
        flk.aggregate([*vera_clients()[1:], lora.adapters[0]], rule="fedsa")
