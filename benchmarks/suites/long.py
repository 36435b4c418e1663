"""long: the short table with more rounds, and 32 clients as well (``fedlora bench --long``)."""

from collections.abc import Mapping

from benchmarks.stand.device import Device
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Make, Suite, on_cases
from benchmarks.suites import gram, short, spectrum, stacked_svd

MANY = (Case("Llama-3-8B", "q_proj", equal(32, 16), modules=4),)


def comparisons(device: Device) -> Mapping[str, Make]:
    """The short table's, then those of 32 clients."""
    many = {
        f"{name} {case}": make
        for name, compare in (
            ("gram", gram.compare),
            ("spectrum", spectrum.compare),
            ("stacked_svd", stacked_svd.compare),
        )
        for case, make in on_cases(compare, MANY)(device).items()
    }
    return {**short.comparisons(device), **many}


SUITE = Suite("long", comparisons, everyday=False, budget_s=10.0)
