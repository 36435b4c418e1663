"""Clients are refused over what the result depends on, and over nothing else."""

import pytest
import torch
from federation import draw
from hypothesis import given
from hypothesis import strategies as st

import fedlora_kernels as flk
from fedlora_kernels.adapters import base_model

PEFT_DEFAULTS = {
    "task_type": None,
    "revision": None,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "ensure_weight_tying": False,
    "peft_version": "0.21.0",
    "use_dora": False,
    "auto_mapping": None,
}


def clients(*changes, extras=()):
    """One client for each mapping of config fields."""
    made = []
    for index, (change, drawn) in enumerate(
        zip(changes, draw(common_a=True).adapters, strict=False)
    ):
        config = {key: value for key, value in {**drawn.config, **change}.items() if value != "-"}
        state = {**drawn.state_dict(), **(extras[index] if extras else {})}
        made.append(flk.Adapter.from_state_dict(state, config, name=f"site-{index}"))
    return made


@given(st.sets(st.sampled_from(sorted(PEFT_DEFAULTS))), st.sampled_from(flk.rules.names()))
def test_a_missing_field_means_pefts_default(missing, rule):
    """What older and newer versions wrote: the same clients, fewer fields."""
    full = {**PEFT_DEFAULTS}
    fewer = dict.fromkeys(missing, "-") | {k: v for k, v in full.items() if k not in missing}
    for order in ((full, fewer), (fewer, full)):
        made = flk.aggregate(clients(*order), rule=rule)
        plain = flk.aggregate(clients({}, {}), rule=rule)
        for module, factors in plain.adapter.factors.items():
            assert torch.equal(made.adapter.factors[module].b, factors.b)


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("qalora_group_size", 16, 32),
        ("qalora_group_size", 16, None),
        ("bias", "none", "lora_only"),
        ("fan_in_fan_out", False, True),
        ("modules_to_save", None, ["classifier"]),
        ("task_type", None, "CAUSAL_LM"),
        ("base_model_name_or_path", "", "a-base-model"),
        ("lora_dropout", 0.0, 0.1),
    ],
)
def test_fields_that_nothing_depends_on(field, one, other):
    for pair in ((one, other), (other, one)):
        assert flk.aggregate(clients(*({field: value} for value in pair)), rule="fedit").adapter


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("qalora_group_size", 16, 32),
        ("layer_replication", None, [[0, 2]]),
        ("alora_invocation_tokens", None, [5]),
    ],
)
def test_fields_that_matter(field, one, other):
    beside = {"use_qalora": True} if field == "qalora_group_size" else {}
    with pytest.raises(flk.AdapterError, match=rf"client 1 \(site-1\): {field} is .* as in client"):
        flk.Round(clients({field: one, **beside}, {field: other, **beside}))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "change",
    [
        {"base_model_name_or_path": "another/base"},
        {"layer_replication": [[0, 2]]},
        {"task_type": "SEQ_CLS"},
        {"alora_invocation_tokens": [5]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_one_of_three_that_differs_is_named(place, change):
    """Also where it is the first, with which the others do not agree."""
    (field,) = change
    made = clients(*(change if k == place else {} for k in range(3)))
    other = 1 if place == 0 else 0
    said = rf"^client {place} \(site-{place}\): {field} is .* as in client {other} \(site-{other}\)"
    with pytest.raises(flk.AdapterError, match=said):
        flk.Round(made)


SAME = [
    ("gpt2", "openai-community/gpt2"),
    ("/data/llms/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ("/home/a/Llama-3.1-8B/", "C:\\models\\llama-3.1-8b"),
    ("/c/models--meta-llama--Llama-3.1-8B/snapshots/d04e592", "meta-llama/Llama-3.1-8B"),
    ("/c/models--meta-llama--Llama-3.1-8B/snapshots/d04e592", "/mnt/llms/Llama-3.1-8B"),
    (None, "anything"),
    ("", "anything"),
]
DIFFERENT = [
    ("gpt2", "gpt2-medium"),
    ("a/gpt2", "b/gpt2"),
    ("/a/checkpoint-500", "/b/checkpoint-500"),
    ("/a/model", "/b/model"),
    ("/c/models--a--x/snapshots/1234567", "/c/models--a--y/snapshots/1234567"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_of_one_model(one, other):
    assert base_model.same(one, other)
    assert base_model.same(other, one)
    assert flk.Round(clients(*({"base_model_name_or_path": name} for name in (one, other))))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_names_that_may_be_two_models(one, other):
    found = clients(*({"base_model_name_or_path": name} for name in (one, other)))
    with pytest.raises(flk.AdapterError, match=r"client 1 \(site-1\): .*same_base=True"):
        flk.Round(found)
    assert flk.aggregate(found, rule="fedit", same_base=True).adapter


# tensors beside the factors

COUNTER = "base_model.model.norm.num_batches_tracked"
HEAD = "base_model.model.classifier.weight"
FROZEN = "base_model.model.embed_tokens.base_layer.weight"


def test_counters_are_maximized():
    extras = [{COUNTER: torch.tensor(3)}, {COUNTER: torch.tensor(5)}]
    result = flk.aggregate(clients({}, {}, extras=extras), rule="fedit")
    assert result.adapter.extras[COUNTER] == 5


def test_heads_that_stay_need_not_agree():
    extras = [{HEAD: torch.ones(3, 4)}, {HEAD: torch.ones(5, 4)}]
    found = clients({}, {"modules_to_save": ["classifier"]}, extras=extras)
    with pytest.raises(flk.AdapterError, match=rf"site-1\), tensor {HEAD}: shape .*heads='local'"):
        flk.aggregate(found, rule="fedit")
    result = flk.aggregate(found, rule="fedit", heads="local")
    assert not result.adapter.extras
    for k in range(2):
        assert torch.equal(result.client_adapter(k).extras[HEAD], extras[k][HEAD])


def test_frozen_copies_of_the_base_are_ignored():
    copy = {FROZEN: torch.ones(3, 4)}
    assert FROZEN in flk.aggregate(clients({}, {}, extras=[copy, copy]), rule="fedit").shared
    for extras in ([copy, {}], [{}, copy], [copy, {FROZEN: torch.zeros(3, 4)}]):
        result = flk.aggregate(clients({}, {}, extras=extras), rule="fedit")
        assert FROZEN not in result.adapter.extras
