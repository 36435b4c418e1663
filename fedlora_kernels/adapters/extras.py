"""Extras: the tensors beside the factors (modules_to_save, biases), which are averaged or kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
"""PEFT's keys of VeRA's frozen projections: equal in all clients, not averaged."""


def check(first: Adapter, adapter: Adapter, who: str) -> None:
    """Refuse extras that cannot be averaged with the first client's.

    Raises:
        AdapterError: a tensor is missing, unexpected or of another shape, or differs where no
            average exists. The message names the client and the tensor.
    """
    for key in sorted(first.extras.keys() ^ adapter.extras.keys()):
        verb = "lacks" if key in first.extras else "has an unexpected"
        raise AdapterError(f"{who} {verb} tensor {key}")
    for key, tensor in adapter.extras.items():
        expected = first.extras[key]
        if tensor.shape != expected.shape:
            raise AdapterError(
                f"{who}, tensor {key}: shape {list(tensor.shape)}, expected {list(expected.shape)}"
            )
        fixed = key in PROJECTIONS or not tensor.is_floating_point()
        if fixed and not torch.equal(tensor, expected):
            raise AdapterError(f"{who}, tensor {key}: differs from client 0's and is not averaged")


def average(adapters: Sequence[Adapter], weights: Tensor) -> dict[str, Tensor]:
    """The weighted mean of every extra; what has no mean is the first client's."""
    averaged = {}
    for key, first in adapters[0].extras.items():
        if key in PROJECTIONS or not first.is_floating_point():
            averaged[key] = first
            continue
        stacked = torch.stack([adapter.extras[key] for adapter in adapters])[None]
        averaged[key] = ops.weighted_sum(stacked, weights.to(first.device))[0]
    return averaged


def projections(adapter: Adapter) -> dict[str, Tensor]:
    """VeRA's frozen projections, where the adapter's file has them."""
    return {key: adapter.extras[key] for key in PROJECTIONS if key in adapter.extras}
