"""Adapters as Flower's records: every dtype bit for bit, also bfloat16, which NumPy lacks.

An Array holds the tensor's bytes (`stype` "raw.le", little-endian, contiguous), its dtype by
torch's name and its shape. Flower's own FedAvg cannot average such an array by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

import fedlora_kernels as flk
from integration.model.serialize import deserialize, serialize
from integration.model.trainer import Moments

STYPE = "raw.le"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


class MessageError(ValueError):
    """A record that holds no usable tensors; the message says which and why."""


def write_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """The tensors, on the CPU, as one record."""
    return ArrayRecord(
        {
            name: Array(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stype=STYPE,
                data=_bytes(tensor),
            )
            for name, tensor in tensors.items()
        }
    )


def read_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors again. Raises MessageError for another encoding, or bytes that do not fit."""
    tensors = {}
    for name, array in record.items():
        if array.stype != STYPE or array.dtype not in DTYPES:
            raise MessageError(
                f"{name} is {array.dtype} in {array.stype}; expected {STYPE} and one of "
                f"{', '.join(DTYPES)}"
            )
        dtype, shape = DTYPES[array.dtype], tuple(array.shape)
        expected = torch.Size(shape).numel() * dtype.itemsize
        if len(array.data) != expected:
            raise MessageError(
                f"{name} has {len(array.data)} bytes; {array.dtype} of shape {list(shape)} has "
                f"{expected}"
            )
        flat = torch.frombuffer(bytearray(array.data), dtype=dtype) if expected else torch.empty(0)
        tensors[name] = flat.to(dtype).reshape(shape)
    return tensors


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


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
