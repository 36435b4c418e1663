"""mlx-lm folders as PEFT's: adapters.safetensors with lora_a, lora_b and a scale given directly.

    y = W x + scale * (x lora_a) lora_b        lora_a [n,r], lora_b [r,m]
    A = lora_a^T,  B = lora_b^T,  alpha = scale * r

The conversion is exact: both factors are transposed and nothing is computed. ``alpha`` in
``lora_parameters`` is not read, as mlx-lm itself does not read it.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.keys import PREFIX
from fedlora_kernels.adapters.peft_format import Config

WEIGHTS_FILE = "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "embed_in", "wte", "wpe")
"""Last segments of the modules that are embeddings; mlx-lm's keys do not tell."""


def is_config(config: object) -> bool:
    """Whether this is the adapter_config.json of mlx-lm."""
    return (
        isinstance(config, Mapping)
        and "peft_type" not in config
        and ("lora_parameters" in config or "fine_tune_type" in config)
    )


def converted(
    who: str, tensors: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], Config]:
    """The tensors and the config that PEFT would have written for this update.

    Raises:
        AdapterError: a full fine-tuning, DoRA, an adapter on stacked experts, a tensor that is not
            lora_a or lora_b, or a scale that is no finite number.
    """
    kind = "dora" if config.get("use_dora") else config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"{who}: an mlx-lm folder with fine_tune_type {kind!r}, expected 'lora'; "
            "only LoRA adapters can be aggregated"
        )
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterError(
            f"{who}: an mlx-lm folder whose lora_parameters have the scale {scale!r}, expected a "
            "finite number"
        )
    made: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        module, _, side = key.rpartition(".")
        if side not in ("lora_a", "lora_b"):
            raise AdapterError(
                f"{who}, tensor {key}: an mlx-lm folder with a tensor that is not lora_a or "
                "lora_b; only LoRA adapters can be aggregated"
            )
        if tensor.dim() != 2:
            raise AdapterError(
                f"{who}, module {module}: {side} has shape {list(tensor.shape)}, expected a "
                "matrix; mlx-lm adapters on stacked experts cannot be converted"
            )
        side = side[-1].upper()
        if module.rpartition(".")[2] in _EMBEDDINGS:
            name = f"{PREFIX}{module}.lora_embedding_{side}"
        else:
            name = f"{PREFIX}{module}.lora_{side}.weight"
        made[name] = tensor.T.contiguous()
        ranks[module] = made[name].shape[0 if side == "A" else 1]
    rank = max(ranks.values(), default=1)
    return made, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
