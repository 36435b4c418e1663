"""Adapters as plain tensors and JSON types: what a state file holds and a message carries."""

from __future__ import annotations

import torch

import fedlora_kernels as flk
from fedlora_kernels._saved import Saved as Serialized
from fedlora_kernels._saved import restored as deserialize
from fedlora_kernels._saved import restored_memory as deserialize_memory
from fedlora_kernels._saved import saved as serialize
from fedlora_kernels._saved import saved_memory as serialize_memory

__all__ = [
    "Serialized",
    "deserialize",
    "deserialize_memory",
    "reread",
    "serialize",
    "serialize_memory",
]


def reread(adapter: flk.Adapter, device: torch.device | None = None) -> flk.Adapter:
    """The adapter as it reads from a file: a config holds alpha, from which the scaling comes.

    It is on this device, or stays where it is.
    """
    own = next(iter(adapter.state_dict().values())).device
    return deserialize(serialize(adapter), device or own)
