"""gram: both Gram matrices of real stacks beside bmm in float64 and float32."""

import torch

from benchmarks.peers import bmm
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import FLORIST_RANKS, Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import GramMatrices
from fedlora_kernels import ops

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


def compare(stacks: Stacks) -> Comparison:
    """Both precisions."""
    b, a = stacks.b, stacks.a
    exact, fast = GramMatrices(stacks), GramMatrices(stacks, "fast")

    def ours(task: GramMatrices) -> Variant:
        return Variant(
            task.precision,
            lambda: (ops.gram(b, False, task.precision), ops.gram(a, True, task.precision)),
            task.checks,
            task.work,
        )

    others = variants(exact, (bmm.GRAM_64,)) + variants(fast, (bmm.GRAM_32,))
    return Comparison("gram", stacks.case, (ours(exact), ours(fast), *others))


SUITE = Suite("gram", on_cases(compare, CASES))
