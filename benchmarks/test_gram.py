"""gram: both Gram matrices of real stacks beside bmm in float64 and float32."""

import pytest
import torch

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import stages
from fedlora_kernels.bench.shapes import FLORIST_RANKS, Case, equal

CASES = (
    Case("TinyLlama-1.1B", "q_proj", equal(3, 8), modules=22),
    Case("Llama-3.2-1B", "v_proj", equal(8, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, dtype=torch.bfloat16),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=4),
    Case("Llama-3-8B", "down_proj", FLORIST_RANKS, modules=4),
    Case("Llama-3-8B", "v_proj", equal(32, 64), modules=1),
    Case("RoBERTa-large", "query", equal(3, 8), modules=24),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(stages.gram(drawn(case)))
