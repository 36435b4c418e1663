"""Clipping of norms: an update that is longer than a limit is scaled down to it.

    c_k = min(1, limit / ||dW_k||)        ||dW_k|| over all modules

The limit is a number, or the median of the clients' norms (the lower one of two); where half of the
updates are zero, that is 0, and so is the result. The weights stay as they were given. Sun et al.
(arXiv 1911.07963) clip what a client changed in the round; here it is the whole update that the
client sends.

With h the honest clients' mean and phi the attackers' share of the weights, the result is within
phi (limit + ||h||) + sum over honest k of w_k max(0, ||dW_k|| - limit) of h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlora_kernels.robust._robust import Robust, option

if TYPE_CHECKING:
    from torch import Tensor

    from fedlora_kernels.gram_space.updates import Updates


@dataclass(frozen=True)
class Clip(Robust):
    """Long updates are scaled down. B carries the factor; a bias beside it, too. The tensors beside
    the factors (heads) are averaged as without it.
    """

    title = "norm clipping"
    paper = "1911.07963"
    published = 2019
    stops = "updates that are too large"
    scales = True

    norm: float | None = option(
        None, "the largest norm of a client's update; default: the median of the clients' norms"
    )

    def __post_init__(self) -> None:
        """Raises ValueError: norm is no positive number."""
        if self.norm is not None and not (math.isfinite(self.norm) and self.norm > 0):
            raise ValueError(f"norm must be a finite number > 0, found {self.norm}")

    def solve(self, updates: Updates, weights: Tensor) -> Tensor:
        """The weights as given."""
        return weights

    def factors(self, updates: Updates) -> Tensor:
        """limit / ||dW_k|| where that is less than 1 by more than rounding."""
        norms = updates.norms
        limit = norms.median() if self.norm is None else norms.new_tensor(self.norm)
        long = updates.longer(limit)
        return (limit / norms.where(long, 1)).where(long, 1)
