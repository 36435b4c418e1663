"""What a few seeds allow one to say: intervals of means, and differences within noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean: t(n - 1) s / sqrt(n), for n >= 2 values.

    NaN where one of them is not finite.
    """
    if not all(map(math.isfinite, values)):
        return math.nan
    # A second to import, and only runs of several seeds need it.
    from scipy.stats import t  # type: ignore[import-untyped]

    n = len(values)
    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)


def within_noise(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the 95 % interval of the mean difference, seed by seed, contains 0.

    Pairs: with one seed two rules share data, start and draws, so what a seed does to both cancels.
    There is no correction for the number of rules: among many equal ones some are told apart.
    """
    differences = [one - other for one, other in zip(values, others, strict=True)]
    return abs(sum(differences) / len(differences)) <= interval(differences)
