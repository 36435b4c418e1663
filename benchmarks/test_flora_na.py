"""flora_na: FLoRA-NA in one call beside FedIT's average, which solves nothing."""

import pytest
import torch

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import pipelines
from fedlora_kernels.bench.shapes import Case, equal

CASES = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=24),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22, family="unbalanced"),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=8, family="unbalanced"),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=8, dtype=torch.bfloat16),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=4),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flora_na(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(pipelines.flora_na(drawn(case)))
