"""Clients' factors in a list, module-major: ``tensors[l*K + k]`` is client k's of module l."""

from collections.abc import Iterator, Sequence

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
    """The tensors in this dtype on this device, contiguous where they are copies; those that travel
    to another device copied together.
    """
    result = list(tensors)
    if device.type != "cpu":
        for place, copy in staged(tensors, device, dtype):
            result[place] = copy
    there = (device, dtype)
    return [
        x
        if (x.device, x.dtype) == there
        else x.to(device, dtype, memory_format=torch.contiguous_format)
        for x in result
    ]


def staged(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The places of the tensors on the CPU, and their copies in this dtype on this device.

    Tensors of one shape and dtype are stacked, in memory that is pinned where the device is a GPU,
    and travel in pieces of about STAGE_BYTES. The copies are views of the pieces. A GPU gets a few
    dozen copies instead of one per tensor.
    """
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.device.type == "cpu" and (tensor.device, tensor.dtype) != (device, dtype):
            alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
    for (shape, own), places in alike.items():
        each = max(1, shape.numel() * own.itemsize)
        fit = max(1, STAGE_BYTES // each)
        for start in range(0, len(places), fit):
            run = places[start : start + fit]
            piece = torch.empty((len(run), *shape), dtype=own, pin_memory=device.type == "cuda")
            torch.stack([tensors[place] for place in run], out=piece)
            copies = piece.to(device, non_blocking=True).to(dtype).unbind()
            yield from zip(run, copies, strict=True)
