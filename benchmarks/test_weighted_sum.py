"""weighted_sum: averages of the clients' A beside Flower's numpy sums and torch.einsum."""

import pytest
import torch

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import stages
from fedlora_kernels.bench.shapes import Case, equal

CASES = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=24),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=16, dtype=torch.bfloat16),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=4),
    Case("Llama-2-7B", "q_proj", equal(32, 64), modules=1),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weighted_sum(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(stages.weighted_sum(drawn(case)))
