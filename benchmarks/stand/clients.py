"""Clients on disk: the factors of a case as PEFT folders, written client by client.

The tensors are those of ``inputs.draw`` for the same case, which would hold all of them at once.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.stand.inputs import Origin
from benchmarks.stand.shapes import Case

SCALING = 2.0
"""alpha / r, as in ``inputs.draw``."""

_CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "a-base-model", "target_modules": ["q"]}


def module_name(layer: int) -> str:
    """Of the model's layer."""
    return f"model.layers.{layer}.q"


def folder_bytes(case: Case) -> int:
    """Of all clients' tensors."""
    numbers = case.modules * case.stacked_rank * (case.m + case.n)
    return numbers * torch.finfo(case.dtype).bits // 8


def write(folder: Path, case: Case) -> list[Path]:
    """One folder per client, in the clients' order.

    Raises:
        OSError: the disk has less room than the clients need.
    """
    free = shutil.disk_usage(folder).free
    if free < folder_bytes(case):
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB of room, {case} needs "
            f"{folder_bytes(case) / 1e9:.1f}; TMPDIR names another disk"
        )
    origin = Origin(case)
    made = []
    for k, rank in enumerate(case.ranks):
        b, a = (side.to(case.dtype) for side in origin.client(k))
        tensors = {}
        for layer in range(case.modules):
            key = f"base_model.model.{module_name(layer)}"
            tensors[f"{key}.lora_B.weight"] = b[layer].clone()
            tensors[f"{key}.lora_A.weight"] = a[layer].clone()
        place = folder / f"client-{k}"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        config = {**_CONFIG, "r": rank, "lora_alpha": SCALING * rank}
        (place / "adapter_config.json").write_text(json.dumps(config))
        made.append(place)
    return made
