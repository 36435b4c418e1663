"""rank_pattern and alpha_pattern: as PEFT reads them, in any order, however many there are."""

import json
import re

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import fedlora_kernels as flk
from fedlora_kernels.adapters import patterns
from fedlora_kernels.adapters.patterns import Patterns

SEGMENTS = ("model", "layers", "0", "1", "10", "q_proj", "v.proj", "a", "xa", "q")
NAMES = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(
    NAMES,
    NAMES.map(lambda name: name.replace(".", "_", 1)),
    NAMES.map(re.escape),
    NAMES.map(lambda name: "^" + re.escape(name)),
    st.sampled_from([".*", r"layers\.\d+\.q_proj", "[01].q_proj", "q|a", "(?:q|v).*", "q_proj$"]),
)


def of_peft(found, module, default):
    key = get_pattern_key(list(found), module)
    return found.get(key, default)


@given(st.lists(st.tuples(KEYS, st.integers(1, 99)), max_size=6).map(dict), NAMES)
def test_the_first_key_that_matches_counts(found, module):
    assert Patterns(found).value(module, 0) == of_peft(found, module, 0)


@given(st.dictionaries(NAMES, st.integers(1, 3), min_size=1, max_size=12), st.randoms())
def test_written_keys_mean_the_same_in_any_order(values, random):
    keys = list(patterns.written(values, 1).items())
    assert len(keys) <= 2
    random.shuffle(keys)
    for module, value in values.items():
        assert Patterns(dict(keys)).value(module, 1) == value
        assert of_peft(dict(keys), module, 1) == value


def adapter(modules, config):
    promised = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], **config}
    tensors = {}
    for module, rank in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 2)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(2, rank)
    return flk.Adapter.from_state_dict(tensors, promised)


def test_saving_keeps_the_order(tmp_path):
    """z before a: sorted, the second key would win."""
    config = {"alpha_pattern": {"z.*": 20, "a.z": 3, ".*": 7}}
    made = adapter({"a.z": 4, "z": 4, "b": 4}, {**config, "r": 4})
    made.save(tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"]) == [
        "z.*", "a.z", ".*",
    ]  # fmt: skip
    again = flk.Adapter.load(tmp_path)
    for module in made.factors:
        assert again.factors[module].scaling == made.factors[module].scaling
    assert again.factors["a.z"].scaling == 5.0


def test_thousands_of_patterns_are_compiled_once(monkeypatch):
    """Experts of different ranks: as many lookups as modules, and no key is compiled for each."""
    names = [f"layers.{i}.experts.{j}.{p}" for i in range(16) for j in range(64) for p in "gud"]
    ranks = {name: 1 + index % 5 for index, name in enumerate(names)}
    compiled = []
    compile_ = re.compile
    monkeypatch.setattr(
        patterns.re, "compile", lambda *args: compiled.append(args) or compile_(*args)
    )
    one_key_each = {name: rank for name, rank in ranks.items() if rank != 1}
    before = adapter(ranks, {"rank_pattern": one_key_each})
    assert len(compiled) <= 2 * len(one_key_each)  # once to check them all
    result = flk.aggregate([before, before], rule="flora")
    assert len(result.adapter.config["rank_pattern"]) <= 4
    del compiled[:]
    again = flk.Adapter.from_state_dict(result.adapter.state_dict(), result.adapter.config)
    assert {name: item.rank for name, item in again.factors.items()} == {
        name: 2 * rank for name, rank in ranks.items()
    }
    assert len(compiled) <= 16
