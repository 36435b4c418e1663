"""Live models: what their layers compute is read, whatever they are wrapped in."""

import re

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

import fedlora_kernels as flk

MODULES = ("first", "inner.second")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.inner = nn.Module()
        self.inner.second = nn.Linear(6, 8)

    def forward(self, x):
        return self.inner.second(self.first(x))


def trained(seed=0, adapter_name="default", **changes):
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"], **changes}
    model = get_peft_model(Base(), LoraConfig(**options), adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model


def assert_runs(adapter, model, name="default"):
    """The adapter's update is what the model's layers add to their weights."""
    assert set(adapter.factors) == set(MODULES)
    for module in MODULES:
        layer = model.get_submodule(f"base_model.model.{module}")
        expected = layer.get_delta_weight(name).detach().double()
        torch.testing.assert_close(adapter.delta(module), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "compiled": torch.compile,
    "distributed": lambda model: nn.parallel.DistributedDataParallel(model),
    "compiled-distributed": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "distributed-compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("alone")
def test_wrapped_models_are_read_and_written(wrap):
    model, other = trained(1), trained(2)
    wrapped = wrap(model)
    assert_runs(flk.Adapter.from_model(wrapped), model)
    flk.Adapter.from_model(other).to_model(wrapped)
    assert_runs(flk.Adapter.from_model(other), model)


def test_a_model_that_has_diverged_is_written_to():
    model, other = trained(1), trained(2)
    with torch.no_grad():
        model.get_submodule("base_model.model.first").lora_B.default.weight.fill_(float("nan"))
    with pytest.raises(flk.AdapterError, match="NaN or Inf"):
        flk.Adapter.from_model(model)
    flk.Adapter.from_model(other).to_model(model)
    assert_runs(flk.Adapter.from_model(other), model)


@pytest.mark.usefixtures("alone")
def test_sharded_models_are_gathered_and_written():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, same, other = trained(1), trained(1), trained(2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert_runs(flk.Adapter.from_model(model), same)
    flk.Adapter.from_model(other).to_model(model)
    assert_runs(flk.Adapter.from_model(model), other)


def test_layers_inside_are_wrapped_too():
    """torch.compile and activation checkpointing of single blocks rename what is below them."""
    model = trained(1)
    inner = model.base_model.model.inner
    model.base_model.model.inner = torch.compile(inner)
    adapter = flk.Adapter.from_model(model)
    assert set(adapter.factors) == set(MODULES)


@pytest.mark.parametrize("factor", [0.25, 1.0, 7.5])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"first": 3}}])
def test_the_layers_scaling_is_believed(factor, changes):
    model = trained(1, **changes)
    model.base_model.model.first.set_scale("default", factor)
    assert_runs(flk.Adapter.from_model(model), model)


def test_scalings_survive_a_folder(tmp_path):
    model = trained(1)
    model.base_model.model.inner.second.scale_layer(0.3)
    flk.Adapter.from_model(model).save(tmp_path / "site")
    assert_runs(flk.Adapter.load(tmp_path / "site"), model)


def test_the_only_adapter_is_taken_whatever_its_name():
    model = trained(1, adapter_name="berlin")
    assert_runs(flk.Adapter.from_model(model), model, "berlin")
    flk.Adapter.from_model(trained(2)).to_model(model)


def test_several_adapters_are_listed():
    model = trained(1, adapter_name="berlin")
    model.add_adapter("rome", LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(flk.AdapterError, match=r"site-3: .*'berlin', 'rome'; give adapter_name"):
        flk.Adapter.from_model(model, name="site-3")
    with pytest.raises(flk.AdapterError, match=r"site-3: .* no adapter 'default', found 'berlin'"):
        flk.Adapter.from_model(model, "default", name="site-3")
    assert set(flk.Adapter.from_model(model, "rome").factors) == {"first"}


def test_merged_layers_are_refused():
    model = trained(1)
    model.merge_adapter()
    with pytest.raises(flk.AdapterError, match=r"site-3, module first: .*unmerge_adapter"):
        flk.Adapter.from_model(model, name="site-3")
    model.unmerge_adapter()
    assert flk.Adapter.from_model(model).factors


def test_disabled_layers_are_refused():
    model = trained(1)
    with (
        model.disable_adapter(),
        pytest.raises(flk.AdapterError, match=r"site-3, module first: .*disable_adapter\(\)"),
    ):
        flk.Adapter.from_model(model, name="site-3")
    assert flk.Adapter.from_model(model).factors


def test_tensors_that_are_not_in_memory_are_refused():
    model = trained(1)
    model.base_model.model.inner.second.lora_B.to("meta")
    with pytest.raises(flk.AdapterError, match=r"site-3, module inner.second: .*meta device"):
        flk.Adapter.from_model(model, name="site-3")


@pytest.mark.parametrize("model", [Base(), "a path", None], ids=["plain", "text", "none"])
def test_what_has_no_adapters_is_refused(model):
    kind = re.escape(type(model).__name__)
    with pytest.raises(flk.AdapterError, match=rf"site-3: found a {kind} without adapters"):
        flk.Adapter.from_model(model, name="site-3")


def test_a_model_that_holds_the_adapted_one_says_where():
    holder = nn.Module()
    holder.policy = trained(1)
    with pytest.raises(flk.AdapterError, match=r"site-3: .* as 'policy'; give that model itself"):
        flk.Adapter.from_model(holder, name="site-3")


def test_vera_is_read_and_written():
    torch.manual_seed(0)
    config = VeraConfig(r=4, target_modules=["first"], save_projection=True)
    model, other = get_peft_model(Base(), config), get_peft_model(Base(), config)
    with torch.no_grad():
        other.base_model.model.first.vera_lambda_b["default"].normal_()
    flk.Adapter.from_model(other).to_model(model)
    found = flk.Adapter.from_model(model).vera["first"][0]
    assert torch.equal(found, other.base_model.model.first.vera_lambda_b["default"])


def test_a_model_of_other_ranks_stays_as_it_was():
    model, other = trained(1), trained(2, r=3)
    before = flk.Adapter.from_model(model).state_dict()
    with pytest.raises(flk.AdapterError, match=r"site-3, module first: B, A and scaling"):
        flk.Adapter.from_model(other, name="site-3").to_model(model)
    after = flk.Adapter.from_model(model).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---- a base in few bits ------------------------------------------------------------------------


def quantized(seed):
    """The base of the second module lies in floats of 8 bits."""
    model = trained(seed)
    layer = model.base_model.model.inner.second.get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


@pytest.mark.parametrize("rule", ["flora", "fedex", "fedmomentum", "florist"])
def test_rules_that_merge_say_what_a_quantized_base_would_lose(rule):
    plain, odd = flk.Adapter.from_model(trained(1)), flk.Adapter.from_model(quantized(2))
    assert plain.quantized is None
    assert odd.quantized == "module inner.second is a Linear"
    result = flk.aggregate([plain, odd], rule=rule)
    merges = result.rule.after == "merge"
    said = "client 1, module inner.second is a Linear: merging into a quantized base rounds the"
    assert (said in result.report.note) == merges
    assert not merges or "result.unmerged" in result.report.note
    assert "quantized" not in flk.aggregate([plain, plain], rule=rule).report.note


@pytest.mark.parametrize("rule", ["flora", "fedex", "fedmomentum", "fedit"])
def test_the_whole_update_is_one_adapter_with_nothing_to_merge(rule, tmp_path):
    clients = [flk.Adapter.from_model(trained(seed, lora_alpha=3 * seed)) for seed in (1, 2, 3)]
    result = flk.aggregate(clients, rule=rule, weights=[0.5, 0.2, 0.3])
    result.unmerged.save(tmp_path / "whole")
    model = PeftModel.from_pretrained(Base(), tmp_path / "whole")
    found = flk.Adapter.load(tmp_path / "whole")
    assert_runs(found, model)
    for module in MODULES:
        expected = result.adapter.delta(module)
        if result.residual is not None:
            expected = expected + result.residual.delta(module)
        torch.testing.assert_close(found.delta(module), expected, rtol=1e-5, atol=1e-5)
        if rule in ("flora", "fedex"):  # exact
            shares = zip([0.5, 0.2, 0.3], clients, strict=True)
            ideal = sum(share * client.delta(module) for share, client in shares)
            torch.testing.assert_close(found.delta(module), ideal, rtol=1e-5, atol=1e-4)
