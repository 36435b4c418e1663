"""aggregate: whole aggregations in memory, with their reports, beside each rule's peer."""

import pytest

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import aggregations
from fedlora_kernels.bench.shapes import FLORIST_RANKS, Case, equal

TINY = Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22)
LLAMA = Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=32)
DENSE = Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2)

CASES = (
    (TINY, "fedit"),
    (TINY, "flora_na"),
    (TINY, "flora"),
    (TINY, "florist"),
    (LLAMA, "florist"),
    (LLAMA, "flora"),
    (TINY, "fedex"),
    (TINY, "hetlora"),
    (DENSE, "flexlora"),
)


@pytest.mark.parametrize(("case", "rule"), CASES, ids=str)
def test_aggregate(case: Case, rule: str, drawn: Drawn, compare: Compare) -> None:
    compare(aggregations.aggregation(drawn(case), rule))
