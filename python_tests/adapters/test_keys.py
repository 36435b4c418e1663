"""Module names: what wrappers leave in a client's keys, and names that belong to one base model."""

import re

import pytest
import torch
from federation import draw
from hypothesis import given
from hypothesis import strategies as st

import fedlora_kernels as flk
from fedlora_kernels.adapters import keys

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "module_list.0.q")


def state(names, *, seed=0, rank=2, shape=(6, 5)):
    """A is common to all seeds, as the rules that fix it expect."""
    common, generator = (torch.Generator().manual_seed(number) for number in (99, seed))
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, shape[1], generator=common)
        tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator)
    return tensors


def client(names, *, prefix="base_model.model.", name="site", **changes):
    tensors = state([prefix + own for own in names], **changes)
    return flk.Adapter.from_state_dict(tensors, CONFIG, name=name)


@st.composite
def wrapped(draw_):
    """A module's name, and a key of it as training under wrappers writes it."""
    name = draw_(st.sampled_from(NAMES))
    parts = name.split(".")
    for place in sorted(draw_(st.sets(st.integers(0, len(parts) - 1), max_size=2)), reverse=True):
        parts.insert(place, draw_(st.sampled_from(ANYWHERE)).rstrip("."))
    front = draw_(st.sampled_from(["", "module.", "model.", "_orig_mod.", "module._orig_mod."]))
    after = draw_(st.sampled_from(["", "module.", "_orig_mod.", "_fsdp_wrapped_module."]))
    return name, f"{front}base_model.model.{after}{'.'.join(parts)}"


@given(wrapped())
def test_wrappers_are_dropped(case):
    name, path = case
    assert keys.module_name(path) == name
    adapter = flk.Adapter.from_state_dict(state([path]), CONFIG)
    assert set(adapter.factors) == {name}
    assert all(key.startswith(f"base_model.model.{name}.") for key in adapter.state_dict())


@given(wrapped(), st.sampled_from(flk.rules.names()))
def test_a_wrapped_client_is_aggregated_with_the_others(case, rule):
    name, path = case
    plain = client([name], name="plain")
    other = flk.Adapter.from_state_dict(state([path], seed=1), CONFIG, name="wrapped")
    unwrapped = client([name], name="unwrapped", seed=1)
    result = flk.aggregate([plain, other], rule=rule).adapter
    assert set(result.factors) == {name}
    expected = flk.aggregate([plain, unwrapped], rule=rule).adapter
    assert torch.equal(result.delta(name), expected.delta(name))


@pytest.mark.parametrize("front", ["encoder.", "language_model.model.", "model.model.", "0."])
def test_other_text_before_the_prefix_is_refused(front):
    path = f"{front}base_model.model.{NAMES[0]}"
    with pytest.raises(flk.AdapterError, match=re.escape(f"site-3, tensor {path}.lora_A.weight")):
        flk.Adapter.from_state_dict(state([path]), CONFIG, name="site-3")


def test_one_module_under_two_prefixes_is_refused():
    tensors = state([f"base_model.model.{NAMES[0]}", f"base_model.model.module.{NAMES[0]}"])
    with pytest.raises(flk.AdapterError, match=rf"site-3, module {NAMES[0]}: .* is there twice"):
        flk.Adapter.from_state_dict(tensors, CONFIG, name="site-3")


def test_patterns_lose_the_wrappers_too():
    config = {**CONFIG, "rank_pattern": {"_orig_mod.model.layers.0.self_attn.q_proj": 3}}
    tensors = state([f"base_model.model._orig_mod.{NAMES[0]}"], rank=3)
    assert flk.Adapter.from_state_dict(tensors, config).factors[NAMES[0]].rank == 3


# between clients

VARIANTS = ("model.{}", "language_model.{}", "model.language_model.{}", "base.model.text.{}")


@given(
    st.sampled_from(VARIANTS),
    st.integers(0, 3),
    st.integers(2, 4),
    st.sampled_from(flk.rules.names()),
    st.data(),
)
def test_one_layer_under_two_names_is_refused(variant, odd, clients, rule, data):
    names = [f"layers.{index}.self_attn.q_proj" for index in range(3)]
    odd %= clients
    shared = ["layers.9.mlp.up_proj"] if data.draw(st.booleans()) else []
    everyone = [
        client([*(variant.format(name) if k == odd else name for name in names), *shared],
               name=f"site-{k}", seed=k)
        for k in range(clients)
    ]  # fmt: skip
    with pytest.raises(flk.AdapterError) as caught:
        flk.aggregate(everyone, rule=rule)
    message = str(caught.value)
    assert variant.format(names[0]) in message
    assert names[0] in message
    assert f"site-{odd}" in message


def test_inserted_segments_are_seen():
    one = client(["model.layers.0.attn.q", "shared.k"], name="one")
    other = client(["model.text.layers.0.attn.q", "shared.k"], name="other", seed=1)
    with pytest.raises(flk.AdapterError, match=r"model.text.layers.0.attn.q.*\n.*rename"):
        flk.Round([one, other])


def test_a_client_without_a_common_module_is_refused():
    one, other = client(["model.a.q"], name="one"), client(["model.b.k"], name="other")
    with pytest.raises(flk.AdapterError, match=r"client \d \(o.*\) shares no module with client"):
        flk.Round([one, other])


def test_clients_of_different_modules_that_overlap_are_accepted():
    """LoRA on some layers here and on others there is no mistake."""
    sites = [client([f"layers.{i}.q", f"layers.{i + 1}.q"], name=f"s{i}", seed=i) for i in range(3)]
    assert len(flk.Round(sites).aggregate("fedit").adapter.factors) == 4


def test_other_shapes_are_other_modules():
    tensors = state(["base_model.model.layers.0.q"])
    tensors |= state(["base_model.model.encoder.layers.0.q"], shape=(4, 3))
    both = flk.Adapter.from_state_dict(tensors, CONFIG, name="both")
    assert flk.Round([client(["layers.0.q"]), both]).aggregate("fedit").adapter.factors


def test_messages_are_short_and_name_the_client():
    """Two lines at most."""
    one, other = client(["model.a.q"], name="one"), client(["model.b.k"], name="other")
    twins = [client(["a.q"], name="one"), client(["m.a.q"], name="other")]
    for clients in ([one, other], twins):
        with pytest.raises(flk.AdapterError) as caught:
            flk.Round(clients)
        lines = str(caught.value).splitlines()
        assert len(lines) <= 2
        assert max(map(len, lines)) <= 160
        assert "(other)" in str(caught.value) or "(one)" in str(caught.value)


# tensors beside the factors


@pytest.mark.parametrize("key", ["base_model.model.classifier.weight", "base_model.model.q.bias"])
def test_an_empty_tensor_is_refused(key):
    tensors = {**state(["base_model.model.q"]), key: torch.zeros(0)}
    with pytest.raises(flk.AdapterError, match=rf"site-3, tensor {re.escape(key)}: .*gather"):
        flk.Adapter.from_state_dict(tensors, CONFIG, name="site-3")


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_an_alpha_in_the_file_must_be_the_configs(alpha):
    tensors = {**state(["base_model.model.q"]), "base_model.model.q.alpha": torch.tensor(alpha)}
    if alpha == CONFIG["lora_alpha"]:
        assert not flk.Adapter.from_state_dict(tensors, CONFIG).extras
    else:
        with pytest.raises(flk.AdapterError, match=r"site-3, module q: .* alpha 16.* says 4"):
            flk.Adapter.from_state_dict(tensors, CONFIG, name="site-3")


def test_drawn_clients_need_nothing(monkeypatch):
    """Equal names are compared as sets, nothing more."""
    monkeypatch.setattr(keys, "alike", None)
    assert flk.Round(draw().adapters).clients
