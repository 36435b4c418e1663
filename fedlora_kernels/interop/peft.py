"""PEFT: the rules on the adapters of a live model, and an aggregate into a running model.

    from fedlora_kernels.interop.peft import add_weighted_adapter, hotswap

    add_weighted_adapter(model, ["a", "b"], [0.7, -0.2], "mixed", combination_type="svd")
    hotswap(model, result.adapter)

PEFT's weights c_k have any sum and any sign. A rule's weights are shares, so sum and signs go into
the scalings, which leaves the update sum_k c_k s_k B_k A_k as it is:

    w_k = |c_k| / S        s_k <- S sign(c_k) s_k        S = sum_k |c_k|
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora_kernels import ops, rules
from fedlora_kernels._aggregate import aggregate
from fedlora_kernels.adapters import keys, live, peft_format
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.factors import Factors
from fedlora_kernels.adapters.finite import finite
from fedlora_kernels.adapters.kinds.embedding import EMBEDDING
from fedlora_kernels.adapters.kinds.kind import LINEAR as LAYER

LINEAR = "linear"
"""PEFT's mixture of the factors themselves, which is no rule of a federation."""

SVD = "svd"
"""PEFT's combination whose rank can be asked for."""

WITHOUT_EFFECT = ("svd_full_matrices", "svd_driver")
"""Of PEFT's arguments, how its dense SVD is to be computed; no dense matrix is formed here."""

CONFIGURED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
"""The fields of a LoraConfig in which the new adapter differs from the others."""

DEFAULTS = {"svd_clamp": None, "density": None, "majority_sign_method": "total"}
"""Of PEFT's arguments, those that belong to what is refused here."""


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    **others: Any,
) -> None:
    """PEFT's ``add_weighted_adapter``, with every rule as a combination, without a dense matrix.

    The new adapter lies in the model beside the others, frozen and not active, in their dtype. Its
    update is ``sum_k weights[k] * scaling_k * B_k A_k`` with the scalings that the layers apply,
    or what the combination makes of it: "svd" is its best approximation of one rank in all modules
    and "cat" the sum itself, both padded with zeros to the rank that PEFT gives them; "linear" is
    PEFT's mixture, each factor weighted by the root of ``|weights[k] * scaling_k|``; a rule gives
    each module a rank of its own, and what the rule would merge into the base (a residual) is part
    of the adapter.

    Args:
        model: a ``peft.PeftModel``; also inside torch.compile.
        adapters: names of LoRA adapters in the model.
        weights: of any sum and sign, one per adapter.
        adapter_name: the name of the new adapter.
        combination_type: "svd", "cat", "linear" or the name of a rule, see ``flk.rules.names()``.
        svd_rank: the rank for "svd"; the largest of the adapters when None.
        **others: options of the rule. PEFT's own arguments are taken as well: svd_full_matrices
            and svd_driver have no effect, the others must have PEFT's defaults.

    Raises:
        AdapterError: an adapter cannot be combined, by this rule or at all; names the adapter and
            the module. The model is unchanged then.
        ValueError: the combination or the name of an adapter is unknown, the new name is taken, or
            an option is out of range.
        TypeError: the rule has no such option.
    """
    inner = _peft_model(model)
    tuner = inner.base_model
    if adapter_name in tuner.peft_config:
        raise ValueError(
            f"the model has an adapter {adapter_name!r}; choose another name, or call "
            f"delete_adapter({adapter_name!r}) first"
        )
    if not adapters:
        raise ValueError("adapters names none, expected at least one")
    found = _sources(inner, adapters)
    factors = _checked(weights, found)
    rule, rank = _chosen(combination_type, svd_rank, others, _ranks(tuner, adapters))
    if rule is None:
        made = _linear(found, factors)
    else:
        result = aggregate(
            _signed(found, factors), rule=rule, weights=[abs(x) for x in factors], heads="local"
        )
        made = result.unmerged.factors
        if rule.personal:
            warnings.warn(
                f"{rule.name} shares A only: the B of {adapter_name!r} is zero", stacklevel=2
            )
        if rule.note:
            warnings.warn(f"{rule.name}: {rule.note}", stacklevel=2)
    if rank is not None:
        made = _padded(made, rank)
    own = peft_format.same_targets([adapter.config for adapter in found], made)
    _add(inner, adapter_name, tuner.peft_config[adapters[0]], found[0].config, made, own)


def hotswap(model: Any, adapter: Adapter, adapter_name: str = "default") -> None:
    """Put an adapter's update in the place of a live one, in a running model; nothing is loaded.

    Ranks below the live one are padded with zeros, as PEFT's ``hotswap_adapter`` pads them, and
    modules that the adapter lacks become zero. Rank and scaling of every module are the adapter's
    own, also with rank_pattern and alpha_pattern, and other adapters stay as they are. A compiled
    model is not compiled again where ``peft.utils.hotswap.prepare_model_for_compiled_hotswap`` was
    called before torch.compile.

    Args:
        model: a ``peft.PeftModel``; also inside torch.compile.
        adapter: the update, ``result.adapter`` say; its tensors beside the factors are not used.
        adapter_name: the live adapter's name, which stays.

    Raises:
        AdapterError: the model has no such adapter, or it is merged; it has DoRA, a bias or an
            embedding; a module of the adapter is missing there, has another shape or a larger
            rank. Names the module. The model is unchanged then.
    """
    who = adapter.name or "adapter"
    tuner = _peft_model(model).base_model
    if adapter_name not in tuner.peft_config:
        known = ", ".join(map(repr, tuner.peft_config))
        raise AdapterError(f"{who}: the model has no adapter {adapter_name!r}, found {known}")
    if adapter.vera:
        raise AdapterError(f"{who}: hotswap() takes LoRA factors, found VeRA vectors")
    layers = _layers(tuner, adapter_name)
    for module, own in adapter.factors.items():
        if own.kind != LAYER or own.beside:
            raise AdapterError(
                f"{who}, module {module}: found {own.told}, hotswap() takes linear layers alone; "
                "save the adapter and load it with PeftModel.load_adapter"
            )
        if module not in layers:
            raise AdapterError(f"{who}, module {module}: the model's adapter has no such module")
    for module, layer in layers.items():
        _refuse_layer(who, module, layer, adapter_name, adapter.factors.get(module))
    live = tuner.peft_config[adapter_name]
    ranks, scalings = {}, {}
    with torch.no_grad():
        for module, layer in layers.items():
            a, b = (side[adapter_name].weight for side in (layer.lora_A, layer.lora_B))
            item = adapter.factors.get(module)
            if item is None:
                a.zero_()
                b.zero_()
            else:
                a[item.rank :] = 0
                b[:, item.rank :] = 0
                a[: item.rank] = item.a.to(a)
                b[:, : item.rank] = item.b.to(b)
                _rescale(layer, adapter_name, item.scaling)
            ranks[module] = layer.r[adapter_name] = a.shape[0]
            scalings[module] = float(layer.scaling[adapter_name])
            shrunk = ranks[module] ** 0.5 if live.use_rslora else ranks[module]
            layer.lora_alpha[adapter_name] = scalings[module] * shrunk
    config = peft_format.result_config(
        peft_format.plain(live), ranks, scalings, bool(live.use_rslora)
    )
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(live, field, config[field])


# ---- the model ---------------------------------------------------------------------------------


def _peft_model(model: Any) -> Any:
    """The PeftModel itself, whose base_model is PEFT's LoraModel."""
    from peft import PeftModel
    from peft.tuners.lora import LoraModel

    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PeftModel):
        raise AdapterError(f"found a {type(inner).__name__}, expected a peft.PeftModel")
    if not isinstance(inner.base_model, LoraModel):
        kind = type(inner.base_model).__name__
        raise AdapterError(f"found a PeftModel of {kind}, expected one of LoRA adapters")
    return inner


def _layers(tuner: Any, name: str) -> dict[str, Any]:
    """Module -> its layer, of those that hold the adapter."""
    from peft.tuners.lora import LoraLayer

    return {
        keys.module_name(path): layer
        for path, layer in tuner.model.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.r
    }


def _sources(model: Any, names: Sequence[str]) -> list[Adapter]:
    """The adapters that are combined; their tensors are the model's own."""
    for name in names:
        _refuse_source(model, name)
    found = zip(names, live.opened_together(model, names), strict=True)
    adapters = [Adapter.from_state_dict(x.whole(), x.config, name=name) for name, x in found]
    for adapter in adapters:
        for module, item in adapter.factors.items():
            if item.kind not in (LAYER, EMBEDDING) or item.beside:
                raise AdapterError(
                    f"{adapter.name}, module {module}: found {item.told}, expected linear layers "
                    "and embeddings; save the adapters, aggregate the folders and load the result"
                )
    return adapters


def _refuse_source(model: Any, name: str) -> None:
    """Refuse an adapter that is not there or has tensors beside its factors."""
    if name not in model.base_model.peft_config:
        known = ", ".join(map(repr, model.base_model.peft_config))
        raise ValueError(f"the model has no adapter {name!r}, found {known}")
    config = model.base_model.peft_config[name]
    beside = {
        "modules_to_save": config.modules_to_save,
        "bias": None if config.bias == "none" else config.bias,
        "trainable_token_indices": config.trainable_token_indices,
    }
    for field, value in beside.items():
        if value:
            raise AdapterError(
                f"{name}: {field} is {value!r}: weights of any sum and sign do not average tensors "
                "beside the factors; aggregate the adapters, or leave the field out"
            )
    if config.use_dora:
        raise AdapterError(
            f"{name}: found DoRA: weights of any sum and sign do not average magnitudes; save the "
            "adapters and aggregate the folders with magnitudes='average'"
        )


def _ranks(tuner: Any, adapters: Sequence[str]) -> list[int]:
    """The largest rank that each adapter's config gives a module."""
    configs = [tuner.peft_config[name] for name in adapters]
    return [max([config.r, *(config.rank_pattern or {}).values()]) for config in configs]


def _refuse_layer(who: str, module: str, layer: Any, name: str, item: Factors | None) -> None:
    """Refuse a layer into which these factors cannot go."""
    if name in layer.merged_adapters:
        raise AdapterError(
            f"{who}, module {module}: {name!r} is merged into the base weight; call "
            "model.unmerge_adapter() first"
        )
    if name not in layer.lora_A or layer.lora_A[name].weight.dim() != 2:
        raise AdapterError(
            f"{who}, module {module}: its layer is {type(layer).__name__}, expected a linear one"
        )
    if layer.lora_variant.get(name) is not None or layer.lora_B[name].bias is not None:
        raise AdapterError(
            f"{who}, module {module}: the live adapter is more than B and A (DoRA, lora_bias, or "
            "another variant); load the adapter under a name of its own"
        )
    if item is None:
        return
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if (b.shape[0], a.shape[1]) != (item.b.shape[0], item.a.shape[1]):
        raise AdapterError(
            f"{who}, module {module}: the update is {item.b.shape[0]} x {item.a.shape[1]}, the "
            f"model expects {b.shape[0]} x {a.shape[1]}"
        )
    if not finite([item.b.to(b.dtype), item.a.to(a.dtype)]):
        raise AdapterError(f"{who}, module {module}: overflows the model's {b.dtype}")
    if item.rank > a.shape[0]:
        raise AdapterError(
            f"{who}, module {module}: rank {item.rank}, the model has {a.shape[0]}; call "
            f"prepare_model_for_compiled_hotswap(model, target_rank={item.rank}) before "
            "torch.compile, or give the rule a smaller rank"
        )


def _rescale(layer: Any, name: str, scaling: float) -> None:
    """A model that was prepared has tensors as scalings, which a compiled graph reads."""
    if isinstance(layer.scaling[name], Tensor):
        layer.scaling[name].fill_(scaling)
    elif layer.scaling[name] != scaling:
        layer.scaling[name] = scaling


def _add(
    model: Any,
    name: str,
    like: Any,
    config: peft_format.Config,
    made: Mapping[str, Factors],
    own_targets: bool,
) -> None:
    """The factors as a new adapter of the model, frozen, under a config like the others'."""
    ranks = {module: item.rank for module, item in made.items()}
    scalings = {module: item.scaling for module, item in made.items()}
    config = peft_format.result_config(
        config, ranks, scalings, rslora=False, targets=None if own_targets else list(made)
    )
    fields = {field: config.get(field) for field in CONFIGURED}
    tuner = model.base_model
    tuner.peft_config[name] = replace(like, **{**fields, "init_lora_weights": False})
    try:  # on the meta device: what PEFT would draw takes longer than the combination itself
        tuner.inject_adapter(tuner.model, name, low_cpu_mem_usage=True)
        tuner.peft_config[name].init_lora_weights = fields["init_lora_weights"]
        for module, layer in _layers(tuner, name).items():
            base = getattr(layer.get_base_layer(), "weight", made[module].b)
            a, b = (
                nn.Parameter(factor.to(base.device, copy=True).contiguous(), False)
                for factor in (made[module].a, made[module].b)
            )
            if name in layer.lora_A:
                layer.lora_A[name].weight, layer.lora_B[name].weight = a, b
            else:
                layer.lora_embedding_A[name], layer.lora_embedding_B[name] = a, b
    except BaseException:
        tuner.delete_adapter(name)
        raise


# ---- combinations ------------------------------------------------------------------------------


def _chosen(
    kind: str, svd_rank: int | None, others: Mapping[str, Any], ranks: Sequence[int]
) -> tuple[rules.Rule | None, int | None]:
    """The rule of a combination, None for PEFT's linear one, and PEFT's rank of all modules, None
    where the rule gives each its own.
    """
    given = {name: value for name, value in others.items() if name not in WITHOUT_EFFECT}
    for name, default in DEFAULTS.items():
        if given.pop(name, default) != default:
            raise ValueError(
                f"{name}={others[name]!r} changes single entries of dense or pruned matrices; use "
                "PEFT's own add_weighted_adapter for it"
            )
    of_peft = {
        rules.find(name).combination: name for name in rules.names() if rules.find(name).combination
    }
    if svd_rank is not None and kind != SVD:
        raise ValueError(f"svd_rank belongs to combination_type {SVD!r}, found it with {kind!r}")
    if kind in rules.names():
        return rules.make(kind, **given), None
    if kind != LINEAR and kind not in of_peft:
        raise ValueError(
            f"combination_type {kind!r} is none of {', '.join([*of_peft, LINEAR])}, and no rule "
            f"({', '.join(rules.names())}); PEFT's own add_weighted_adapter has its others"
        )
    if given:
        raise TypeError(f"combination_type {kind!r} has no option {next(iter(given))!r}")
    if kind == LINEAR:
        return None, max(ranks)
    rank = max(ranks) if svd_rank is None else svd_rank
    if kind == SVD:
        return rules.make(of_peft[kind], rank=rank), rank
    return rules.make(of_peft[kind]), sum(ranks)


def _checked(weights: Sequence[float], found: Sequence[Adapter]) -> list[float]:
    """The weights as finite numbers, one per adapter."""
    if len(weights) != len(found):
        raise AdapterError(f"found {len(weights)} weights for {len(found)} adapters")
    for weight, adapter in zip(weights, found, strict=True):
        if not math.isfinite(weight):
            raise AdapterError(f"{adapter.name}: weight {weight}, expected a finite number")
    return [float(weight) for weight in weights]


def _signed(found: Sequence[Adapter], weights: Sequence[float]) -> list[Adapter]:
    """The adapters with the weights' sum and signs in their scalings."""
    total = math.fsum(map(abs, weights))
    return [
        Adapter(
            {
                module: replace(item, scaling=item.scaling * math.copysign(total, weight))
                for module, item in adapter.factors.items()
            },
            adapter.config,
            name=adapter.name,
        )
        for adapter, weight in zip(found, weights, strict=True)
    ]


def _padded(made: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    """Zeros beside the factors, up to a rank."""
    return {
        module: item if item.rank == rank else item.padded(rank) for module, item in made.items()
    }


def _linear(found: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Factors]:
    """PEFT's linear combination, with the scalings that the layers apply."""
    made = {}
    for module in sorted({module for adapter in found for module in adapter.factors}):
        present = [
            (adapter, adapter.factors[module], weight)
            for adapter, weight in zip(found, weights, strict=True)
            if module in adapter.factors
        ]
        first = present[0][1]
        for adapter, item, _ in present:
            if item.b.shape != first.b.shape or item.a.shape != first.a.shape:
                raise AdapterError(
                    f"{adapter.name}, module {module}: rank {item.rank}, expected {first.rank} as "
                    f"in {present[0][0].name}: linear mixes factors of equal rank; use svd or cat"
                )
        terms = torch.tensor([w * item.scaling for _, item, w in present], dtype=torch.float64)
        roots = terms.abs().sqrt().to(first.b.device)
        b = ops.weighted_sum(torch.stack([item.b for _, item, _ in present])[None], roots)[0]
        a = ops.weighted_sum(
            torch.stack([item.a for _, item, _ in present])[None], roots * terms.sign().to(roots)
        )[0]
        made[module] = Factors(b, a, 1.0, first.kind)
    return made
