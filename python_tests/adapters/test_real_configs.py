"""The kinds of configuration that published adapters carry, each on a small model of its family.

Which model, which targets, which task, which further fields: one line a kind that was seen. Two
clients with such a configuration are combined, and what is written opens in PEFT on that model and
runs the reported update.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import fedlora_kernels as flk

SMALL = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1, "pad_token_id": 0}
GPT2 = {
    "vocab_size": 24,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "pad_token_id": 0,
}
ENCODER = {**SMALL, "intermediate_size": 12, "max_position_embeddings": 16}
DISTILBERT = {"vocab_size": 24, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}
T5 = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
WHISPER = {
    "vocab_size": 24,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_mel_bins": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VIT = {**ENCODER, "image_size": 8, "patch_size": 4}

FAMILIES = {
    "llama": ("CausalLM", {**GATED, "head_dim": 4}),
    "qwen2": ("CausalLM", GATED),
    "qwen3": ("CausalLM", {**GATED, "head_dim": 4}),
    "gemma": ("CausalLM", {**GATED, "head_dim": 4}),
    "phi": ("CausalLM", GATED),
    "gpt2": ("CausalLM", GPT2),
    "gpt_neo": (
        "CausalLM",
        {**SMALL, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("CausalLM", {**SMALL, "intermediate_size": 12}),
    "bloom": ("CausalLM", {"vocab_size": 24, "hidden_size": 8, "n_layer": 2, "n_head": 2}),
    "falcon": ("CausalLM", SMALL),
    "bert": ("SequenceClassification", ENCODER),
    "distilbert": ("SequenceClassification", DISTILBERT),
    "esm": ("TokenClassification", {**ENCODER, "pad_token_id": 0}),
    "t5": ("Seq2SeqLM", T5),
    "whisper": ("SpeechSeq2Seq", WHISPER),
    "vit": ("ImageClassification", VIT),
}
"""Of each family: what its model is for, and its sizes."""

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LM, CLASSES = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}
LAYER_1 = r".*\.layers\.1\..*(q_proj|k_proj|v_proj|o_proj)$"

CONFIGS = {
    "llama, two of seven": ("llama", {"target_modules": ["q_proj", "v_proj"], **LM}),
    "llama, all": ("llama", {"target_modules": ALL, **LM}),
    "llama, names said twice": ("llama", {"target_modules": ALL + ALL[::-1], **LM}),
    "llama, all-linear": ("llama", {"target_modules": "all-linear", **LM}),
    "llama, PEFT's own targets": ("llama", LM),
    "llama, rsLoRA": ("llama", {"target_modules": ALL, "use_rslora": True, **LM}),
    "llama, embeddings and head": (
        "llama",
        {"target_modules": [*ALL, "embed_tokens", "lm_head"], **LM},
    ),
    "llama, a layer's own rank and alpha": (
        "llama",
        {
            "target_modules": ALL,
            "rank_pattern": {LAYER_1: 4},
            "alpha_pattern": {LAYER_1: 16},
            **LM,
        },
    ),
    "llama, no task": ("llama", {"target_modules": ALL}),
    "qwen2, whole embeddings and head": (
        "qwen2",
        {"target_modules": ALL, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "qwen3, all": ("qwen3", {"target_modules": ALL, **LM}),
    "qwen3, a regular expression": (
        "qwen3",
        {"target_modules": r"(.*(model).*(down_proj|gate_proj|k_proj|q_proj).*$|.*(nothing).*$)"},
    ),
    "gemma, the first layer": (
        "gemma",
        {"target_modules": ALL[:4], "layers_to_transform": [0], **LM},
    ),
    "phi": ("phi", {"target_modules": ["q_proj", "v_proj", "k_proj", "dense"], **LM}),
    "gpt2, both projections": (
        "gpt2",
        {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True, **LM},
    ),
    "gpt2, full names": (
        "gpt2",
        {"target_modules": ["attn.c_attn", "attn.c_proj"], "fan_in_fan_out": True, **LM},
    ),
    "gpt2, fan_in_fan_out left to PEFT": ("gpt2", {"target_modules": ["c_attn"], **LM}),
    "gpt_neo": ("gpt_neo", {"target_modules": ["q_proj", "v_proj"], **LM}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"], **LM}),
    "bloom": ("bloom", {"target_modules": ["query_key_value"], **LM}),
    "falcon": (
        "falcon",
        {"target_modules": ["dense_h_to_4h", "query_key_value", "dense", "dense_4h_to_h"], **LM},
    ),
    "bert with its head": ("bert", {"target_modules": ["query", "value"], **CLASSES}),
    "bert, no task": ("bert", {"target_modules": ["query", "value"]}),
    "distilbert, both heads": (
        "distilbert",
        {
            "target_modules": ["q_lin", "v_lin"],
            "modules_to_save": ["pre_classifier", "classifier", "classifier", "score"],
            **CLASSES,
        },
    ),
    "esm": ("esm", {"target_modules": ["query", "key", "value"], "task_type": "TOKEN_CLS"}),
    "t5": ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "whisper, no task": ("whisper", {"target_modules": ["q_proj", "v_proj"]}),
    "vit, its classifier whole": (
        "vit",
        {"target_modules": ["v_proj", "q_proj"], "modules_to_save": ["classifier"]},
    ),
}

YOUNGER = {"qalora_group_size": 16, "lora_bias": False, "ensure_weight_tying": False}
"""Fields of some versions of PEFT that hold what a version without them means."""


def base_of(family):
    torch.manual_seed(0)
    kind, sizes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **sizes)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config)


def client(base, options, seed, folder):
    """A trained client's folder; A is common, as the rules that fix it expect."""
    torch.manual_seed(7)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 2, "lora_alpha": 6, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A." not in name and "embedding_A" not in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)


def as_written_by_another_version(folder, changes):
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    for name in YOUNGER:
        fields.pop(name, None)
    path.write_text(json.dumps({**fields, **changes}))


def assert_runs(base, folder, adapter):
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    prefix = "base_model.model."
    found = {
        path.removeprefix(prefix): layer.get_delta_weight("default")
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and "default" in {**layer.lora_A, **layer.lora_embedding_A}
    }
    assert found.keys() == adapter.factors.keys()
    for module, update in found.items():
        stored = model.get_base_model().get_submodule(module)
        flipped = isinstance(stored.get_base_layer(), torch.nn.Embedding) or getattr(
            stored, "fan_in_fan_out", False
        )
        dense = (update.T if flipped else update).double()
        expected = adapter.delta(module)
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5 * size)


def assert_round_trip(rule, config, folder: Path):
    family, options = CONFIGS[config]
    base = base_of(family)
    for k in range(2):
        client(base, options, k, folder / f"site-{k}")
    as_written_by_another_version(folder / "site-1", YOUNGER)
    sites = [flk.Adapter.load(folder / f"site-{k}") for k in range(2)]
    result = flk.aggregate(sites, rule=rule, weights=[1, 3])
    result.save(folder / "global")
    assert_runs(base, folder / "global", result.adapter)
    if result.residual is not None:
        assert_runs(base, folder / "global" / "residual", result.residual)
    for k in range(2 if (folder / "global" / "clients").is_dir() else 0):
        assert_runs(base, folder / "global" / "clients" / str(k), result.client_adapter(k))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rule", ["fedsa", "florist"])
def test_configs_of_published_adapters(rule, config, tmp_path):
    """Folders of clients, and ranks that differ by module: what is hardest to write."""
    assert_round_trip(rule, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rule", flk.rules.names())
def test_configs_of_published_adapters_with_every_rule(rule, config, tmp_path):
    assert_round_trip(rule, config, tmp_path)
