"""FLoRA (arXiv 2409.05976, NeurIPS 2024): the stack itself, exact at rank R = sum_k r_k.

B = [B_1 | ... | B_K]        A = [w_1 s_1 A_1 ; ... ; w_K s_K A_K]
"""

from collections.abc import Sequence

from fedlora_kernels.grams import Grams
from fedlora_kernels.rules.rule import Rule
from fedlora_kernels.rules.solution import Solution, Stacked


def solve(grams: Sequence[Grams]) -> list[Solution]:
    """Weights and scalings enter on A's side only."""
    return [Solution(Stacked(batch.scale)) for batch in grams]


RULE = Rule(
    name="flora",
    title="FLoRA",
    paper="2409.05976",
    solve=solve,
    travels="A and B",
    exact="yes",
    is_exact=True,
    heterogeneous=True,
    after="merge",
)
