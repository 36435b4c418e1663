"""weighted_sum: averages of the clients' A beside Flower's numpy sums and torch.einsum."""

import torch

from benchmarks.peers import einsum, flower
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import Mean
from fedlora_kernels import ops

CASES = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=24),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=16, dtype=torch.bfloat16),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=4),
    Case("Llama-2-7B", "q_proj", equal(32, 64), modules=1),
)


def compare(stacks: Stacks) -> Comparison:
    """From one stacked tensor, and from the clients' tensors where they lie."""
    task, weights = Mean(stacks), stacks.weights
    listed = [factor for module in stacks.client_a for factor in module]
    per_module = weights.expand(stacks.case.modules, -1).contiguous()
    ours = (
        Variant("stacked", lambda: ops.weighted_sum(task.stacked, weights), task.checks, task.work),
        Variant(
            "listed",
            lambda: ops.weighted_sum_list(listed, per_module),
            task.checks,
            task.work,
            note="clients' tensors where they lie",
        ),
    )
    others = variants(task, (einsum.PEER, flower.MEAN))
    return Comparison("weighted_sum", stacks.case, (*ours, *others))


SUITE = Suite("weighted_sum", on_cases(compare, CASES))
