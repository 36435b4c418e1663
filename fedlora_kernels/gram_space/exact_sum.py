"""ExactSum: a sum of float64 tensors that has the same bits in whatever order its terms come.

Every number is cut into digits to the base 2^32, at places that are the same for all numbers:

    x = sum over e of d_e 2^(32 e)        d_e whole, |d_e| < 2^32

The digits of one place add up without rounding, for up to 2^20 terms. What is rounded is only the
sum over the places, at the end. Numbers below 2^-1056 count as zero; infinities and NaN stay.
"""

import math

from torch import Tensor

BITS = 32
LOWEST = -33
"""The last place whose unit, 2^(32 e), is a float64."""
NOT_FINITE = 32
"""The place of terms that have no digits: above all others, 2^(32 e) is no float64 there."""


class ExactSum:
    """The sum of some terms; of one term at first."""

    def __init__(self, term: Tensor) -> None:
        self._digits: dict[int, Tensor] = {}
        """place -> digits times their unit"""
        self._like = term.new_zeros(()).expand(term.shape)
        rest = term
        while (largest := float(rest.abs().max()) if rest.numel() else 0.0) != 0:
            if not math.isfinite(largest):
                self._digits[NOT_FINITE] = term
                break
            place = max(LOWEST, (math.frexp(largest)[1] - 1) // BITS)
            unit = math.ldexp(1.0, BITS * place)
            digits = (rest / unit).trunc_().mul_(unit)
            self._digits[place] = digits
            if place == LOWEST:
                break
            rest = rest - digits

    def __add__(self, other: "ExactSum") -> "ExactSum":
        """Both sums together; neither is changed."""
        total = ExactSum(self._like)
        total._digits = dict(self._digits)
        for place, digits in other._digits.items():
            known = total._digits.get(place)
            total._digits[place] = digits if known is None else known + digits
        return total

    def over(self) -> "ExactSum":
        """The sum over the first dimension."""
        total = ExactSum(self._like.sum(0))
        total._digits = {place: digits.sum(0) for place, digits in self._digits.items()}
        return total

    @property
    def value(self) -> Tensor:
        """The sum, rounded."""
        total = self._like.clone()
        for _, digits in sorted(self._digits.items()):
            total = total + digits
        return total
