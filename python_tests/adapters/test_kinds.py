"""Adapters of every kind of layer: what PEFT applies after a round is what the round reports.

The reference shares nothing with the library: a folder's update is what ``merge_and_unload`` makes
of the base's parameters, weights and biases, minus the base, in float64.
"""

import copy
import functools
import math
import re
import time
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import fedlora_kernels as flk
from fedlora_kernels.adapters.kinds.experts import told_by
from fedlora_kernels.interop.exchange import Exchange, Reply

SHARES = (0.25, 0.75)

SIZES = {
    "vocab_size": 31,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


class Image(nn.Module):
    """Convolutions as a UNet has them, of all dimensions, beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.line, self.down = nn.Conv1d(3, 4, 5), nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.point, self.volume = nn.Conv2d(6, 5, 1), nn.Conv3d(2, 3, (1, 2, 3))
        self.out = nn.Linear(6, 4)


def whisper():
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 31}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 6}
    widths = {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_source_positions": 10}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **widths, **tokens))


def mixtral():
    sizes = {**SIZES, "intermediate_size": 12, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes))


def qwen():
    sizes = {**SIZES, "moe_intermediate_size": 6, "num_experts": 11, "head_dim": 4}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def gpt_oss():
    """Its experts' weights are transposed: [E, n, m]."""
    sizes = {**SIZES, "intermediate_size": 8, "num_local_experts": 3, "head_dim": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes))


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "convolutions": (Image, {"target_modules": ["line", "down", "point", "volume", "out"]}),
    "biases": (Image, {"target_modules": r"line|down|out", "lora_bias": True}),
    "whisper": (
        whisper,
        {"target_modules": ["conv1", "conv2", "fc1"], "lora_bias": True, "use_rslora": True},
    ),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "qwen3-moe": (
        qwen,
        {"target_modules": [], "target_parameters": BOTH, "rank_pattern": {"down_proj": 1}},
    ),
    "gpt-oss": (gpt_oss, {"target_modules": ["v_proj"], "target_parameters": BOTH[1:]}),
}


@functools.cache
def base_of(case):
    torch.manual_seed(0)
    return CASES[case][0]()


def trained(case, seed, **changes):
    """A client's model: A is common, as the rules that fix it expect."""
    base = copy.deepcopy(base_of(case))
    torch.manual_seed(7)
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, **CASES[case][1], **changes})
    model = get_peft_model(base, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return flk.Adapter.load(folder)


def opened(case, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*keys.*")
        return PeftModel.from_pretrained(copy.deepcopy(base_of(case)), folder, is_trainable=True)


def update(case, model):
    """Parameter -> what PEFT adds to it, float64."""
    before = dict(base_of(case).named_parameters())
    merged = copy.deepcopy(model).merge_and_unload()
    added = {n: p.detach().double() - before[n].double() for n, p in merged.named_parameters()}
    return {name: x.detach() for name, x in added.items() if bool(x.any())}


def together(*updates):
    """sum_k share_k update_k of (share, update)."""
    names = {name for _, added in updates for name in added}
    return {
        name: sum(share * added[name] for share, added in updates if name in added)
        for name in sorted(names)
    }


def distance(found, expected):
    """Of weights and biases together, each: Frobenius norms of the difference."""
    gap = together((1.0, found), (-1.0, expected))
    weights = math.sqrt(sum(float(x.square().sum()) for x in gap.values() if x.dim() > 1))
    biases = math.sqrt(sum(float(x.square().sum()) for x in gap.values() if x.dim() == 1))
    return weights, biases


def norm(added):
    return math.sqrt(sum(float(x.square().sum()) for x in added.values()))


def trains(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", flk.rules.names())
def test_peft_applies_what_the_report_says(rule, case, tmp_path):
    models = [trained(case, seed) for seed in (1, 2)]
    sites = [saved(model, tmp_path / f"site-{k}") for k, model in enumerate(models)]
    updates = [update(case, model) for model in models]
    ideal = together(*zip(SHARES, updates, strict=True))
    result = flk.aggregate(sites, rule=rule, weights=SHARES)
    result.save(tmp_path / "global")
    model = opened(case, tmp_path / "global")
    assert trains(model) == trains(models[0])
    room = 1e-5 * sum(map(norm, updates))
    if result.rule.personal:
        for k in range(2):
            own = opened(case, tmp_path / "global" / "clients" / str(k))
            assert trains(own) == trains(models[0])
            assert sum(distance(update(case, own), updates[k])) <= room  # A is common
        return
    applied = update(case, model)
    if result.residual is not None:
        rest = update(case, opened(case, tmp_path / "global" / "residual"))
        applied = together((1.0, applied), (1.0, rest))
    reported = math.hypot(*(row.relative_error * row.norm for row in result.report.values()))
    weights, biases = distance(applied, ideal)
    assert abs(weights - reported) <= room
    assert biases <= room


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", [n for n in flk.rules.names() if flk.rules.find(n).heterogeneous])
def test_unequal_ranks_and_one_rank_for_all(rule, case, tmp_path):
    models = [trained(case, 1), trained(case, 2, r=3, rank_pattern={}, lora_alpha=5)]
    sites = [saved(model, tmp_path / f"site-{k}") for k, model in enumerate(models)]
    applied = []
    for uniform in (False, True):
        result = flk.aggregate(sites, rule=rule, weights=SHARES, uniform_rank=uniform)
        result.save(tmp_path / "global")
        applied.append(update(case, opened(case, tmp_path / "global")))
        for k, model in enumerate(models):
            received = result.client_adapter(k)
            received.save(tmp_path / "received")
            assert trains(opened(case, tmp_path / "received")) == trains(model)
    updates = [update(case, model) for model in models]
    room = 1e-5 * sum(map(norm, updates))
    assert sum(distance(*applied)) <= room
    if rule == "flora":  # exact
        assert sum(distance(applied[0], together(*zip(SHARES, updates, strict=True)))) <= room


@pytest.mark.parametrize("case", CASES)
def test_a_live_model_gives_and_takes(case, tmp_path):
    source, target = trained(case, 1), trained(case, 2)
    found = flk.Adapter.from_model(source)
    expected = saved(source, tmp_path / "site")
    assert found.factors.keys() == expected.factors.keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    found.to_model(target)
    assert sum(distance(update(case, target), update(case, source))) == 0
    again = found.fit(flk.Adapter.from_model(trained(case, 3)))
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in found.state_dict().items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ["fedit", "florist"])
def test_a_stream_carries_the_kind(rule, case, tmp_path):
    models = [trained(case, seed) for seed in (1, 2)]
    for k, model in enumerate(models):
        model.save_pretrained(tmp_path / f"site-{k}")
        stream = flk.Stream(rule, state=tmp_path / "state")
        stream.add(tmp_path / f"site-{k}", SHARES[k])
    stream.result().save(tmp_path / "streamed")
    sites = [flk.Adapter.load(tmp_path / f"site-{k}") for k in range(2)]
    flk.aggregate(sites, rule=rule, weights=SHARES).save(tmp_path / "whole")
    one, other = (update(case, opened(case, tmp_path / name)) for name in ("streamed", "whole"))
    assert sum(distance(one, other)) <= 1e-5 * norm(other)


@pytest.mark.parametrize("absent", ["zero", "renormalize"])
def test_clients_with_some_of_the_layers(absent, tmp_path):
    """The second client has no lora_bias, and no adapter on two of the convolutions."""
    models = [
        trained("biases", 1),
        trained("biases", 2, lora_bias=False, target_modules=["out", "line"]),
    ]
    sites = [saved(model, tmp_path / f"site-{k}") for k, model in enumerate(models)]
    flk.aggregate(sites, rule="flora", weights=SHARES, absent=absent).save(tmp_path / "global")
    updates = [update("biases", model) for model in models]
    expected = together(*zip(SHARES, updates, strict=True))
    if absent == "renormalize":
        for name in ("down.weight", "down.bias"):
            expected[name] = updates[0][name]
    applied = update("biases", opened("biases", tmp_path / "global"))
    assert applied.keys() == expected.keys()
    assert sum(distance(applied, expected)) <= 1e-5 * norm(expected)


# ---- experts -----------------------------------------------------------------------------------


def replies(case, tmp_path, configs):
    clients = [saved(trained(case, seed), tmp_path / f"site-{seed}") for seed in (1, 2)]
    return clients, [
        Reply(client.state_dict(), share, client.config if configs else None)
        for share, client in zip(SHARES, clients, strict=True)
    ]


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_need_a_config_in_an_exchange(case, tmp_path):
    """A tensor of E r rows does not tell E and r apart, and would pass for a layer of rank E r."""
    clients, bare = replies(case, tmp_path, configs=False)
    exchange = Exchange("florist")
    for site, reply in zip("ab", bare, strict=True):
        exchange.receive(site, reply)
    with pytest.raises(flk.AdapterError, match=r"site a: module \S+experts") as refused:
        exchange.finish()
    for site in "ab":
        assert re.search(
            rf"site {site}: module model.layers.0.mlp.experts\S*: found the factors of experts, "
            r"\d+ rows of A, which do not tell .*; send adapter_config with the reply, or give the "
            r"server adapter_config=",
            str(refused.value),
        )
    expected = flk.aggregate(clients, rule="florist", weights=SHARES).adapter.state_dict()
    _, told = replies(case, tmp_path, configs=True)
    for sent, config in ((told, None), (bare, clients[0].config)):
        exchange = Exchange("florist", adapter_config=config)
        for site, reply in zip("ab", sent, strict=True):
            exchange.receive(site, reply)
        found = exchange.finish().adapter.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    "module", ["experts.0.w1", "mlp.shared_experts.up_proj", "model.layers.0.self_attn.q_proj"]
)
def test_lists_of_experts_and_other_layers_need_none(module):
    assert not told_by(module)


def test_three_thousand_experts_in_seconds():
    """Qwen3-MoE's 128 experts in 12 layers, both parameters: each expert has a rank of its own, and
    the file one rank per parameter.
    """
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": BOTH}
    sizes = {"": (24, 16), ".base_layer": (16, 12)}

    def client():
        tensors = {}
        for layer in range(12):
            for inside, (m, n) in sizes.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts{inside}."
                tensors[f"{key}lora_A.weight"] = torch.randn(512, n, generator=generator)
                tensors[f"{key}lora_B.weight"] = torch.randn(m, 512, generator=generator)
        return flk.Adapter.from_state_dict(tensors, config)

    clients = [client() for _ in range(4)]
    start = time.perf_counter()
    result = flk.aggregate(clients, rule="florist", energy=0.8)
    tensors = result.adapter.state_dict()
    seconds = time.perf_counter() - start
    assert len(result.adapter.factors) == len(result.report) == 3072
    assert len({row.rank for row in result.report.values()}) > 1
    for layer in range(12):
        experts = [
            tensors[f"base_model.model.model.layers.{layer}.mlp.experts{inside}.lora_A.weight"]
            for inside in sizes
        ]
        rows = {len(tensor) for tensor in experts}
        assert len(rows) == 1
        assert rows.pop() % 128 == 0
    assert seconds < 30, f"{seconds:.1f} s"
