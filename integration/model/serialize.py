"""Adapters as plain tensors and JSON types: what a state file holds and a message carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import fedlora_kernels as flk

Serialized = dict[str, Any]
"""{"tensors": PEFT's keys -> tensor, "config": adapter_config.json}"""


def serialize(adapter: flk.Adapter) -> Serialized:
    """The adapter's tensors, on the CPU and each contiguous, and its config."""
    tensors = {key: x.detach().cpu().contiguous() for key, x in adapter.state_dict().items()}
    return {"tensors": tensors, "config": adapter.config}


def deserialize(serialized: Serialized, device: torch.device) -> flk.Adapter:
    """The adapter again."""
    tensors = {key: tensor.to(device) for key, tensor in serialized["tensors"].items()}
    if not any("lora_" in key or "vera_" in key for key in tensors):
        return flk.Adapter({}, serialized["config"], extras=tensors)
    return flk.Adapter.from_state_dict(tensors, serialized["config"])


def reread(adapter: flk.Adapter) -> flk.Adapter:
    """The adapter as it reads from a file: a config holds alpha, from which the scaling comes."""
    device = next(iter(adapter.state_dict().values())).device
    return deserialize(serialize(adapter), device)


def serialize_memory(carried: Any) -> Any:
    """What a rule carries to its next round: None, an adapter, a number, or a mapping of these."""
    if isinstance(carried, flk.Adapter):
        return {"adapter": serialize(carried)}
    if isinstance(carried, Mapping):
        return {"parts": {name: serialize_memory(part) for name, part in carried.items()}}
    return carried


def deserialize_memory(serialized: Any, device: torch.device) -> Any:
    """What a rule carried, again."""
    if not isinstance(serialized, Mapping):
        return serialized
    if "adapter" in serialized:
        return deserialize(serialized["adapter"], device)
    parts: Mapping[str, Any] = serialized["parts"]
    return {name: deserialize_memory(part, device) for name, part in parts.items()}
