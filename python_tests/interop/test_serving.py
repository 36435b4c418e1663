"""Folders for serving: read by the rules that vLLM and SGLang have for an adapter's folder.

The two readers know nothing of the library: they take the files, and what they make of them is
compared with the update that the report describes.
"""

import json
import math
import re

import pytest
import torch
from federation import draw, update
from safetensors.torch import load_file

import fedlora_kernels as flk

NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
"""What a server finds a module's factors by; it takes nothing else."""


def tensors_of(folder):
    """Module -> its A and B. Every tensor must be a factor, and no factor may be alone."""
    pairs = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        matched = NAME.fullmatch(key)
        assert matched, f"a server does not load {key}"
        pairs.setdefault(matched[1], {})[matched[2]] = tensor
    assert all(set(pair) == {"A", "B"} for pair in pairs.values())
    return pairs


def read_as_vllm(folder, max_lora_rank):
    """vLLM: r, lora_alpha and use_rslora of the config, one rank and scaling for all modules,
    patterns not looked at; rank at most max_lora_rank; no bias, no DoRA, no modules_to_save.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    if rank > max_lora_rank:
        raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {max_lora_rank}")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias") != "none":
        raise ValueError("the config asks for more than LoRA factors")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found = {}
    for module, pair in tensors_of(folder).items():
        assert any(
            module.split(".")[-1] == name.split(".")[-1] for name in config["target_modules"]
        )
        # One buffer of max_lora_rank for all: the leading rows and columns are filled.
        b = torch.zeros(len(pair["B"]), max_lora_rank, dtype=torch.float64)
        a = torch.zeros(max_lora_rank, pair["A"].shape[1], dtype=torch.float64)
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise ValueError(f"{module} has rank {pair['A'].shape[0]}, the config says {rank}")
        a[:rank], b[:, :rank] = pair["A"].double(), pair["B"].double()
        found[module] = scaling * (b @ a)
    return found


def read_as_sglang(folder, max_lora_rank):
    """SGLang: the same, and rank_pattern and alpha_pattern, whose keys end the module's name."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def of(pattern, module, default):
        found = [
            x
            for key, x in (config.get(pattern) or {}).items()
            if re.search(rf"(^|\.){key}$", module)
        ]
        return found[0] if found else default

    found = {}
    for module, pair in tensors_of(folder).items():
        rank = of("rank_pattern", module, config["r"])
        alpha = of("alpha_pattern", module, config["lora_alpha"])
        if rank > max_lora_rank:
            raise ValueError(f"{module} has rank {rank}, above {max_lora_rank}")
        assert (pair["A"].shape[0], pair["B"].shape[1]) == (rank, rank), module
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = scaling * (pair["B"].double() @ pair["A"].double())
    return found


def assert_served(served, result):
    """The update of the aggregate, module by module."""
    assert served.keys() == result.adapter.factors.keys()
    for module, found in served.items():
        expected = update(result.adapter, module)
        eps = torch.finfo(result.adapter.factors[module].b.dtype).eps
        assert (found - expected).norm() <= 4 * eps * expected.norm(), module


UNEQUAL = {"ranks": (8, 2, 4), "alphas": (16, 8, 4)}
ROUNDS = {
    "mixed scalings": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "rslora": {"rslora": True, "alphas": (8, 8, 8)},
    "absent modules": {"absent": {1: ["layers.0.down"]}},
}


@pytest.mark.parametrize("drawn", ROUNDS.values(), ids=ROUNDS)
@pytest.mark.parametrize("ranks", ["equal", "unequal"])
@pytest.mark.parametrize("rule", flk.rules.names())
def test_both_servers_read_one_rank(rule, ranks, drawn, tmp_path):
    kind = flk.rules.find(rule)
    if ranks == "unequal" and not kind.heterogeneous:
        with pytest.raises(flk.AdapterError):
            draw(**{**drawn, **UNEQUAL}).aggregate(rule)
        return
    round_ = draw(
        **{**drawn, **(UNEQUAL if ranks == "unequal" else {})}, common_a=kind.trains != "both"
    )
    result = round_.aggregate(rule, uniform_rank=True)
    result.adapter.save(tmp_path / "served")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert_served(read_as_vllm(tmp_path / "served", 64), result)
    assert_served(read_as_sglang(tmp_path / "served", 64), result)


def test_without_it_vllm_is_refused_and_sglang_serves(tmp_path):
    """Ranks differ between the modules: patterns, which vLLM does not look at."""
    result = draw(**UNEQUAL).aggregate("florist", energy=0.8)
    assert len({item.rank for item in result.adapter.factors.values()}) > 1
    result.adapter.save(tmp_path / "patterns")
    assert_served(read_as_sglang(tmp_path / "patterns", 64), result)
    with pytest.raises(ValueError, match=r"has rank \d+, the config says \d+"):
        read_as_vllm(tmp_path / "patterns", 64)


def test_the_largest_rank_is_the_users_to_cap(tmp_path):
    """vLLM holds 16 where it is not told more; ``max_rank`` keeps the result below."""
    round_ = draw(ranks=(8, 8, 8), alphas=(8, 8, 8))
    round_.aggregate("flora", uniform_rank=True).adapter.save(tmp_path / "whole")
    with pytest.raises(ValueError, match="LoRA rank 24 is greater than max_lora_rank 16"):
        read_as_vllm(tmp_path / "whole", 16)
    result = round_.aggregate("florist", energy=1.0, max_rank=16, uniform_rank=True)
    result.adapter.save(tmp_path / "capped")
    assert_served(read_as_vllm(tmp_path / "capped", 16), result)
