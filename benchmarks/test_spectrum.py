"""spectrum: from two Gram matrices, leading and all, beside torch.linalg module by module."""

import pytest

from benchmarks.conftest import Compare, Drawn
from fedlora_kernels.bench import stages
from fedlora_kernels.bench.shapes import FLORIST_RANKS, Case, equal

CASES = (
    Case("TinyLlama-1.1B", "q_proj", equal(3, 8), modules=22),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=16, family="drifted"),
    Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=16),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2, family="drifted"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_spectrum(case: Case, drawn: Drawn, compare: Compare) -> None:
    compare(stages.spectrum(drawn(case)))
