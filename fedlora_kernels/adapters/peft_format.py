"""What PEFT's files mean: which tensor is which factor, and what a config says of each module.

The functions here follow PEFT's own rules (``peft.utils.other.get_pattern_key`` and the LoRA
layers' ``scaling``) so that an adapter reloads with exactly the update it had.
"""

import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from fedlora_kernels.adapters import base_model, patterns
from fedlora_kernels.adapters.patterns import Patterns

Config = dict[str, Any]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

# Config fields in which clients of one federation must agree, with PEFT's defaults: a version that
# did not know a field did what the default does.
_COMMON = {
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_dora": False,
    "projection_prng_key": None,
}
# Fields that only matter beside another one.
_BESIDE = {"qalora_group_size": ("use_qalora", 16)}
# Of these, a client that says nothing agrees with every other.
_TOLD_BY_SOME = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "bias")
# Fields that say which modules of the base model have factors.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What model classes call the layer whose weight may be tied to the embedding's.
_OUTPUT_HEADS = ("lm_head", "embed_out", "output_layer", "cls")
# Tasks whose models PEFT gives a head of their own, which it then looks for in the file.
_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


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


def malformed(config: Config) -> str | None:
    """What is wrong with the numbers that ranks and scalings are made from, or None."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_rank(rank):
        return f"r is {rank!r}, expected a whole number of at least 1"
    if config["peft_type"] == "LORA" and not _is_alpha(alpha):
        return f"lora_alpha is {reprlib.repr(alpha)}, expected a finite number"
    for field in ("modules_to_save", "target_parameters"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"{field} is {names!r}, expected a list of names"
    for field, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        found = config.get(field) or {}
        if not isinstance(found, Mapping):
            return f"{field} is {found!r}, expected a mapping"
        for key, value in found.items():
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


def disagreement(first: Config, other: Config, *, same_base: bool = False) -> str | None:
    """The first field in which two clients' configs must agree and do not, or None.

    Args:
        first: what is expected.
        other: what is looked at.
        same_base: whether the clients are known to have one base model, whatever they call it.
    """
    if first == other:
        return None

    def differ(field: str, default: Any = None) -> str | None:
        one, two = (config.get(field, default) for config in (first, other))
        one, two = (default if value is None else value for value in (one, two))
        return None if one == two else f"{field} is {two!r}, expected {one!r}"

    both = [sorted(config.get("target_parameters") or ()) for config in (first, other)]
    if both[0] != both[1]:
        return f"target_parameters is {both[1]}, expected {both[0]}"
    bases = (first.get("base_model_name_or_path"), other.get("base_model_name_or_path"))
    if not same_base:
        if not base_model.same(*bases):
            return (
                f"base_model_name_or_path is {bases[1]!r}, expected {bases[0]!r} "
                "(same_base=True or --same-base says that they are one model)"
            )
        if first.get("revision") and other.get("revision") and (found := differ("revision")):
            return found
    if first.get("task_type") and other.get("task_type") and (found := differ("task_type")):
        return found
    for field, default in {"peft_type": None, **_COMMON}.items():
        if found := differ(field, default):
            return found
    for field, (beside, expected) in _BESIDE.items():
        if first.get(beside) and (found := differ(field, expected)):
            return found
    return None


def completed(config: Config, known: Mapping[str, Any]) -> Config:
    """A config in which the fields that say nothing when None say what others know of them."""
    said = {field: known.get(field) for field in _TOLD_BY_SOME if not config.get(field)}
    return {**config, **said}


class Promised:
    """What a config says of the rank and the scaling of each module."""

    def __init__(self, config: Config) -> None:
        self._rank, self._alpha = config.get("r", 8), config.get("lora_alpha", 8)
        self._rslora = bool(config.get("use_rslora"))
        self._ranks = Patterns(config.get("rank_pattern"))
        self._alphas = Patterns(config.get("alpha_pattern"))

    def rank(self, module: str) -> int:
        """r of the module."""
        return int(self._ranks.value(module, self._rank))

    def alpha(self, module: str) -> float:
        """lora_alpha of the module."""
        return float(self._alphas.value(module, self._alpha))

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, with the module's own alpha."""
        return self.scaled(self.alpha(module), rank)

    def scaled(self, alpha: float, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / (math.sqrt(rank) if self._rslora else rank)


def result_config(
    start: Config,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    rslora: bool,
    *,
    targets: Sequence[str] | None = None,
) -> Config:
    """The config of an adapter with these ranks and scalings, the rest taken from a client's.

    alpha = scaling * rank (or sqrt(rank) with rsLoRA); the commonest rank and alpha become the
    defaults and the other modules get rank_pattern and alpha_pattern.

    Args:
        start: the client's.
        ranks: module, or parameter, -> rank.
        scalings: the same -> scaling.
        rslora: whether alpha is divided by sqrt(rank).
        targets: the modules to list by their full names; None where the client's own fields name
            exactly these.
    """
    alphas = {
        module: _tidy(scalings[module] * (math.sqrt(rank) if rslora else rank))
        for module, rank in ranks.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {**start}
    config.update(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=patterns.written(ranks, rank),
        alpha_pattern=patterns.written(alphas, alpha),
        use_rslora=rslora,
        init_lora_weights=True,
        modules_to_save=sorted(set(start.get("modules_to_save") or ())) or None,
    )
    if targets is not None:
        config.update(dict.fromkeys(_TARGETS), target_modules=sorted(targets))
    for field in ("eva_config", "corda_config", "lora_ga_config"):
        if field in config:
            config[field] = None
    if "loftq_config" in config:
        config["loftq_config"] = {}
    return config


def same_targets(configs: Sequence[Config], modules: Iterable[str]) -> bool:
    """Whether all clients name the modules of one base model in the same way, these among them."""
    first = configs[0]
    if any(_listed(config, field) != _listed(first, field)
           for config in configs[1:] for field in _TARGETS):  # fmt: skip
        return False
    return all(_targeted(first.get("target_modules"), module) for module in modules)


def tied(config: Config, modules: Iterable[str], embeddings: Set[str]) -> Set[str]:
    """The embeddings and output heads that PEFT gives one pair of factors when it loads them."""
    if not config.get("ensure_weight_tying"):
        return frozenset()
    return {
        module
        for module in modules
        if module in embeddings or module.rpartition(".")[2] in _OUTPUT_HEADS
    }


def _listed(config: Config, field: str) -> Any:
    """A field whose lists have no order."""
    value = config.get(field)
    return sorted(map(str, value)) if isinstance(value, list) else value


def targeted(config: Config, module: str) -> bool:
    """Whether target_modules of a config names a module."""
    return _targeted(config.get("target_modules"), module)


def _targeted(targets: object, module: str) -> bool:
    """Whether target_modules names a module: a regular expression, or a list of names' ends."""
    if isinstance(targets, str):
        try:
            return targets == "all-linear" or re.fullmatch(targets, module) is not None
        except re.error:
            return False
    ends = targets if isinstance(targets, list) else []
    return any(module == end or module.endswith(f".{end}") for end in ends)


def _tidy(alpha: float) -> float | int:
    """An alpha without the rounding of scaling * rank: 16, not 16.000000000000004."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-9 * max(1.0, abs(alpha)) else alpha


def merged(configs: Sequence[Config]) -> Config:
    """The first client's config, with what only other clients tell."""
    told = {
        field: next((config[field] for config in configs if config.get(field)), None)
        for field in (*_TOLD_BY_SOME, "modules_to_save")
    }
    return {**configs[0], **{field: value for field, value in told.items() if value}}


def headless(config: Config) -> Config:
    """A config whose folder holds no tensors beside the factors: PEFT would look for those that
    the config promises, a task's own head among them.
    """
    promised = {"modules_to_save": None, "trainable_token_indices": None}
    kept = {key: value for key, value in config.items() if key not in promised}
    kept.update({key: None for key in promised if key in config})
    kept["modules_to_save"] = None
    if config.get("task_type") in _TASKS_WITH_HEADS:
        kept["task_type"] = None
    if config.get("bias", "none") != "none":
        kept["bias"] = "none"
    return kept


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
