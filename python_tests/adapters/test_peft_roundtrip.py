"""Real PEFT folders: saved by save_pretrained, aggregated, reloaded with PeftModel."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import EPS
from federation import FIXED_A, PRODUCT_RULES, norm
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fedlora_kernels as flk

WEIGHTS = (120, 80, 300)
SHARES = (0.24, 0.16, 0.6)

RELOADED = 16.0
"""c of c eps: PEFT multiplies B and A in float32, over a rank of at most 24."""

Dense = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


@pytest.fixture(scope="session")
def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=59,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def trained(base: torch.nn.Module, config: Any, seed: int, **options: Any) -> PeftModel:
    """An adapter on a copy of the base, every trainable tensor drawn anew."""
    model = get_peft_model(copy.deepcopy(base), config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn.to(parameter.dtype))
    return model


def layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Module name -> layer, for the modules that have an adapter."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def deltas(model: PeftModel) -> Dense:
    """What PEFT says each module's weight changes by."""
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in layers(model).items()
    }


def factors(model: PeftModel) -> Dense:
    """The same from the layers' own parameters and scalings, without PEFT's rounding: s B A."""
    found = {}
    for name, layer in layers(model).items():
        if "default" in getattr(layer, "lora_embedding_A", {}):
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found[name] = layer.scaling["default"] * (b.detach().double() @ a.detach().double())
    return found


def reload(base: torch.nn.Module, folder: Path) -> PeftModel:
    """The folder on a fresh copy of the base; PEFT finds every key and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    complaints = [str(item.message) for item in caught if "adapter keys" in str(item.message)]
    assert complaints == []
    return model


def federate(
    base: torch.nn.Module, configs: Sequence[Any], place: Path, **options: Any
) -> tuple[list[Path], list[PeftModel]]:
    """Clients' folders, and the models they came from."""
    folders, models = [], []
    for k, config in enumerate(configs):
        # PEFT changes the config that it is given (it appends to modules_to_save).
        model = trained(base, copy.deepcopy(config), seed=k, **options)
        folder = place / f"site-{k}"
        model.save_pretrained(folder)
        folders.append(folder)
        models.append(model)
    return folders, models


def ideal(models: Sequence[PeftModel]) -> Dense:
    """sum_k w_k s_k B_k A_k, zero where a client lacks the module."""
    total: Dense = {}
    for share, model in zip(SHARES, models, strict=True):
        for name, dense in factors(model).items():
            total[name] = total.get(name, 0) + share * dense
    return total


def close(found: torch.Tensor, expected: torch.Tensor, scale: float, eps: float) -> bool:
    return norm(found - expected) <= RELOADED * eps * (scale + norm(expected))


def magnitude(models: Sequence[PeftModel], name: str) -> float:
    """sum_k w_k ||s_k B_k A_k||."""
    return sum(
        share * norm(factors(model)[name])
        for share, model in zip(SHARES, models, strict=True)
        if name in layers(model)
    )


def assert_served(
    base: torch.nn.Module,
    folders: Sequence[Path],
    models: Sequence[PeftModel],
    out: Path,
    rule: str,
    turned: Callable[[str], bool] = lambda name: False,
    eps: float = EPS[torch.float32],
    **options: Any,
) -> flk.Aggregation:
    """Aggregate the folders, save, reload with PEFT: the update is the one that was reported."""
    clients = [flk.Adapter.load(folder) for folder in folders]
    result = flk.aggregate(clients, rule=rule, weights=WEIGHTS, **options)
    result.save(out)
    wanted = ideal(models)
    served = reload(base, out)
    found = deltas(served)
    if result.residual is not None:
        rest = deltas(reload(base, out / "residual"))
        found = {name: dense + rest[name] for name, dense in found.items()}
    assert found.keys() == wanted.keys() == result.report.keys()
    for name, row in result.report.items():
        scale = magnitude(models, name)
        dense = found[name].mT if turned(name) else found[name]
        described = result.adapter.delta(name)
        if result.residual is not None:
            described = described + result.residual.delta(name)
        assert close(dense, described, scale, eps), f"{name}: reloaded and described differ"
        error = norm(wanted[name] - dense) / norm(wanted[name])
        room = 2 * RELOADED * eps * scale / norm(wanted[name])
        assert abs(row.relative_error - error) <= room, f"{name}: {row} but {error}"
        assert abs(row.norm - norm(wanted[name])) <= room * norm(wanted[name])
        if rule in PRODUCT_RULES and options == PRODUCT_RULES[rule]:
            assert close(dense, wanted[name], scale, eps), f"{name}: not the ideal update"
    return result


GLOBAL_RULES = [rule for rule in flk.rules.names() if rule not in ("fedsa", *FIXED_A)]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama_configs(rslora: bool, alphas: Sequence[int] = (8, 8, 8), **changes: Any) -> list[Any]:
    """Ranks and alphas per module, the same ranks in every client."""
    return [
        LoraConfig(
            r=4,
            lora_alpha=alpha,
            target_modules=TARGETS,
            rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={"v_proj": 2 * alpha, r"^model\.layers\.0\..*down_proj": 5},
            use_rslora=rslora,
            task_type="CAUSAL_LM",
            **changes,
        )
        for alpha in alphas
    ]


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("rule", GLOBAL_RULES)
def test_ranks_and_alphas_per_module(
    rule: str, rslora: bool, llama: torch.nn.Module, tmp_path: Path
) -> None:
    folders, models = federate(llama, llama_configs(rslora), tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    assert_served(llama, folders, models, tmp_path / "global", rule, **options)


@pytest.mark.parametrize("rule", ["fedit", "flora_na", "flora", "fedex", "hetlora"])
def test_mixed_scalings(rule: str, llama: torch.nn.Module, tmp_path: Path) -> None:
    """alpha 4, 8, 16, and one client with rsLoRA."""
    configs = llama_configs(rslora=False, alphas=(4, 8, 16))
    configs[1].use_rslora = True
    folders, models = federate(llama, configs, tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    assert_served(llama, folders, models, tmp_path / "global", rule, **options)


@pytest.mark.parametrize("rule", ["flora", "flexlora", "florist", "hetlora"])
def test_different_ranks_and_modules(rule: str, llama: torch.nn.Module, tmp_path: Path) -> None:
    configs = [
        LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        for rank, targets in ((8, TARGETS), (2, TARGETS[:2]), (5, TARGETS[1:]))
    ]
    folders, models = federate(llama, configs, tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    result = assert_served(llama, folders, models, tmp_path / "global", rule, **options)
    if result.rule.receives == "leading":
        for k, model in enumerate(models):
            received = reload(llama, tmp_path / "global" / "clients" / str(k))
            mine = result.client_adapter(k)
            for name, layer in layers(received).items():
                own = layers(model)[name]
                assert layer.r["default"] == own.r["default"]
                assert layer.scaling["default"] == own.scaling["default"]
                dense = deltas(received)[name]
                assert close(dense, mine.delta(name), norm(dense), EPS[torch.float32])


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_truncated_with_other_ranks_in_every_module(
    energy: float, llama: torch.nn.Module, tmp_path: Path
) -> None:
    folders, models = federate(llama, llama_configs(rslora=True), tmp_path)
    result = assert_served(llama, folders, models, tmp_path / "global", "florist", energy=energy)
    ranks = {name: row.rank for name, row in result.report.items()}
    assert len(set(ranks.values())) > 1
    found = {name: layer.r["default"] for name, layer in layers(
        reload(llama, tmp_path / "global")).items()}  # fmt: skip
    assert found == ranks


def test_uniform_rank_needs_no_patterns(llama: torch.nn.Module, tmp_path: Path) -> None:
    folders, models = federate(llama, llama_configs(rslora=False), tmp_path)
    result = assert_served(
        llama, folders, models, tmp_path / "global", "florist", energy=0.7, uniform_rank=True
    )
    served = reload(llama, tmp_path / "global")
    widest = max(row.rank for row in result.report.values())
    assert {layer.r["default"] for layer in layers(served).values()} == {widest}
    assert served.peft_config["default"].rank_pattern == {}
    assert served.peft_config["default"].alpha_pattern == {}


def test_ffa(llama: torch.nn.Module, tmp_path: Path) -> None:
    folders, models = [], []
    for k, config in enumerate(llama_configs(rslora=False, alphas=(4, 8, 16))):
        model = trained(llama, config, seed=k)
        if models:
            for name, layer in layers(model).items():
                common = layers(models[0])[name].lora_A["default"].weight
                layer.lora_A["default"].weight.data.copy_(common.data)
        model.save_pretrained(tmp_path / f"site-{k}")
        folders.append(tmp_path / f"site-{k}")
        models.append(model)
    result = assert_served(llama, folders, models, tmp_path / "global", "ffa")
    assert result.report.relative_error < 1e-6


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_fedsa(rslora: bool, llama: torch.nn.Module, tmp_path: Path) -> None:
    folders, models = federate(llama, llama_configs(rslora), tmp_path)
    clients = [flk.Adapter.load(folder) for folder in folders]
    flk.aggregate(clients, rule="fedsa", weights=WEIGHTS).save(tmp_path / "global")
    assert not any(dense.any() for dense in deltas(reload(llama, tmp_path / "global")).values())
    for k, model in enumerate(models):
        received = deltas(reload(llama, tmp_path / "global" / "clients" / str(k)))
        for name, layer in layers(model).items():
            mean = sum(
                share * layers(other)[name].lora_A["default"].weight.detach().double()
                for share, other in zip(SHARES, models, strict=True)
            )
            b = layer.lora_B["default"].weight.detach().double()
            expected = layer.scaling["default"] * b @ mean
            assert close(received[name], expected, norm(expected), EPS[torch.float32])


@pytest.mark.parametrize("projections", [True, False])
def test_fedsa_vera(projections: bool, llama: torch.nn.Module, tmp_path: Path) -> None:
    """Modules of different sizes; PEFT cuts the shared projections to each of them."""
    config = VeraConfig(
        r=6, target_modules=TARGETS, projection_prng_key=11, save_projection=projections
    )
    folders, models = federate(llama, [config] * 3, tmp_path)
    clients = [flk.Adapter.load(folder) for folder in folders]
    result = flk.aggregate(clients, rule="fedsa", weights=WEIGHTS)
    result.save(tmp_path / "global")
    total = {name: torch.zeros_like(dense) for name, dense in deltas(models[0]).items()}
    served = {name: dense.clone() for name, dense in total.items()}
    for k, model in enumerate(models):
        received = deltas(reload(llama, tmp_path / "global" / "clients" / str(k)))
        for name, layer in layers(model).items():
            lambda_b = layer.vera_lambda_b["default"].detach().double()
            mean_d = sum(
                share * layers(other)[name].vera_lambda_d["default"].detach().double()
                for share, other in zip(SHARES, models, strict=True)
            )
            a = layer.vera_A["default"].double()[:, : layer.in_features]
            b = layer.vera_B["default"].double()[: layer.out_features]
            expected = lambda_b[:, None] * ((b * mean_d) @ a)
            assert close(received[name], expected, norm(expected), EPS[torch.float32])
            total[name] += SHARES[k] * deltas(model)[name]
            served[name] += SHARES[k] * expected
    if projections:
        assert result.report.keys() == total.keys()
        for name, row in result.report.items():
            error = norm(total[name] - served[name]) / norm(total[name])
            # A file does not tell a module's width: its report is for the projection's full width.
            widest = layers(models[0])[name].in_features == clients[0].factors[name].a.shape[1]
            bound = 1e-5 if widest else 0.05 * error
            assert abs(row.relative_error - error) <= bound, f"{name}: {row} but {error}"


@pytest.mark.parametrize("rule", ["fedit", "florist", "flora", "fedex"])
def test_bert_classifier_is_averaged(rule: str, bert: torch.nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS"
    )
    folders, models = federate(bert, [config] * 3, tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    assert_served(bert, folders, models, tmp_path / "global", rule, **options)
    served = reload(bert, tmp_path / "global")
    for name in ("weight", "bias"):
        heads = [
            getattr(model.base_model.model.classifier.modules_to_save["default"], name)
            for model in (*models, served)
        ]
        mean = sum(s * head.detach().double() for s, head in zip(SHARES, heads[:3], strict=True))
        torch.testing.assert_close(heads[3].detach().double(), mean, rtol=1e-6, atol=1e-7)


def test_bert_clients_of_the_second_round_join_those_of_the_first(
    bert: torch.nn.Module, tmp_path: Path
) -> None:
    """PEFT appends classifier and score to modules_to_save each time it loads: still one set."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
    folders, _ = federate(bert, [config] * 3, tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bert), folders[1], is_trainable=True)
    again.save_pretrained(folders[1])
    listed = flk.Adapter.load(folders[1]).config["modules_to_save"]
    assert len(listed) > len(set(listed))
    clients = [flk.Adapter.load(folder) for folder in folders]
    result = flk.aggregate([clients[1], clients[0], clients[2]], rule="fedit").adapter
    assert sorted(result.config["modules_to_save"]) == sorted(set(listed))


def test_bert_classifier_stays_local_under_fedsa(bert: torch.nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
    folders, models = federate(bert, [config] * 3, tmp_path)
    clients = [flk.Adapter.load(folder) for folder in folders]
    flk.aggregate(clients, rule="fedsa", weights=WEIGHTS).save(tmp_path / "global")
    for k, model in enumerate(models):
        received = reload(bert, tmp_path / "global" / "clients" / str(k))
        own, got = (
            each.base_model.model.classifier.modules_to_save["default"].weight
            for each in (model, received)
        )
        assert torch.equal(own, got)


def test_bert_shared_adapter_of_fedsa_reloads(bert: torch.nn.Module, tmp_path: Path) -> None:
    """The saved folder holds no head; PEFT must be able to load it all the same."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS")
    folders, _ = federate(bert, [config] * 3, tmp_path)
    clients = [flk.Adapter.load(folder) for folder in folders]
    flk.aggregate(clients, rule="fedsa", weights=WEIGHTS).save(tmp_path / "global")
    served = PeftModel.from_pretrained(copy.deepcopy(bert), tmp_path / "global")
    assert not any(dense.any() for dense in deltas(served).values())


@pytest.mark.parametrize("rule", ["florist", "flora", "fedit", "fedex"])
def test_gpt2_convolutions_that_are_transposed_linears(
    rule: str, gpt2: torch.nn.Module, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    folders, models = federate(gpt2, [config] * 3, tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    assert_served(
        gpt2, folders, models, tmp_path / "global", rule, turned=lambda name: True, **options
    )


@pytest.mark.parametrize("rule", ["florist", "flora", "fedit", "fedex"])
def test_embeddings(rule: str, llama: torch.nn.Module, tmp_path: Path) -> None:
    """PEFT also saves the embedding's own weight; its mean is itself."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
    )
    folders, models = federate(llama, [config] * 3, tmp_path)
    options = PRODUCT_RULES.get(rule, {})
    assert_served(
        llama,
        folders,
        models,
        tmp_path / "global",
        rule,
        turned=lambda name: name.endswith("embed_tokens"),
        **options,
    )
    served = layers(reload(llama, tmp_path / "global"))["model.embed_tokens"]
    weight = llama.get_submodule("model.embed_tokens").weight
    torch.testing.assert_close(served.base_layer.weight, weight, rtol=1e-6, atol=0)


FILE_DTYPES = {
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "mixed_halves": (torch.bfloat16, torch.float16, torch.bfloat16),
    "mixed_widths": (torch.bfloat16, torch.float32, torch.float16),
}


@pytest.mark.parametrize("kind", FILE_DTYPES)
@pytest.mark.parametrize("rule", ["fedit", "florist", "flora", "fedex"])
def test_dtypes_of_files(rule: str, kind: str, llama: torch.nn.Module, tmp_path: Path) -> None:
    folders, models = [], []
    for k, dtype in enumerate(FILE_DTYPES[kind]):
        config = llama_configs(rslora=False)[k]
        half = copy.deepcopy(llama).to(dtype)
        model = trained(half, config, seed=k, autocast_adapter_dtype=False)
        model.save_pretrained(tmp_path / f"site-{k}")
        folders.append(tmp_path / f"site-{k}")
        models.append(model)
    same = len(set(FILE_DTYPES[kind])) == 1
    expected = FILE_DTYPES[kind][0] if same else torch.float32
    result = assert_served(
        llama,
        folders,
        models,
        tmp_path / "global",
        rule,
        eps=EPS[expected],
        **PRODUCT_RULES.get(rule, {}),
    )
    assert {item.b.dtype for item in result.adapter.factors.values()} == {expected}


class Nested(torch.nn.Module):
    """Module names that are ends of each other, and one with pattern characters."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.q = torch.nn.Linear(14, 9)
        self.special = torch.nn.ModuleDict({"a+b": torch.nn.Linear(14, 9)})
        if depth:
            self.net = Nested(depth - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x)


@pytest.mark.parametrize("special", [False, True], ids=["suffixes", "pattern_characters"])
@pytest.mark.parametrize("rule", ["florist", "fedit", "flora"])
def test_names_that_are_ends_of_each_other(rule: str, special: bool, tmp_path: Path) -> None:
    base = Nested()
    names = ["q", "net.q", "net.net.q"]
    if special:
        names += ["special.a+b", "net.special.a+b", "net.net.special.a+b"]
    generator = torch.Generator().manual_seed(6)
    ranks = {name: 2 + index for index, name in enumerate(names)}
    clients = []
    for _ in range(3):
        held: Mapping[str, flk.Factors] = {
            name: flk.Factors(
                torch.randn(9, rank, generator=generator),
                torch.randn(rank, 14, generator=generator),
                1.0 + rank,
            )
            for name, rank in ranks.items()
        }
        clients.append(flk.Adapter(held, LoraConfig(r=4, target_modules=names).to_dict()))
    result = flk.aggregate(
        [flk.Adapter(c.factors, {"peft_type": "LORA"}) for c in clients], rule=rule, weights=WEIGHTS
    )
    result.save(tmp_path / "global")
    served = deltas(reload(base, tmp_path / "global"))
    assert served.keys() == set(names)
    for name in names:
        described = result.adapter.delta(name)
        assert close(served[name], described, norm(described), EPS[torch.float32]), name


def test_modules_that_nobody_trained_stay_as_they_are(tmp_path: Path) -> None:
    """PEFT's target "q" also means net.q; what it adds there must be zero."""
    held = {"q": flk.Factors(torch.randn(9, 3), torch.randn(3, 14), 1.0)}
    result = flk.aggregate([flk.Adapter(held, {"peft_type": "LORA"})], rule="flora")
    result.save(tmp_path / "global")
    served = deltas(PeftModel.from_pretrained(Nested(), tmp_path / "global"))
    assert served.pop("q").any()
    assert not any(dense.any() for dense in served.values())


def test_live_models(llama: torch.nn.Module, tmp_path: Path) -> None:
    """from_model equals the saved folder, to_model puts a result into a client's model."""
    folders, models = federate(llama, llama_configs(rslora=True), tmp_path)
    clients = [flk.Adapter.from_model(model) for model in models]
    for folder, client in zip(folders, clients, strict=True):
        saved = flk.Adapter.load(folder).state_dict()
        live = client.state_dict()
        assert live.keys() == saved.keys()
        assert all(torch.equal(live[key], saved[key]) for key in live)
    result = flk.aggregate(clients, rule="fedit", weights=WEIGHTS)
    before = {key: tensor.clone() for key, tensor in clients[1].state_dict().items()}
    result.adapter.to_model(models[1])
    assert all(torch.equal(clients[1].state_dict()[key], before[key]) for key in before)
    for name, dense in deltas(models[1]).items():
        described = result.adapter.delta(name)
        assert close(dense, described, norm(described), EPS[torch.float32])


def test_live_model_takes_a_fitted_result(llama: torch.nn.Module) -> None:
    configs = [
        LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        for rank in (8, 2, 5)
    ]
    models = [trained(llama, config, seed=k) for k, config in enumerate(configs)]
    clients = [flk.Adapter.from_model(model) for model in models]
    result = flk.aggregate(clients, rule="flora", weights=WEIGHTS)
    with pytest.raises(flk.AdapterError, match=r"model\.layers\.0\.mlp\.down_proj.*fit"):
        result.adapter.to_model(models[1])
    wanted = ideal(models)
    result.adapter.fit(clients[1]).to_model(models[1])
    for name, dense in deltas(models[1]).items():
        values = torch.linalg.svdvals(wanted[name])
        floor = float(values[2:].square().sum().sqrt())
        room = RELOADED * EPS[torch.float32] * magnitude(models, name)
        assert norm(dense - wanted[name]) <= floor + room + 1e-4 * floor


def test_live_model_with_other_modules_is_refused(llama: torch.nn.Module) -> None:
    one = trained(llama, LoraConfig(r=4, target_modules=["q_proj"]), seed=0)
    two = trained(llama, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), seed=1)
    with pytest.raises(flk.AdapterError, match=r"v_proj.*only the model"):
        flk.Adapter.from_model(one).to_model(two)
    with pytest.raises(flk.AdapterError, match=r"v_proj.*only this adapter"):
        flk.Adapter.from_model(two).to_model(one)


def test_live_vera_model(llama: torch.nn.Module) -> None:
    config = VeraConfig(r=6, target_modules=["q_proj"], projection_prng_key=11)
    models = [trained(llama, config, seed=k) for k in range(3)]
    clients = [flk.Adapter.from_model(model) for model in models]
    result = flk.aggregate(clients, rule="fedsa", weights=WEIGHTS)
    wanted = {
        name: sum(
            share * layers(model)[name].vera_lambda_d["default"].detach().double()
            for share, model in zip(SHARES, models, strict=True)
        )
        for name in layers(models[0])
    }
    own = {n: x.vera_lambda_b["default"].detach().clone() for n, x in layers(models[2]).items()}
    result.client_adapter(2).to_model(models[2])
    for name, layer in layers(models[2]).items():
        torch.testing.assert_close(
            layer.vera_lambda_d["default"].double(), wanted[name], rtol=1e-6, atol=1e-6
        )
        assert torch.equal(layer.vera_lambda_b["default"], own[name])


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_saves_and_no_factors_represent(
    kind: str, llama: torch.nn.Module, tmp_path: Path
) -> None:
    changes, words = REFUSED[kind]
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **changes)
    folder = tmp_path / "site-0"
    get_peft_model(copy.deepcopy(llama), config).save_pretrained(folder)
    with pytest.raises(flk.AdapterError, match=words) as caught:
        flk.Adapter.load(folder)
    assert str(caught.value).startswith(str(folder))
