"""Adapters as Flower's records: every dtype bit for bit, also bfloat16, which NumPy lacks.

Tensors are written raw, so Flower's own FedAvg cannot average them by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

import fedlora_kernels as flk
from fedlora_kernels.interop.flower import from_arrays as read_tensors
from fedlora_kernels.interop.flower import raw
from integration.model.serialize import deserialize, serialize
from integration.model.trainer import Moments

__all__ = ["read_adapter", "read_moments", "read_tensors", "write_adapter", "write_moments"]
__all__ += ["write_tensors"]


def write_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """The tensors, on the CPU, as one record."""
    return ArrayRecord({name: raw(tensor) for name, tensor in tensors.items()})


def write_adapter(records: RecordDict, name: str, adapter: flk.Adapter) -> None:
    """Put the adapter into the records, under `name` (tensors) and `name`.config."""
    serialized = serialize(adapter)
    records[name] = write_tensors(serialized["tensors"])
    records[f"{name}.config"] = ConfigRecord(
        {"json": json.dumps(serialized["config"], allow_nan=False)}
    )


def read_adapter(records: RecordDict, name: str, device: torch.device) -> flk.Adapter:
    """The adapter under `name`, on the device."""
    config = json.loads(str(records.config_records[f"{name}.config"]["json"]))
    tensors = read_tensors(records.array_records[name])
    return deserialize({"tensors": tensors, "config": config}, device)


def write_moments(moments: Moments) -> ArrayRecord:
    """AdamW's state as one record: "place.name" -> tensor."""
    return write_tensors(
        {
            f"{place}.{name}": tensor
            for place, state in moments.items()
            for name, tensor in state.items()
        }
    )


def read_moments(record: ArrayRecord, device: torch.device) -> Moments:
    """AdamW's state again; it counts its steps on the CPU."""
    moments: Moments = {}
    for key, tensor in read_tensors(record).items():
        place, name = key.split(".", 1)
        moments.setdefault(int(place), {})[name] = tensor if name == "step" else tensor.to(device)
    return moments
