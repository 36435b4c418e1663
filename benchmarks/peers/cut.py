"""Where the peers that factorize cut: cumulative sums of squared singular values."""

import torch
from torch import Tensor


def rank_at(values: Tensor, energy: float, max_rank: int | None) -> int:
    """The smallest p whose squared singular values hold the share ``energy``."""
    cumulative = values.square().cumsum(0)
    p = int(torch.searchsorted(cumulative, energy * cumulative[-1])) + 1
    return min(p, len(values), max_rank or len(values))
