"""What no pair of factors represents, and what to do instead."""

from fedlora_kernels.adapters.peft_format import Config

_TYPES = {
    "ADALORA": "train with LORA and rank_pattern",
    "XLORA": "aggregate the LORA adapters that it mixes, each by itself",
}
_OTHER_TYPE = "train with LORA, or convert with peft.save_as_lora where PEFT can"
# Config fields that turn B A into something that a pair of factors cannot carry.
_FIELDS = {
    "kasa_config": ("KaSA multiplies by singular values of the base", "train without it"),
    "use_bdlora": ("block-diagonal LoRA constrains the factors", "train without it"),
    "monteclora_config": ("MonteCLoRA samples its factors", "train without it"),
    "arrow_config": ("Arrow routes between adapters", "aggregate these, each by itself"),
}
# Initializations that also change the base weights, so that B A is not the whole update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def reason(config: Config) -> str | None:
    """Why no rule can represent an adapter of this config and what to do; None where one can."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA"):
        remedy = _TYPES.get(str(kind), _OTHER_TYPE)
        return f"peft_type is {kind!r}, expected 'LORA' or 'VERA'; {remedy}"
    for field, (why, remedy) in _FIELDS.items():
        if config.get(field):
            return f"{field} is set: {why}, which no pair of factors represents; {remedy}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights={start!r} changed the base weights, so B A is not the whole "
            "update; convert it first (save_pretrained with path_initial_model_for_weight_"
            "conversion)"
        )
    return None
