"""What PEFT's files mean: which tensor is which factor, and what a config says of each module.

The functions here follow PEFT's own rules (``peft.utils.other.get_pattern_key`` and the LoRA
layers' ``scaling``) so that an adapter reloads with exactly the update it had.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

Config = dict[str, Any]

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
EMBEDDING_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_embedding_(?P<side>[AB])$"
)
VERA_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.vera_lambda_(?P<side>[bd])$")

# Config fields that turn B A into something that a pair of factors cannot carry.
_UNREPRESENTABLE = {
    "use_dora": "DoRA magnitudes rescale the whole weight",
    "lora_bias": "lora_bias adds a bias that is no part of B A",
    "target_parameters": "adapters on parameters instead of modules have no factor pair per module",
    "kasa_config": "KaSA multiplies by singular values of the base",
    "use_bdlora": "block-diagonal LoRA constrains the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters",
}
# Initializations that also change the base weights, so that B A is not the whole update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Config fields in which clients of one federation must agree.
_COMMON = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
    "modules_to_save",
    "bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "qalora_group_size",
    "projection_prng_key",
)
# Of these, None says nothing.
_UNKNOWN_WHEN_NONE = ("base_model_name_or_path", "revision")


def plain(config: object) -> Config:
    """A PEFT config object, or the mapping of adapter_config.json, as JSON types."""
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) else config
    if not isinstance(fields, Mapping):
        raise TypeError(
            "config must be a PEFT config or the mapping of its JSON, found "
            f"{type(config).__name__}"
        )
    return {str(key): _json_value(value) for key, value in fields.items()}


def _json_value(value: object) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value


def refusal(config: Config) -> str | None:
    """Why no rule can represent an adapter of this config, or None."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA"):
        return f"peft_type is {kind!r}, expected 'LORA' or 'VERA'"
    for field, reason in _UNREPRESENTABLE.items():
        if config.get(field):
            return f"{field} is set: {reason}, which no pair of factors represents"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights={start!r} changed the base weights, so B A is not the whole "
            "update; convert it first (save_pretrained with path_initial_model_for_weight_"
            "conversion)"
        )
    return None


def malformed(config: Config) -> str | None:
    """What is wrong with the numbers that ranks and scalings are made from, or None."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_rank(rank):
        return f"r is {rank!r}, expected a whole number of at least 1"
    if config["peft_type"] == "LORA" and not _is_alpha(alpha):
        return f"lora_alpha is {alpha!r}, expected a finite number"
    heads = config.get("modules_to_save") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        return f"modules_to_save is {heads!r}, expected a list of names"
    for field, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, Mapping):
            return f"{field} is {patterns!r}, expected a mapping"
        for key, value in patterns.items():
            if not fits(value):
                return f"{field} has {value!r} for {key!r}"
            try:
                re.compile(key)
            except re.error as error:
                return f"{field} has the key {key!r}, which is no regular expression: {error}"
    return None


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # NaN is not, and integers may be larger


def disagreement(first: Config, other: Config) -> str | None:
    """The first field in which two clients' configs must agree and do not, or None."""
    if first == other:
        return None
    for field in _COMMON:
        one, two = first.get(field), other.get(field)
        if field in _UNKNOWN_WHEN_NONE and (one is None or two is None):
            continue
        if field == "modules_to_save":  # PEFT adds the head's name again on every load
            one, two = sorted(set(one or ())), sorted(set(two or ()))
        if (one or None) != (two or None):
            return f"{field} is {two!r}, expected {one!r}"
    return None


def completed(config: Config, known: Mapping[str, Any]) -> Config:
    """A config in which the fields that say nothing when None say what others know of them."""
    said = {field: known.get(field) for field in _UNKNOWN_WHEN_NONE if config.get(field) is None}
    return {**config, **said}


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if _matches(key, module):
            return value
    return default


def configured_rank(config: Config, module: str) -> int:
    """The rank a config promises for a module."""
    return int(_pattern(config.get("rank_pattern"), module, config.get("r", 8)))


def scaling(config: Config, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, with the module's own alpha."""
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def result_config(
    start: Config, ranks: Mapping[str, int], scalings: Mapping[str, float], rslora: bool
) -> Config:
    """The config of an adapter with these ranks and scalings, the rest taken from a client's.

    alpha = scaling * rank (or sqrt(rank) with rsLoRA); the commonest rank and alpha become the
    defaults and the other modules get rank_pattern and alpha_pattern.
    """
    alphas = {
        module: _tidy(scalings[module] * (math.sqrt(rank) if rslora else rank))
        for module, rank in ranks.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    names = sorted(ranks)
    lines = "\n".join(names)
    config = {**start}
    config.update(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={_key(name, lines): ranks[name] for name in names if ranks[name] != rank},
        alpha_pattern={_key(name, lines): alphas[name] for name in names if alphas[name] != alpha},
        use_rslora=rslora,
        init_lora_weights=True,
        target_modules=sorted(ranks),
        modules_to_save=sorted(set(start.get("modules_to_save") or ())) or None,
    )
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        config[field] = None
    for field in ("eva_config", "corda_config", "lora_ga_config"):
        if field in config:
            config[field] = None
    if "loftq_config" in config:
        config["loftq_config"] = {}
    return config


def _tidy(alpha: float) -> float | int:
    """An alpha without the rounding of scaling * rank: 16, not 16.000000000000004."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def _key(module: str, names: str) -> str:
    """A pattern that PEFT matches with this module alone, among names of one line each: the name
    itself, escaped where needed.
    """
    try:
        matched = [found[0] for found in re.finditer(_whole(module), names, re.MULTILINE)]
    except re.error:
        matched = []
    return module if matched == [module] else "^" + re.escape(module)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(_whole(pattern), module) is not None
    except re.error:
        return False


def _whole(pattern: str) -> str:
    """What PEFT makes of a pattern: the module's name, or what follows one of its dots."""
    return rf"^(?:.*\.)?(?:{pattern})$"


def headless(config: Config) -> Config:
    """A config whose folder holds no head: PEFT would look for the task's classifier otherwise."""
    return {**config, "modules_to_save": None, "task_type": None}


def head(config: Config) -> Config:
    """The fields of a config that belong to its head."""
    return {field: config.get(field) for field in ("modules_to_save", "task_type")}


def label(index: int, name: str | None) -> str:
    """A client as messages name it."""
    return f"client {index}" if name is None else f"client {index} ({name})"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names of many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
