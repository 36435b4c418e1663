"""AdamW's moments as Flower's records, bit for bit: what a client keeps in its node's context."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord

from fedlora_kernels.interop.flower import from_arrays, to_arrays
from integration.model.trainer import Moments


def write_moments(moments: Moments) -> ArrayRecord:
    """AdamW's state as one record: "place.name" -> tensor."""
    return to_arrays(
        {
            f"{place}.{name}": tensor
            for place, state in moments.items()
            for name, tensor in state.items()
        }
    )


def read_moments(record: ArrayRecord, device: torch.device) -> Moments:
    """AdamW's state again; it counts its steps on the CPU."""
    moments: Moments = {}
    for key, tensor in from_arrays(record).items():
        place, name = key.split(".", 1)
        moments.setdefault(int(place), {})[name] = tensor if name == "step" else tensor.to(device)
    return moments
