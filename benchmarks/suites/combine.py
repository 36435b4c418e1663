"""combine: the second pass at the ranks of energy 0.9 beside bmm in float64 and float32."""

import torch

from benchmarks.peers import bmm
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import FLORIST_RANKS, Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import Combination
from fedlora_kernels import ops

CASES = (
    Case("TinyLlama-1.1B", "q_proj", equal(3, 8), modules=22),
    Case("Llama-3-8B", "v_proj", equal(8, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, family="drifted"),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=8, dtype=torch.bfloat16),
    Case("Llama-3-8B", "up_proj", FLORIST_RANKS, modules=4),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=4, family="drifted"),
)


def compare(stacks: Stacks) -> Comparison:
    """Coefficients in float64 and in float32."""
    task = Combination(stacks)
    b, a = stacks.b, stacks.a
    x, y = task.coefficients
    narrow_x, narrow_y = x.float(), y.float()
    ours = (
        Variant(
            "float64 coefficients",
            lambda: ops.combine(b, a, x, y),
            task.checks,
            task.work,
            facts=lambda _: {"rank": task.kept},
        ),
        Variant(
            "float32 coefficients",
            lambda: ops.combine(b, a, narrow_x, narrow_y),
            task.checks,
            task.work,
        ),
    )
    others = variants(task, (bmm.COMBINE_64, bmm.COMBINE_32))
    return Comparison("combine", stacks.case, (*ours, *others))


SUITE = Suite("combine", on_cases(compare, CASES))
