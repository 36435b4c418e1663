"""flora_na: FLoRA-NA in one call beside FedIT's average, which solves nothing."""

import torch
from torch import Tensor

from benchmarks.peers import flower
from benchmarks.stand import correctness, roofline
from benchmarks.stand.correctness import Check
from benchmarks.stand.inputs import Round, Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import Averages, Surrogate
from fedlora_kernels import ops, reference

CASES = (
    Case("RoBERTa-large", "query", equal(3, 8), modules=24),
    Case("TinyLlama-1.1B", "q_proj", equal(8, 16), modules=22, family="unbalanced"),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=8, family="unbalanced"),
    Case("Llama-2-7B", "q_proj", equal(10, 16), modules=8, dtype=torch.bfloat16),
    Case("Llama-3-8B", "down_proj", equal(8, 16), modules=4),
)


def compare(stacks: Stacks) -> Comparison:
    """Exact and fast, beside the plain average that FedIT takes."""
    task, case = Surrogate(stacks), stacks.case
    b, a, weights, scalings = stacks.b, stacks.a, stacks.weights, stacks.scalings
    blocks_b = b.unflatten(2, (case.clients, -1)).movedim(2, 1)
    blocks_a = a.unflatten(1, (case.clients, -1))
    width = correctness.OUTPUT_EPS[case.dtype]

    def checks(found: tuple[Tensor, ...]) -> list[Check]:
        b_hat, a_hat, p, q = found[:4]
        expected_b = reference.weighted_sum(blocks_b, q * scalings)
        return [
            *task.checks((p, q)),
            correctness.same_tensor(b_hat, expected_b, 2 * width),
            correctness.same_tensor(a_hat, reference.weighted_sum(blocks_a, p), 2 * width),
        ]

    def facts(found: tuple[Tensor, ...]) -> dict[str, object]:
        return task.facts(found[2:4])

    def ours(precision: str) -> Variant:
        return Variant(
            precision,
            lambda: ops.flora_na(b, a, weights, scalings, precision),
            checks,
            roofline.flora_na(b, a, case.clients, precision),
            facts=facts,
        )

    others = variants(Averages(Round.of(stacks)), (flower.AS_LESS,))
    return Comparison("flora_na", case, (ours("exact"), ours("fast"), *others))


SUITE = Suite("flora_na", on_cases(compare, CASES))
