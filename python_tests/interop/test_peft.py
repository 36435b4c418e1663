"""PEFT's add_weighted_adapter and hotswap on live models, against dense updates and PEFT's own."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

import fedlora_kernels as flk
from fedlora_kernels.interop.peft import add_weighted_adapter, hotswap

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained")

LINEAR = ("up", "down")


class Base(nn.Module):
    """One embedding and two linear layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(40, 48)
        self.up = nn.Linear(48, 36)
        self.down = nn.Linear(36, 30)

    def forward(self, tokens):
        return self.down(self.up(self.words(tokens)))


def live(*changes, dtype=torch.float32, base=Base, **common):
    """A PeftModel with the adapters a, b, c, ... , every factor drawn."""
    torch.manual_seed(0)
    model = None
    for name, change in zip("abcdef", changes, strict=False):
        fields = {"r": 8, "lora_alpha": 16, "target_modules": [*LINEAR, "words"]}
        config = LoraConfig(**{**fields, **common, **change})
        if model is None:
            model = get_peft_model(base().to(dtype), config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


def layers(model):
    found = model.base_model.model.named_modules()
    return {name: layer for name, layer in found if isinstance(layer, LoraLayer)}


def delta(layer, name):
    """What the layer adds for an adapter, in float64; zero where it has none."""
    if name not in layer.r:
        return torch.zeros_like(layer.get_base_layer().weight, dtype=torch.float64)
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return float(layer.scaling[name]) * (b.double() @ a.double()).detach()
    a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return float(layer.scaling[name]) * (b.double() @ a.double()).T.detach()


def wanted(layer, names, weights):
    """The weighted sum of the adapters' updates."""
    return sum(w * delta(layer, name) for name, w in zip(names, weights, strict=True))


def truncated(update, rank):
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def assert_near(found, expected, eps=2e-6):
    assert (found - expected).norm() <= eps * (1 + expected.norm())


# ---- PEFT's own cases --------------------------------------------------------------------------

PEFT_CASES = {
    "equal shares": (0.5, 0.5),
    "not normalized": (1.0, 1.0),
    "a difference": (1.0, -1.0),
    "one negative": (0.7, -0.3),
    "both negative": (-0.5, -0.8),
    "one zero": (0.0, 1.5),
}


@pytest.mark.parametrize("weights", PEFT_CASES.values(), ids=PEFT_CASES)
def test_cat_is_the_sum_and_svd_its_best_approximation(weights):
    model = live({}, {}, {"r": 20})
    before = {name: x.clone() for name, x in model.named_parameters()}
    add_weighted_adapter(model, ["b", "c"], weights, "svd")
    add_weighted_adapter(model, ["b", "c"], weights, "svd 5", svd_rank=5)
    add_weighted_adapter(model, ["b", "c"], weights, "cat", combination_type="cat")
    assert len(layers(model)) == 3
    for layer in layers(model).values():
        total = wanted(layer, ["b", "c"], weights)
        assert [layer.r[name] for name in ("svd", "svd 5", "cat")] == [20, 5, 28]
        assert_near(delta(layer, "cat"), total)
        assert_near(delta(layer, "svd"), truncated(total, 20))
        assert_near(delta(layer, "svd 5"), truncated(total, 5))
    for name, value in before.items():
        assert torch.equal(value, model.get_parameter(name)), "the others stay as they are"


@pytest.mark.parametrize("weight", [1.0, 2.5, -1.5, 0.4])
def test_a_single_adapter_is_weighted(weight):
    model = live({})
    for kind in ("svd", "cat", "linear"):
        add_weighted_adapter(model, ["a"], [weight], kind, combination_type=kind)
        for layer in layers(model).values():
            assert layer.r[kind] == 8
            assert_near(delta(layer, kind), weight * delta(layer, "a"))


def test_the_new_adapter_runs_when_it_is_set():
    model = live({}, {})
    active = list(model.active_adapters)
    for kind in ("svd", "cat", "linear"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], kind, combination_type=kind)
    assert list(model.active_adapters) == active
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    assert not any(f".{kind}" in name for name in trainable for kind in ("svd", "cat", "linear"))
    tokens = torch.arange(6)[None]
    outputs = []
    for kind in ("svd", "cat", "linear"):
        model.set_adapter(kind)
        assert model.active_adapters == [kind]
        outputs.append(model(tokens))
    assert all(output.isfinite().all() for output in outputs)
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.25)], ids=str)
def test_peft_agrees_where_it_is_right(kind, weights):
    """Plain adapters of one rank and alpha = rank or not, in float32."""
    model = live({}, {"lora_alpha": 4})
    other = copy.deepcopy(model)
    add_weighted_adapter(model, ["a", "b"], weights, "new", combination_type=kind)
    other.add_weighted_adapter(["a", "b"], list(weights), "new", combination_type=kind)
    for ours, theirs in zip(layers(model).values(), layers(other).values(), strict=True):
        assert ours.r["new"] == theirs.r["new"]
        assert_near(delta(ours, "new"), delta(theirs, "new"), 1e-5)


def test_adapters_of_different_modules():
    model = live({"target_modules": list(LINEAR)}, {"target_modules": ["down"], "r": 4})
    for kind, rank in (("svd", 8), ("cat", 12)):
        add_weighted_adapter(model, ["a", "b"], [1.0, -2.0], kind, combination_type=kind)
        for layer in layers(model).values():
            assert layer.r[kind] == rank
            total = wanted(layer, ["a", "b"], [1.0, -2.0])
            assert_near(delta(layer, kind), total if kind == "cat" else truncated(total, 8))


def test_other_ways_to_name_modules():
    model = live({"target_modules": r".*up"}, {"target_modules": r".*(up|down)"})
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "cat", combination_type="cat")
    for layer in layers(model).values():
        assert_near(delta(layer, "cat"), wanted(layer, ["a", "b"], [1.0, 1.0]))


# ---- where PEFT is wrong -----------------------------------------------------------------------

HARD = {
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 4}),
    "rslora of some": ({"use_rslora": True}, {"lora_alpha": 3}),
    "rank pattern": ({"rank_pattern": {"up": 3}}, {"rank_pattern": {"down": 11}}),
    "alpha pattern": ({"alpha_pattern": {"up": 3}}, {"alpha_pattern": {"down": 40}}),
    "both": ({"rank_pattern": {"up": 3}, "alpha_pattern": {"up": 9}, "use_rslora": True}, {"r": 2}),
}


@pytest.mark.parametrize("changes", HARD.values(), ids=HARD)
@pytest.mark.parametrize("kind", ["svd", "cat", "florist", "flora"])
def test_the_layers_scalings_and_ranks_are_believed(changes, kind, tmp_path):
    model = live(*changes)
    options = {"energy": 1.0} if kind == "florist" else {}
    add_weighted_adapter(model, ["a", "b"], [0.6, -1.1], "new", kind, **options)
    for layer in layers(model).values():
        total = wanted(layer, ["a", "b"], [0.6, -1.1])
        best = truncated(total, layer.r["new"]) if kind == "svd" else total
        assert_near(delta(layer, "new"), best)
    model.save_pretrained(str(tmp_path), selected_adapters=["new"])
    again = PeftModel.from_pretrained(Base(), tmp_path / "new", "new")
    for ours, saved in zip(layers(model).values(), layers(again).values(), strict=True):
        assert_near(delta(saved, "new"), delta(ours, "new"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "flora_na"])
def test_half_precision(dtype, kind):
    """The adapters' dtype; the factors are rounded once."""
    model = live({}, {}, dtype=dtype)
    add_weighted_adapter(model, ["a", "b"], [0.6, 0.4], "new", kind)
    for layer in layers(model).values():
        held = layer.lora_A if "new" in layer.lora_A else layer.lora_embedding_A
        assert getattr(held["new"], "weight", held["new"]).dtype == dtype
        total = wanted(layer, ["a", "b"], [0.6, 0.4])
        if kind in ("svd", "cat"):
            best = truncated(total, 8) if kind == "svd" else total
            assert_near(delta(layer, "new"), best, 4 * torch.finfo(dtype).eps)


# ---- every rule --------------------------------------------------------------------------------

WHOLE = {"flora": {}, "florist": {"energy": 1.0}, "fedex": {}}
"""Rules whose adapter is the weighted sum itself."""


@given(weights=st.lists(st.floats(-3, 3, width=16), min_size=3, max_size=3))
def test_signed_weights_of_any_sum(weights):
    """What has no weight has no part; the others are what they are together."""
    if not any(weights):
        weights = [1.0, -1.0, 0.0]
    model = live({}, {"lora_alpha": 5}, {"use_rslora": True}, target_modules=["down"])
    for name, options in WHOLE.items():
        add_weighted_adapter(model, ["a", "b", "c"], weights, name, name, **options)
        (layer,) = layers(model).values()
        scale = sum(abs(w) * delta(layer, x).norm() for w, x in zip(weights, "abc", strict=True))
        gap = delta(layer, name) - wanted(layer, ["a", "b", "c"], weights)
        assert gap.norm() <= 2e-5 * scale


@pytest.mark.parametrize("rule", flk.rules.names())
@pytest.mark.parametrize("unequal", [False, True], ids=["equal ranks", "unequal ranks"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_rule_gives_what_aggregate_gives(rule, unequal):
    model = live({}, {"r": 4 if unequal else 8, "lora_alpha": 3}, {}, target_modules=list(LINEAR))
    with torch.no_grad():
        if flk.rules.find(rule).trains != "both":  # its clients have one A
            for layer in layers(model).values():
                for name in "bc":
                    rank = layer.r[name]
                    layer.lora_A[name].weight.copy_(layer.lora_A["a"].weight[:rank])
    clients = [flk.Adapter.from_model(model, name, name=name) for name in "abc"]
    weights = [0.5, 0.25, 0.25]
    try:
        result = flk.aggregate(clients, rule=rule, weights=weights)
    except flk.AdapterError as error:
        with pytest.raises(flk.AdapterError, match=re.escape(str(error))):
            add_weighted_adapter(model, ["a", "b", "c"], weights, "new", rule)
        assert "new" not in model.peft_config
        return
    add_weighted_adapter(model, ["a", "b", "c"], weights, "new", rule)
    found = flk.Adapter.from_model(model, "new")
    for module, item in result.adapter.factors.items():
        if result.residual is None:
            assert torch.equal(found.factors[module].b, item.b)
            assert torch.equal(found.factors[module].a, item.a)
            assert found.factors[module].scaling == pytest.approx(item.scaling, rel=1e-12)
        else:
            both = result.adapter.delta(module) + result.residual.delta(module)
            assert_near(found.delta(module), both)


def test_a_personal_rule_and_unused_weights_are_told():
    model = live({}, {})
    with pytest.warns(UserWarning, match="fedsa shares A only: the B of 'new' is zero"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "new", "fedsa")
    with pytest.warns(UserWarning, match="weights .* were not used"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "newer", "hetlora")


# ---- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "unknown adapter": ({"adapters": ["a", "x"]}, ValueError, "no adapter 'x', found 'a', 'b'"),
    "taken": ({"adapter_name": "b"}, ValueError, "has an adapter 'b'; choose another name"),
    "unknown kind": (
        {"combination_type": "ties"},
        ValueError,
        "'ties' is none of svd, cat, linear",
    ),
    "empty kind": ({"combination_type": ""}, ValueError, "'' is none of"),
    "clamp": ({"svd_clamp": 0.9}, ValueError, "svd_clamp=0.9 changes single entries"),
    "density": ({"density": 0.5}, ValueError, "density=0.5 changes single entries"),
    "sign": ({"majority_sign_method": "frequency"}, ValueError, "majority_sign_method='freq"),
    "rank of cat": ({"combination_type": "cat", "svd_rank": 3}, ValueError, "belongs to .* 'svd'"),
    "rank 0": ({"svd_rank": 0}, ValueError, "rank must be at least 1"),
    "no option": ({"energy": 0.5}, TypeError, "'svd' has no option 'energy'"),
    "no option of a rule": (
        {"combination_type": "fedit", "energy": 0.5},
        TypeError,
        "'fedit' has no option 'energy'",
    ),
    "one weight": ({"weights": [1.0]}, flk.AdapterError, "1 weights for 2 adapters"),
    "NaN": ({"weights": [1.0, float("nan")]}, flk.AdapterError, "b: weight nan, expected a finite"),
    "Inf": ({"weights": [float("inf"), 1.0]}, flk.AdapterError, "a: weight inf, expected a finite"),
    "no weight": ({"weights": [0.0, 0.0]}, flk.AdapterError, "all weights are zero"),
    "no adapter": ({"adapters": [], "weights": []}, ValueError, "adapters names none"),
}


@pytest.mark.parametrize(("change", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_arguments_leave_the_model_as_it_was(change, kind, said):
    model = live({}, {})
    before = {name: x.clone() for name, x in model.named_parameters()}
    arguments = {"adapters": ["a", "b"], "weights": [0.5, 0.5], "adapter_name": "new", **change}
    with pytest.raises(kind, match=said):
        add_weighted_adapter(model, **arguments)
    assert list(model.peft_config) == ["a", "b"]
    assert {name: x.shape for name, x in model.named_parameters()} == {
        name: x.shape for name, x in before.items()
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["down"], "target_modules": ["up"]}, "b: modules_to_save is"),
    ],
    ids=["dora", "lora_bias", "heads"],
)
def test_refused_adapters(changes, said):
    model = live({"target_modules": ["up"]}, {"target_modules": ["up"], **changes})
    for kind in ("svd", "cat", "linear"):
        with pytest.raises(flk.AdapterError, match=said):
            add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "new", kind)
    assert list(model.peft_config) == ["a", "b"]


def test_unequal_ranks_in_linear_name_the_module():
    model = live({}, {"rank_pattern": {"down": 3}})
    with pytest.raises(flk.AdapterError, match="b, module down: rank 3, expected 8 as in a"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "new", "linear")


def test_convolutions_are_refused():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Conv2d(3, 5, 3)

    model = live({}, {}, base=Image, target_modules=["up"])
    with pytest.raises(flk.AdapterError, match=r"a, module up: found a convolution"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "new")


def test_other_models_are_refused():
    with pytest.raises(flk.AdapterError, match=r"found a Base, expected a peft.PeftModel"):
        add_weighted_adapter(Base(), ["a"], [1.0], "new")
    vera = get_peft_model(Base(), VeraConfig(r=2, target_modules=["up"]))
    with pytest.raises(flk.AdapterError, match=r"found a PeftModel of VeraModel"):
        hotswap(vera, flk.Adapter({}, {}))


# ---- hotswap -----------------------------------------------------------------------------------


def aggregate_of(model, **options):
    clients = [flk.Adapter.from_model(model, name, name=name) for name in "ab"]
    return flk.aggregate(clients, rule="florist", weights=[0.7, 0.3], **options).adapter


@pytest.mark.parametrize("energy", [0.3, 0.7, 1.0])
def test_an_aggregate_goes_into_a_running_model(energy):
    """Its ranks and scalings differ between the modules; a second adapter stays as it is."""
    source = live({}, {"use_rslora": True}, target_modules=list(LINEAR))
    adapter = aggregate_of(source, energy=energy)
    model = live({"r": 16}, {}, target_modules=list(LINEAR))
    kept = {name: delta(layer, "b") for name, layer in layers(model).items()}
    hotswap(model, adapter, "a")
    for name, layer in layers(model).items():
        assert_near(delta(layer, "a"), adapter.delta(name), 1e-7)
        assert torch.equal(delta(layer, "b"), kept[name])
    again = flk.Adapter.from_model(model, "a")
    for name in LINEAR:
        assert_near(again.delta(name), adapter.delta(name), 1e-7)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rank", [2, 7])
def test_what_peft_scales_afterwards_starts_from_the_new_scaling(rank, prepared, rslora):
    """set_scale and unscale_layer divide the layer's own lora_alpha by its r."""
    adapter = aggregate_of(live({}, {"lora_alpha": 40}, target_modules=list(LINEAR)), max_rank=rank)
    model = live({"lora_alpha": 64, "use_rslora": rslora}, target_modules=list(LINEAR))
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=12)
    hotswap(model, adapter, "a")
    for name, layer in layers(model).items():
        for factor in (1.0, 0.25):
            layer.set_scale("a", factor)
            assert_near(delta(layer, "a"), factor * adapter.delta(name), 1e-6)
        layer.unscale_layer()
        assert_near(delta(layer, "a"), adapter.delta(name), 1e-6)


@pytest.mark.parametrize("value", [1500.0, 65504.0, -65504.0])
def test_finite_numbers_with_a_large_sum_are_no_overflow(value):
    adapter = aggregate_of(live({}, {}, target_modules=["up"]), rank=4)
    tensors = {
        key: torch.full_like(x, value) if "lora_B" in key else x
        for key, x in adapter.state_dict().items()
    }
    model = live({}, target_modules=["up"], dtype=torch.float16)
    hotswap(model, flk.Adapter.from_state_dict(tensors, adapter.config), "a")
    found = layers(model)["up"].lora_B["a"].weight
    assert bool((found[:, :4] == value).all())


def test_modules_that_the_adapter_lacks_become_zero():
    adapter = aggregate_of(live({}, {}, target_modules=["up"]), max_rank=4)
    model = live({}, target_modules=list(LINEAR))
    hotswap(model, adapter, "a")
    assert not delta(layers(model)["down"], "a").any()
    assert_near(delta(layers(model)["up"], "a"), adapter.delta("up"), 1e-7)


def test_a_prepared_compiled_model_is_not_compiled_again():
    adapters = [
        aggregate_of(live({}, {"lora_alpha": 40}, target_modules=list(LINEAR)), max_rank=rank)
        for rank in (2, 7)
    ]
    model = live({}, target_modules=list(LINEAR)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    torch._dynamo.reset()
    frames = []

    def counted(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted)
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        compiled(tokens)
        built = len(frames)
        for adapter in adapters:
            hotswap(compiled, adapter, "a")
            found = compiled(tokens)
            x = model.base_model.model.words(tokens).double()
            for name in LINEAR:
                base = layers(model)[name].get_base_layer()
                x = x @ (base.weight.double() + adapter.delta(name)).T + base.bias
            assert_near(found.double(), x, 1e-5)
    assert len(frames) == built


def test_hotswap_refuses_before_it_changes_anything():
    source = live({}, {}, target_modules=list(LINEAR))
    wide = aggregate_of(source, rank=12)
    model = live({}, target_modules=list(LINEAR))
    before = {name: x.clone() for name, x in model.named_parameters()}
    with pytest.raises(flk.AdapterError, match=r"module \w+: rank 12, the model has 8; call prep"):
        hotswap(model, wide, "a")
    fits = aggregate_of(source, rank=2)
    with pytest.raises(flk.AdapterError, match="no adapter 'default', found 'a'"):
        hotswap(model, fits)
    with pytest.raises(flk.AdapterError, match="module down: the model's adapter has no such"):
        hotswap(live({}, target_modules=["up"]), fits, "a")
    with pytest.raises(flk.AdapterError, match="module words: its layer is Embedding, exp"):
        hotswap(live({}), fits, "a")
    with pytest.raises(flk.AdapterError, match="module up: the live adapter is more than B and A"):
        hotswap(live({"use_dora": True}, target_modules=list(LINEAR)), fits, "a")
    large = flk.Adapter.from_state_dict(
        {key: 1e6 * tensor for key, tensor in fits.state_dict().items()}, fits.config
    )
    with pytest.raises(flk.AdapterError, match=r"module up: overflows the model's torch.float16"):
        hotswap(live({}, target_modules=list(LINEAR), dtype=torch.float16), large, "a")
    merged = live({}, target_modules=list(LINEAR))
    merged.merge_adapter()
    with pytest.raises(
        flk.AdapterError, match=r"module up: 'a' is merged into the base weight; call"
    ):
        hotswap(merged, fits, "a")
    for name, value in before.items():
        assert torch.equal(value, model.get_parameter(name))
