"""stacked_svd: FLoRIST in one call beside three SVDs, QR, PEFT and the dense SVDs.

What forms the dense update is measured where that takes seconds, not minutes: sides to 2048.
"""

import pytest
import torch

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import pipelines
from fedlora_kernels.bench.shapes import FLORIST_RANKS, Case, equal

FACTORED = (
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22),
    Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, family="drifted"),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, dtype=torch.float64),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=2),
    Case("RoBERTa-large", "query", equal(32, 64), modules=1),
)

DENSE = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=1),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=2),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=1),
    Case("Llama-3.2-1B", "v_proj", FLORIST_RANKS, modules=1),
)


@pytest.mark.parametrize("case", FACTORED, ids=str)
def test_factored(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(pipelines.stacked_svd(drawn(case)))


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(pipelines.stacked_svd(drawn(case), dense=True, merged=("svd", "cat")))
