"""surrogate: FLoRA-NA's p and q from Gram matrices beside gradient descent with Adam."""

import pytest

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import stages
from fedlora_kernels.bench.shapes import Case, equal

CASES = (
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1, family="unbalanced"),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1, family="flipped"),
    Case("RoBERTa-large", "query", equal(10, 16), modules=1, family="unbalanced"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_surrogate(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(stages.surrogate(drawn(case)))
