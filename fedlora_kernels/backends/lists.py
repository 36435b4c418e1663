"""Clients' factors in a list, module-major: ``tensors[l*K + k]`` is client k's of module l."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor], modules: int, rows: bool) -> Tensor:
    """Module-major factors as one tensor: [L,R,d] when ``rows``, else [L,d,R]."""
    clients = len(tensors) // modules
    return torch.stack(
        [
            torch.cat(list(tensors[start : start + clients]), dim=0 if rows else 1)
            for start in range(0, len(tensors), clients)
        ]
    )
