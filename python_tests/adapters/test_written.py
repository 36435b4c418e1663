"""What is written opens in PEFT, runs the reported update and trains what a client's folder trains.

For all rules, whether heads are averaged or stay with their clients, and all folders: the global
adapter's, a residual's, and those of clients that receive something of their own.
"""

import copy
import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM

import fedlora_kernels as flk

CONFIGS = {
    "short names": {"target_modules": ["q_proj", "v_proj"]},
    "a regular expression": {"target_modules": r".*\.layers\.1\..*(q_proj|up_proj)"},
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "a head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rsLoRA": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def client(base, config, seed, folder):
    """A trained client's folder: A is common, as the rules that fix it expect."""
    torch.manual_seed(7)
    options = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return flk.Adapter.load(folder)


def opened(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*keys.*")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_runs(model, adapter):
    found = {
        path.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and "default" in getattr(layer, "lora_A", {})
    }
    assert found.keys() == adapter.factors.keys()
    for module, dense in found.items():
        expected = adapter.delta(module)
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rule", flk.rules.names())
def test_every_folder_opens_and_trains(rule, config, base, tmp_path):
    sites = [client(base, CONFIGS[config], k, tmp_path / f"site-{k}") for k in range(2)]
    own = trains(opened(base, tmp_path / "site-0"))
    factors = {name for name in own if ".lora_" in name}
    for heads in ("average", "local"):
        result = flk.aggregate(sites, rule=rule, weights=[1, 3], heads=heads)
        out = tmp_path / heads
        result.save(out)
        model = opened(base, out)
        assert trains(model) == (own if heads == "average" else factors)
        assert_runs(model, result.adapter)
        if result.residual is not None:
            assert_runs(opened(base, out / "residual"), result.residual)
        for k in range(len(sites) if (out / "clients").is_dir() else 0):
            model = opened(base, out / "clients" / str(k))
            assert trains(model) == own
            assert_runs(model, result.client_adapter(k))


@pytest.mark.parametrize("config", ["short names", "a head"])
@pytest.mark.parametrize("heads", ["average", "local"])
def test_auto_classes_open_it_where_they_open_a_clients(heads, config, base, tmp_path):
    sites = [client(base, CONFIGS[config], k, tmp_path / f"site-{k}") for k in range(2)]
    flk.aggregate(sites, rule="florist", heads=heads).save(tmp_path / "global")
    for folder in ("site-0", "global"):
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder).peft_config


@pytest.mark.parametrize("rule", flk.rules.names())
def test_one_rank_and_one_alpha_tell_the_whole_update(rule, base, tmp_path):
    """As a server reads it that knows r, lora_alpha and use_rslora alone."""
    sites = [client(base, CONFIGS["patterns"], k, tmp_path / f"site-{k}") for k in range(2)]
    result = flk.aggregate(sites, rule=rule, uniform_rank=True)
    result.save(tmp_path / "global")
    written = json.loads((tmp_path / "global" / "adapter_config.json").read_text())
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    root = written["r"] ** 0.5 if written["use_rslora"] else written["r"]
    for factors in result.adapter.factors.values():
        assert factors.rank == written["r"]
        assert factors.scaling == pytest.approx(written["lora_alpha"] / root, rel=1e-12)
    plain = flk.aggregate(sites, rule=rule).adapter
    for module in plain.factors:
        expected, found = plain.delta(module), result.adapter.delta(module)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
