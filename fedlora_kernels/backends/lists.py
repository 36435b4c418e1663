"""Clients' factors in a list, module-major: ``tensors[l*K + k]`` is client k's of module l."""

from collections.abc import Sequence

import torch
from torch import Tensor

STAGE_BYTES = 1 << 25
"""Copies to a device go through pinned memory in pieces of about 32 MiB: that is a millisecond on a
bus of 32 GB/s, and while one piece travels the next is filled."""


def stack(tensors: Sequence[Tensor], modules: int, rows: bool) -> Tensor:
    """Module-major factors as one tensor: [L,R,d] when ``rows``, else [L,d,R]."""
    clients = len(tensors) // modules
    return torch.stack(
        [
            torch.cat(list(tensors[start : start + clients]), dim=0 if rows else 1)
            for start in range(0, len(tensors), clients)
        ]
    )


def moved(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The tensors in this dtype on this device, those that travel to it copied together.

    Tensors of one shape and dtype on the CPU are stacked, in memory that is pinned where the device
    is a GPU, and travel in pieces of about STAGE_BYTES. The results are views of the pieces. A GPU
    gets a few dozen copies instead of one per tensor.
    """
    result = list(tensors)
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type == "cpu" and device.type != "cpu":
            alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
    for (shape, own), places in alike.items():
        each = max(1, shape.numel() * own.itemsize)
        fit = max(1, STAGE_BYTES // each)
        for start in range(0, len(places), fit):
            run = places[start : start + fit]
            staged = torch.empty((len(run), *shape), dtype=own, pin_memory=device.type == "cuda")
            torch.stack([tensors[place] for place in run], out=staged)
            copies = staged.to(device, non_blocking=True).to(dtype).unbind()
            for place, copy in zip(run, copies, strict=True):
                result[place] = copy
    there = (device, dtype)
    return [x if (x.device, x.dtype) == there else x.to(device, dtype) for x in result]
