"""DoRA, asked for: the weights that PEFT computes are m V / ||V|| with the rule's V and mean m.

The reference takes s B A from PEFT's layers (``get_delta_weight``), V and its norms in float64.
"""

import copy
import functools
import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fedlora_kernels as flk
from fedlora_kernels.cli import app
from fedlora_kernels.interop.exchange import Exchange, Reply

SHARES = (0.25, 0.75)
MERGING = [name for name in flk.rules.names() if flk.rules.find(name).after == "merge"]
ADMITTED = [name for name in flk.rules.names() if name not in MERGING]


class Image(nn.Module):
    """Convolutions of all dimensions, an embedding and GPT-2's transposed linear layer."""

    def __init__(self):
        super().__init__()
        self.line, self.plane = nn.Conv1d(3, 4, 5), nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)
        self.volume, self.words = nn.Conv3d(2, 3, (1, 2, 3)), nn.Embedding(11, 7)
        self.turned, self.out = Conv1D(5, 7), nn.Linear(6, 4)


def llama():
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


IMAGE = ["line", "plane", "volume", "words", "turned", "out"]
CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
    "image": (Image, {"target_modules": IMAGE, "rank_pattern": {"plane": 3}}),
}


@functools.cache
def base_of(case):
    torch.manual_seed(0)
    return CASES[case][0]().double()


def trained(case, seed, **changes):
    """A client's model: A is common, as the rules that fix it expect."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "use_dora": True, **CASES[case][1], **changes})
    base = copy.deepcopy(base_of(case))  # which draws, the first time
    torch.manual_seed(7)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                parameter.copy_(torch.randn(parameter.shape))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
            if "magnitude" in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return flk.Adapter.load(folder)


def clients_of(models, tmp_path):
    return [saved(model, tmp_path / f"site-{k}") for k, model in enumerate(models)]


def opened(case, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base_of(case)), folder, is_trainable=True)


def layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_magnitude_vector")
    }


def terms(model):
    """Module -> W0, s B A in the weight's shape, m."""
    return {
        name: (
            layer.get_base_layer().weight.detach(),
            layer.get_delta_weight("default").detach(),
            layer.lora_magnitude_vector["default"].weight.detach().flatten(),
        )
        for name, layer in layers(model).items()
    }


def rescaled(weight, magnitude, name):
    """m V / ||V||; the outputs of embeddings and of Conv1D are the columns of their weights."""
    if "words" in name or "turned" in name:
        return rescaled(weight.T, magnitude, "").T
    rows = weight.flatten(1)
    return (magnitude[:, None] * rows / rows.norm(dim=1, keepdim=True)).view_as(weight)


def in_shape(delta, weight, name):
    """A [m, n] update in a weight's shape."""
    return (delta.T if "words" in name or "turned" in name else delta).reshape(weight.shape)


def merged(case, folder):
    return dict(opened(case, folder).merge_and_unload().named_parameters())


def assert_near(found, expected, name):
    assert (found - expected).norm() <= 1e-12 * (1 + expected.norm()), name


def means(models):
    """Module -> sum_k share_k s_k B_k A_k and sum_k share_k m_k, float64."""
    known = [terms(model) for model in models]
    return {
        name: [
            sum(share * one[name][place] for share, one in zip(SHARES, known, strict=True))
            for place in (1, 2)
        ]
        for name in known[0]
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [2, 3])
def test_an_exact_rule_gives_the_whole_direction(case, rank, tmp_path):
    models = [trained(case, 1), trained(case, 2, r=rank, lora_alpha=5, rank_pattern={})]
    clients = clients_of(models, tmp_path)
    result = flk.aggregate(
        clients, rule="florist", energy=1.0, weights=SHARES, magnitudes="average"
    )
    result.save(tmp_path / "global")
    found = merged(case, tmp_path / "global")
    for name, (direction, magnitude) in means(models).items():
        weight = terms(models[0])[name][0]
        expected = rescaled(weight + direction, magnitude, name)
        assert_near(found[f"{name}.weight"], expected, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", ADMITTED)
def test_every_rule_gives_its_factors_beside_the_mean(rule, case, tmp_path):
    models = [trained(case, seed) for seed in (1, 2)]
    clients = clients_of(models, tmp_path)
    result = flk.aggregate(clients, rule=rule, weights=SHARES, magnitudes="average")
    result.save(tmp_path / "global")
    assert result.report.note.endswith("before the magnitudes rescale the weight")
    written = json.loads((tmp_path / "global" / "report.json").read_text())
    assert written["note"] == result.report.note
    if result.rule.personal:
        assert result.adapter.config["use_dora"] is False
        for k, client in enumerate(clients):
            own = saved(opened(case, tmp_path / "global" / "clients" / str(k)), tmp_path / "own")
            for key, tensor in own.state_dict().items():
                assert torch.equal(tensor, client.state_dict()[key])  # A is common
        assert not any("magnitude" in key for key in result.shared)
        return
    found = merged(case, tmp_path / "global")
    for name, (direction, magnitude) in means(models).items():
        weight = terms(models[0])[name][0]
        delta = in_shape(result.adapter.delta(name), weight, name)
        assert_near(found[f"{name}.weight"], rescaled(weight + delta, magnitude, name), name)
        row = result.report[name]
        of_update = float((delta - direction).norm() / direction.norm())
        assert abs(row.relative_error - of_update) <= 1e-7
    trainable = {n for n, p in models[0].named_parameters() if p.requires_grad}
    again = opened(case, tmp_path / "global")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("rule", ["flexlora", "hetlora"])
def test_a_client_of_another_rank_receives_the_mean(rule, tmp_path):
    models = [trained("image", 1), trained("image", 2, r=3, rank_pattern={})]
    clients = clients_of(models, tmp_path)
    result = flk.aggregate(clients, rule=rule, weights=SHARES, magnitudes="average")
    for k, client in enumerate(clients):
        received = result.client_adapter(k)
        assert received.state_dict().keys() == client.state_dict().keys()
        for name, (_, magnitude) in means(models).items():
            assert received.factors[name].rank == client.factors[name].rank
            assert_near(received.factors[name].magnitude, magnitude, name)


@pytest.mark.parametrize("rule", MERGING)
def test_rules_that_merge_refuse(rule, tmp_path):
    clients = clients_of([trained("llama", 1)], tmp_path)
    with pytest.raises(flk.AdapterError, match=rf"site-0\): found DoRA, and rule '{rule}' adds"):
        flk.aggregate(clients, rule=rule, magnitudes="average")


REFUSED = (
    r"client 0 \(.*site-0\), module \S+: found DoRA, whose magnitudes rescale the whole weight.*"
    r"magnitudes='average' \(--magnitudes average\).*use_dora=False"
)


def test_refused_unless_asked_for(tmp_path):
    clients = clients_of([trained("llama", 1)], tmp_path)
    for call in (
        lambda: flk.aggregate(clients, rule="florist"),
        lambda: flk.Round(clients),
        lambda: flk.Stream("fedit", state=tmp_path / "sums").add(clients[0]),
        lambda: flk.Stream("florist", state=tmp_path / "kept").add(tmp_path / "site-0"),
    ):
        with pytest.raises(flk.AdapterError, match=REFUSED):
            call()
    with pytest.raises(ValueError, match="magnitudes must be average or None, found 'mean'"):
        flk.aggregate(clients, rule="florist", magnitudes="mean")


def test_clients_that_disagree_are_refused(tmp_path):
    clients = clients_of([trained("llama", 1), trained("llama", 2, use_dora=False)], tmp_path)
    with pytest.raises(flk.AdapterError, match=r"client 1 .*use_dora is False, expected True as"):
        flk.aggregate(clients, rule="florist", magnitudes="average")


def damaged(tmp_path, change):
    trained("image", 1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


PLANE = "base_model.model.plane.lora_magnitude_vector"
DAMAGES = {
    "missing": (lambda x: x.pop(PLANE), "found no lora_magnitude_vector of module plane"),
    "shape": (
        lambda x: x.update({PLANE: torch.ones(6)}),
        r"module plane: lora_magnitude_vector is torch.float32 \[6\], expected \[1, 6, 1, 1\]",
    ),
    "NaN": (
        lambda x: x.update({PLANE: x[PLANE] * math.nan}),
        "module plane.lora_magnitude_vector: 6 of 6 entries are NaN or Inf",
    ),
    "name": (
        lambda x: x.update({f"{PLANE}.default.weight": x.pop(PLANE)}),
        r"lora_magnitude_vector.default.weight: found a factor under a name that PEFT does not",
    ),
}


@pytest.mark.parametrize(("change", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_magnitudes(change, said, tmp_path):
    with pytest.raises(flk.AdapterError, match=said):
        flk.Adapter.load(damaged(tmp_path, change))


def test_magnitudes_without_use_dora(tmp_path):
    client = saved(trained("image", 1), tmp_path)
    with pytest.raises(flk.AdapterError, match=r"use_dora is not set: found a lora_magnitude_vec"):
        flk.Adapter.from_state_dict(client.state_dict(), {**client.config, "use_dora": False})


def test_a_client_without_a_module(tmp_path):
    """The magnitude that it counts with would be the base's, which the server does not have."""
    models = [trained("image", 1), trained("image", 2, target_modules=IMAGE[1:])]
    clients = clients_of(models, tmp_path)
    ask = {"rule": "florist", "energy": 1.0, "magnitudes": "average"}
    with pytest.raises(flk.AdapterError, match=r"client 1 .*module line: found no DoRA magnitudes"):
        flk.aggregate(clients, **ask, weights=SHARES)
    result = flk.aggregate(clients, **ask, weights=SHARES, absent="renormalize")
    assert_near(result.adapter.factors["line"].magnitude, terms(models[0])["line"][2], "line")
    assert_near(result.adapter.delta("line"), clients[0].delta("line"), "line")
    with pytest.raises(flk.AdapterError, match="module line: all clients that have it have weight"):
        flk.aggregate(clients, **ask, weights=[0, 1], absent="renormalize")
    streams = [
        flk.Stream(rule, state=tmp_path / rule, magnitudes="average", absent="renormalize")
        for rule in ("fedit", "florist")
    ]
    for stream in streams:
        for client, weight in zip(clients, (0, 1), strict=True):
            stream.add(client, weight)
        with pytest.raises(flk.AdapterError, match="module line: all clients that have it have"):
            stream.result()


def test_a_dtype_that_cannot_hold_the_mean(tmp_path):
    model = trained("image", 1)
    with torch.no_grad():
        layers(model)["plane"].lora_magnitude_vector["default"].weight.fill_(1e5)
    clients = clients_of([model], tmp_path)
    with pytest.raises(flk.AdapterError, match="module plane: the mean of the DoRA magnitudes"):
        flk.aggregate(clients, rule="florist", magnitudes="average", dtype=torch.float16)


@pytest.mark.parametrize("rule", ["fedit", "ffa", "florist", "fedsa"])
def test_a_stream_gives_what_a_round_gives(rule, tmp_path):
    clients = clients_of([trained("image", seed) for seed in (1, 2)], tmp_path)
    for k in range(2):
        stream = flk.Stream(rule, state=tmp_path / "state", magnitudes="average")
        stream.add(tmp_path / f"site-{k}", SHARES[k])
    found = stream.result().adapter
    expected = flk.aggregate(clients, rule=rule, weights=SHARES, magnitudes="average").adapter
    assert found.config == expected.config
    for name, item in expected.factors.items():
        assert_near(found.delta(name), expected.delta(name), name)
        if rule != "fedsa":
            assert_near(found.factors[name].magnitude, item.magnitude, name)
    with pytest.raises(ValueError, match="holds a stream of magnitudes average, found None"):
        flk.Stream(rule, state=tmp_path / "state")


def test_the_command_line(tmp_path):
    models = [trained("llama", seed) for seed in (1, 2)]
    clients_of(models, tmp_path)
    sites = [str(tmp_path / f"site-{k}") for k in range(2)]
    out = str(tmp_path / "global")
    refused = CliRunner().invoke(app, ["aggregate", *sites, "--out", out])
    assert refused.exit_code != 0
    assert "--magnitudes average" in refused.output
    asked = ["aggregate", *sites, "--out", out, "--weights", "1,3", "--magnitudes", "average"]
    found = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert found.exit_code == 0
    assert "those of the direction" in found.output
    adapter = flk.Adapter.load(out)
    for name, (_, magnitude) in means(models).items():
        assert_near(adapter.factors[name].magnitude, magnitude, name)
    shown = CliRunner().invoke(app, ["inspect", *sites], catch_exceptions=False)
    assert "DoRA" in shown.output


def test_a_live_model_gives_and_takes(tmp_path):
    source, target = trained("image", 1), trained("image", 2)
    found = flk.Adapter.from_model(source)
    expected = saved(source, tmp_path / "site")
    assert found.state_dict().keys() == expected.state_dict().keys()
    found.to_model(target)
    for name, (_, delta, magnitude) in terms(target).items():
        assert torch.equal(delta, terms(source)[name][1]), name
        assert torch.equal(magnitude, terms(source)[name][2]), name


def test_a_template_of_another_kind_is_refused(tmp_path):
    dora = saved(trained("image", 1), tmp_path / "dora")
    plain = saved(trained("image", 1, use_dora=False), tmp_path / "plain")
    with pytest.raises(flk.AdapterError, match="the update has no DoRA magnitudes, the template"):
        plain.fit(dora)
    with pytest.raises(flk.AdapterError, match="the update is DoRA, the template's is a"):
        dora.fit(plain)
    again = dora.fit(saved(trained("image", 3, r=5), tmp_path / "wide"))
    for name, item in dora.factors.items():
        assert torch.equal(again.factors[name].magnitude, item.magnitude)
        assert_near(again.delta(name), dora.delta(name), name)
    assert all(item.magnitude is None for item in dora.direction.factors.values())


# ---- through Flower's and NVFlare's exchange ---------------------------------------------------


def reply(adapter, weight, config=True):
    return Reply(adapter.state_dict(), weight, adapter.config if config else None)


@pytest.mark.parametrize("configs", [True, False], ids=["config", "no config"])
def test_an_exchange_sends_the_mean(configs, tmp_path):
    """A server that is started again goes on; without a config the scalings are 1."""
    models = [trained("image", 1), trained("image", 2, r=2 if not configs else 3, rank_pattern={})]
    if not configs:
        models = [trained("image", seed, rank_pattern={}) for seed in (1, 2)]
    clients = clients_of(models, tmp_path)
    settings = {"magnitudes": "average", "state": tmp_path / "server"}
    rule = "flexlora" if configs else "fedit"
    exchange = Exchange(rule, **settings)
    for number in range(2):
        exchange.begin()
        for k, client in enumerate(clients):
            exchange.receive(k, reply(client, SHARES[k], configs))
        exchange.finish()
        assert not exchange.lost
        exchange = Exchange(rule, **settings) if number == 0 else exchange
        for k, client in enumerate(clients):
            tensors = exchange.start(k).tensors
            assert {n: x.shape for n, x in tensors.items()} == {
                n: x.shape for n, x in client.state_dict().items()
            }
            for name, (_, magnitude) in means(models).items():
                found = tensors[f"base_model.model.{name}.lora_magnitude_vector"]
                assert_near(found.flatten(), magnitude, name)
    new = exchange.start("new").tensors
    for name, (_, magnitude) in means(models).items():
        found = new[f"base_model.model.{name}.lora_magnitude_vector"].flatten()
        assert_near(found, magnitude, name)


def test_an_exchange_refuses_unless_asked(tmp_path):
    clients = clients_of([trained("llama", seed) for seed in (1, 2)], tmp_path)
    exchange = Exchange("florist")
    for k, client in enumerate(clients):
        exchange.receive(k, reply(client, 1))
    with pytest.raises(flk.AdapterError, match=r"node 1.*--magnitudes average"):
        exchange.finish()


def test_under_a_personal_rule_magnitudes_stay_with_their_clients(tmp_path):
    """A node that is new starts from the magnitudes that the server was given."""
    clients = clients_of([trained("image", seed) for seed in (1, 2)], tmp_path)
    initial = saved(get_peft_model(copy.deepcopy(base_of("image")), LoraConfig(
        r=2, lora_alpha=3, use_dora=True, **CASES["image"][1])), tmp_path / "initial")  # fmt: skip
    exchange = Exchange("fedsa", magnitudes="average")
    exchange.give(initial.state_dict())
    for k, client in enumerate(clients):
        exchange.receive(k, reply(client, SHARES[k]))
    exchange.finish()
    for k, client in enumerate(clients):
        sent = exchange.start(k).tensors
        for key, tensor in client.state_dict().items():
            if "magnitude" in key or "lora_B" in key:
                assert torch.equal(sent[key], tensor), key
    for key, tensor in exchange.start("new").tensors.items():
        if "magnitude" in key:
            assert torch.equal(tensor, initial.state_dict()[key]), key
        if "lora_B" in key or "lora_embedding_B" in key:
            assert not tensor.any(), key
