"""Live models: the tensors, scalings and config of an adapter inside a model, and writing to it.

The layers are believed, not the config: ``set_scale`` and the like change what a model computes
and leave its config as it was.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_kernels.adapters import keys, patterns, peft_format, refused
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.kinds import experts
from fedlora_kernels.adapters.peft_format import Config, listed
from fedlora_kernels.ops import checks

_INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Under which name torch.compile, FSDP, activation checkpointing and DDP keep the model."""


@dataclass(frozen=True)
class Live:
    """One adapter of a live model, open for reading and writing."""

    state: Mapping[str, Tensor]
    """the model's own tensors under PEFT's saved keys, without what wrappers add to these"""
    scalings: Mapping[str, float]
    """module -> the scaling that its layer applies; empty for VeRA"""
    config: Config
    """the adapter's config, with the layers' scalings"""
    quantized: str | None
    """the first layer whose base weights are in few bits, and its class; None where none are"""

    def whole(self) -> dict[str, Tensor]:
        """Whole tensors, the model's own where it is not sharded; a collective where it is."""
        return {key: _whole(tensor.detach()) for key, tensor in self.state.items()}

    def copied(self) -> dict[str, Tensor]:
        """Whole tensors that no longer belong to the model; a collective where it is sharded."""
        return {key: tensor.clone() for key, tensor in self.whole().items()}

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of the same keys and shapes into the model."""
        for key, tensor in tensors.items():
            target = self.state[key]
            target.copy_(_as(target, tensor))


@contextmanager
def opened(
    model: Any, adapter_name: str | None, who: str, *, writing: bool = False
) -> Iterator[Live]:
    """One adapter of a live model, whatever it is wrapped in.

    FSDP's parameters are gathered while the block runs, so all processes must open it.

    Args:
        model: a ``peft.PeftModel`` or a model with injected adapters, or one of these inside
            torch.compile, DistributedDataParallel or FSDP.
        adapter_name: PEFT's name of the adapter; None takes "default", or the only one.
        who: how messages call the client.
        writing: whether what the block writes has to reach the shards.

    Raises:
        AdapterError: there is no such adapter, it is merged, disabled or not in memory, or no rule
            can represent it. The message names the client and the module.
    """
    inner = _unwrapped(model, who)
    chosen = _chosen(inner, adapter_name, who)
    config = peft_format.plain(inner.peft_config[chosen])
    reason = refused.reason(config)
    if reason is not None:
        raise AdapterError(f"{who}: {reason}")
    with _gathered(model, who, writing):
        layers = _layers(_tuner_layers(inner), chosen, who)
        state = _state(inner, chosen, who)
        scalings = _scalings(layers, chosen, who)
        config = _rescaled(config, layers, chosen, scalings)
        yield Live(state, scalings, config, _quantized(layers))


def opened_together(model: Any, names: Sequence[str]) -> list[Live]:
    """Several LoRA adapters of a ``peft.PeftModel``, open for reading, in one walk over its
    modules: walks, not tensors, take the time.

    Raises:
        AdapterError: as for :func:`opened`; an adapter's own name is that of its client.
    """
    walked = _tuner_layers(model)
    found = []
    for name in names:
        config = peft_format.plain(model.peft_config[name])
        reason = refused.reason(config)
        if reason is not None:
            raise AdapterError(f"{name}: {reason}")
        layers = _layers(walked, name, name)
        state = {}
        for module, layer in layers.items():
            for kind in layer.adapter_layer_names:
                held = getattr(layer, kind, {})
                for own, tensor in _tensors(held[name]) if name in held else ():
                    _refuse_absent(tensor, f"{name}, module {module}")
                    state[f"{keys.PREFIX}{module}.{kind}{own}"] = tensor
        scalings = _scalings(layers, name, name)
        config = _rescaled(config, layers, name, scalings)
        found.append(Live(state, scalings, config, _quantized(layers)))
    return found


def _tensors(held: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer's entry for an adapter, under what follows the entry's own name."""
    if isinstance(held, Tensor):
        yield "", held
    elif isinstance(held, nn.Module):
        for name, tensor in (*held.named_parameters(), *held.named_buffers()):
            yield f".{name}", tensor


def _unwrapped(model: Any, who: str) -> Any:
    inner = model
    while isinstance(inner, nn.Module) and not _has_adapters(inner):
        inside = next((name for name in _INSIDE if name in inner._modules), None)
        if inside is None:
            break
        inner = inner._modules[inside]
    if isinstance(inner, nn.Module) and _has_adapters(inner):
        return inner
    kind = type(inner).__name__
    below = inner.named_modules() if isinstance(inner, nn.Module) else ()
    where = next((path for path, module in below if _has_adapters(module)), None)
    if where is not None:
        raise AdapterError(
            f"{who}: found a {kind} that holds a model with adapters as {where!r}; give "
            "that model itself"
        )
    raise AdapterError(f"{who}: found a {kind} without adapters, expected a peft.PeftModel")


def _has_adapters(model: nn.Module) -> bool:
    """Whether the model itself has adapters; wrappers that pass attributes on do not count."""
    return "peft_config" in vars(model) or hasattr(type(model), "peft_config")


def _chosen(model: Any, adapter_name: str | None, who: str) -> str:
    names = list(model.peft_config)
    if adapter_name in names:
        return str(adapter_name)
    if adapter_name is None and "default" in names:
        return "default"
    if adapter_name is None and len(names) == 1:
        return str(names[0])
    found = f"found {listed([repr(name) for name in names], 5) or 'none'}"
    if adapter_name is None:
        raise AdapterError(f"{who}: the model has several adapters, {found}; give adapter_name")
    raise AdapterError(f"{who}: the model has no adapter {adapter_name!r}, {found}")


@contextmanager
def _gathered(model: nn.Module, who: str, writing: bool) -> Iterator[None]:
    """While the block runs, FSDP's flat parameters are whole and fully_shard's are DTensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    if fsdp is None or not torch.distributed.is_initialized():
        yield
        return
    flat = False
    for module in model.modules():  # a walk takes milliseconds: one for both kinds
        flat |= isinstance(module, fsdp.FullyShardedDataParallel)
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # the optimizer wrote to the shards
    if not flat:
        yield
        return
    gather = fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=writing)
    try:
        gather.__enter__()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise AdapterError(f"{who}: FSDP cannot gather the model: {_first_line(error)}") from error
    try:
        yield
    finally:
        gather.__exit__(None, None, None)


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and layer, of PEFT's layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, x) for path, x in model.named_modules() if isinstance(x, BaseTunerLayer)]


def _layers(walked: Iterable[tuple[str, Any]], name: str, who: str) -> dict[str, Any]:
    """Module -> its layer, of those that hold the adapter and compute with it."""
    found: dict[str, Any] = {}
    for path, layer in walked:
        if not any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names):
            continue
        module = _module(path, who)
        if layer.merged:
            raise AdapterError(
                f"{who}, module {module}: found {listed(list(layer.merged_adapters))} merged into "
                "the base weight, expected it beside; call model.unmerge_adapter() first"
            )
        if layer.disable_adapters:
            raise AdapterError(
                f"{who}, module {module}: the layer's adapters are disabled, expected them in use; "
                "leave the disable_adapter() block, or call enable_adapter_layers() first"
            )
        found[_named(module, layer)] = layer
    return found


def _state(model: nn.Module, name: str, who: str) -> dict[str, Tensor]:
    """The adapter's own tensors, under PEFT's saved keys without what wrappers add."""
    from peft import get_peft_model_state_dict

    tensors = {
        f"{path}.{own}" if path else own: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for own, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    try:
        selected = get_peft_model_state_dict(model, state_dict=tensors, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{who}: PEFT cannot read the adapter {name!r}: {_first_line(error)}"
        ) from error
    state: dict[str, Tensor] = {}
    for path, tensor in selected.items():
        key = _plain(path, who)
        factor = keys.factor(key)
        where = f"tensor {key}" if factor is None else f"module {factor.module}"
        _refuse_absent(tensor, f"{who}, {where}")
        state[key] = tensor
    return state


def _refuse_absent(tensor: Tensor, where: str) -> None:
    """Refuse a tensor whose values are elsewhere."""
    if tensor.is_meta:
        raise AdapterError(
            f"{where}: the tensor is on the meta device (offloaded, or never loaded), "
            "expected it in memory\nload the model without offloading, or call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise AdapterError(
            f"{where}: the tensor is partitioned by DeepSpeed ZeRO-3, expected it whole"
            "\nread it inside deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )


def _scalings(layers: Mapping[str, Any], name: str, who: str) -> dict[str, float]:
    scalings: dict[str, float] = {}
    for module, layer in layers.items():
        value = getattr(layer, "scaling", {}).get(name)
        if value is None:  # VeRA has none
            continue
        try:
            scalings[module] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise AdapterError(
                f"{who}, module {module}: the layer's scaling is a {type(value).__name__}, "
                "expected a number"
            ) from None
    return scalings


def _rescaled(
    config: Config, layers: Mapping[str, Any], name: str, scalings: Mapping[str, float]
) -> Config:
    """The config as it is where it gives these scalings, else with alphas that do."""
    ranks = {module: int(layers[module].r[name]) for module in scalings}
    promised = peft_format.Promised(config)
    if all(promised.scaling(module, ranks[module]) == scalings[module] for module in scalings):
        return config
    alphas = {
        module: value * (ranks[module] ** 0.5 if config.get("use_rslora") else ranks[module])
        for module, value in scalings.items()
    }
    usual = Counter(alphas.values()).most_common(1)[0][0]
    return {**config, "lora_alpha": usual, "alpha_pattern": patterns.written(alphas, usual)}


def _quantized(layers: Mapping[str, Any]) -> str | None:
    """A layer is quantized where it holds numbers that no LoRA factor is made of, integers or
    floats of 8 bits; torchao's tensors tell another dtype than they have.
    """
    for module, layer in layers.items():
        base = layer.get_base_layer()
        for tensor in (*base._parameters.values(), *base._buffers.values()):
            if tensor is not None and (
                tensor.dtype not in checks.FACTOR_DTYPES
                or type(tensor).__module__.startswith("torchao.")
            ):
                return f"module {module} is a {type(base).__name__}"
    return None


def _named(module: str, layer: Any) -> str:
    """What rank_pattern calls a layer: its module, or the parameter that it wraps."""
    parameter = getattr(layer, "parameter_name", None)
    return module if parameter is None else f"{experts.wrapped(module)}.{parameter}"


def _module(path: str, who: str) -> str:
    try:
        return keys.module_name(path)
    except ValueError as error:
        raise AdapterError(f"{who}, module {path}: {error}") from None


def _plain(key: str, who: str) -> str:
    try:
        return keys.plain(key)
    except ValueError as error:
        raise AdapterError(f"{who}, tensor {key}: {error}") from None


def _whole(tensor: Any) -> Tensor:
    """A DTensor gathered from all processes; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


def _as(target: Any, tensor: Tensor) -> Tensor:
    """A whole tensor in the dtype, on the device and in the sharding of another."""
    moved = tensor.to(target.device, target.dtype)
    if not hasattr(target, "full_tensor"):
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, target.device_mesh, target.placements)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
