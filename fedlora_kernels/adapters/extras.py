"""Extras: the tensors beside the factors (modules_to_save, biases), which are averaged or kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora_kernels import ops
from fedlora_kernels.adapters.adapter import Adapter
from fedlora_kernels.adapters.error import AdapterError
from fedlora_kernels.adapters.finite import all_finite
from fedlora_kernels.adapters.kinds.vera import PROJECTIONS
from fedlora_kernels.adapters.peft_format import label


def check(adapters: Sequence[Adapter]) -> None:
    """Refuse extras that cannot be averaged.

    Raises:
        AdapterError: a tensor is missing, unexpected or of another shape. The message names the
            client and the tensor.
    """
    first = {key for key in adapters[0].extras if not frozen(key)}
    for index, adapter in enumerate(adapters):
        if not adapter.extras and not first:
            continue
        who = label(index, adapter.name)
        mine = {key for key in adapter.extras if not frozen(key)}
        for key in sorted(first ^ mine):
            verb = "lacks" if key in first else "has an unexpected"
            raise AdapterError(
                f"{who} {verb} tensor {key}; heads='local' leaves it with the clients"
            )
        for key in mine:
            shape, expected = (list(x.extras[key].shape) for x in (adapter, adapters[0]))
            if shape != expected:
                raise AdapterError(
                    f"{who}, tensor {key}: shape {shape}, expected {expected} as in "
                    f"{label(0, adapters[0].name)}; heads='local' leaves it with the clients"
                )


def average(adapters: Sequence[Adapter], weights: Tensor) -> dict[str, Tensor]:
    """The weighted mean of every extra; of whole numbers, which count something, the largest.

    Frozen copies of the base model's own weights stay where all clients have the same.

    Raises:
        AdapterError: a client's tensor holds NaN or Inf; names the client and the tensor.
    """
    averaged = {}
    for key, first in adapters[0].extras.items():
        if key in PROJECTIONS:
            averaged[key] = first
            continue
        found = [adapter.extras[key] for adapter in adapters if key in adapter.extras]
        if frozen(key):
            if len(found) == len(adapters) and all(torch.equal(first, other) for other in found):
                averaged[key] = first
        elif not first.is_floating_point():
            averaged[key] = torch.stack(found).amax(0)
        else:
            stacked = torch.stack(found)[None]
            averaged[key] = ops.weighted_sum(stacked, weights.to(first.device))[0]
            if not all_finite(averaged[key]):
                _refuse_non_finite(adapters, key)
    return averaged


def _refuse_non_finite(adapters: Sequence[Adapter], key: str) -> None:
    """Say whose tensor it is; a mean that overflows is let through."""
    for index, adapter in enumerate(adapters):
        if not all_finite(adapter.extras[key]):
            raise AdapterError(
                f"{label(index, adapter.name)}, tensor {key}: holds NaN or Inf; heads='local' "
                "leaves it with the clients"
            )


def frozen(key: str) -> bool:
    """Whether this is a copy of a weight that the adapter leaves as it is, as PEFT saves beside
    adapters of embeddings; VeRA's projections are looked at by themselves.
    """
    return ".base_layer." in key or key in PROJECTIONS
