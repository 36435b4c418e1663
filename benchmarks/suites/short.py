"""short: every stage once beside its peers, under a minute on two cores (``fedlora bench``)."""

from collections.abc import Callable, Mapping

from benchmarks.stand.device import Device
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Make, Suite, drawn
from benchmarks.suites import combine, flora_na, gram, spectrum, stacked_svd, weighted_sum

LLAMA = Case("Llama-3-8B", "q_proj", equal(8, 16), modules=4)
TINY = Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2)

COMPARISONS: tuple[tuple[str, Case, Callable[[Stacks], Comparison]], ...] = (
    ("gram", LLAMA, gram.compare),
    ("spectrum", LLAMA, spectrum.compare),
    ("combine", LLAMA, combine.compare),
    ("weighted_sum", LLAMA, weighted_sum.compare),
    ("stacked_svd", LLAMA, stacked_svd.compare),
    ("flora_na", LLAMA, flora_na.compare),
    ("stacked_svd", TINY, stacked_svd.compare_all),
)


def comparisons(device: Device) -> Mapping[str, Make]:
    """Four modules of one size, and what forms the dense update on a smaller one."""

    def of(case: Case, compare: Callable[[Stacks], Comparison]) -> Make:
        return lambda where: compare(drawn(case, where))

    return {f"{name} {case}": of(case, compare) for name, case, compare in COMPARISONS}


SUITE = Suite("short", comparisons, everyday=False, budget_s=1.0)
