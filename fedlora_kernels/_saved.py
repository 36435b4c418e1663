"""Adapters, and what a rule carries to its next round, as plain tensors and JSON types.

This is what a state file holds and ``torch.load(weights_only=True)`` reads.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fedlora_kernels.adapters.adapter import Adapter

Saved = dict[str, Any]
"""{"tensors": PEFT's keys -> tensor, "config": adapter_config.json}"""


def saved(adapter: Adapter) -> Saved:
    """The adapter's tensors, on the CPU and each contiguous, and its config."""
    tensors = {key: x.detach().cpu().contiguous() for key, x in adapter.state_dict().items()}
    return {"tensors": tensors, "config": adapter.config}


def restored(content: Mapping[str, Any], device: torch.device | str | None = None) -> Adapter:
    """The adapter again, on the device."""
    tensors = dict(content["tensors"])
    if device is not None:
        tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    if not any("lora_" in key or "vera_" in key for key in tensors):
        return Adapter({}, content["config"], extras=tensors)
    return Adapter.from_state_dict(tensors, content["config"])


def saved_memory(carried: Any) -> Any:
    """What a rule carries to its next round: None, an adapter, a number, or a mapping of these."""
    if isinstance(carried, Adapter):
        return {"adapter": saved(carried)}
    if isinstance(carried, Mapping):
        return {"parts": {name: saved_memory(part) for name, part in carried.items()}}
    return carried


def restored_memory(content: Any, device: torch.device | str | None = None) -> Any:
    """What a rule carried, again."""
    if not isinstance(content, Mapping):
        return content
    if "adapter" in content:
        return restored(content["adapter"], device)
    parts: Mapping[str, Any] = content["parts"]
    return {name: restored_memory(part, device) for name, part in parts.items()}
