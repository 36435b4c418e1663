"""surrogate: FLoRA-NA's p and q from Gram matrices beside gradient descent with Adam."""

from dataclasses import dataclass

from torch import Tensor

from benchmarks.peers import adam
from benchmarks.stand import roofline
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.roofline import Work
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import Surrogate
from fedlora_kernels import ops

CASES = (
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1, family="unbalanced"),
    Case("TinyLlama-1.1B", "v_proj", equal(8, 16), modules=1, family="flipped"),
    Case("RoBERTa-large", "query", equal(10, 16), modules=1, family="unbalanced"),
)


@dataclass(frozen=True)
class Solve(Surrogate):
    """The same with both Gram matrices given."""

    @property
    def work(self) -> Work:
        """The coupling and one pair of steps."""
        case = self.stacks.case
        return roofline.surrogate(case.modules, case.clients, case.ranks[0])


def compare(stacks: Stacks, steps: int = Surrogate.steps) -> Comparison:
    """From the factors, and the solve alone."""
    task = Surrogate(stacks, steps)
    b, a, weights, scalings = stacks.b, stacks.a, stacks.weights, stacks.scalings
    whole = Variant(
        "gram + surrogate",
        lambda: ops.surrogate(ops.gram(b, False), ops.gram(a, True), weights, scalings),
        task.checks,
        task.work,
        facts=lambda found: {**task.facts(found), "sweeps": sweeps(found[2])},
    )
    others = variants(task, (adam.PEER,))
    return Comparison("surrogate", stacks.case, (whole, solve(stacks), *others))


def solve(stacks: Stacks) -> Variant:
    """FLoRA-NA's solve alone, its Gram matrices given."""
    task = Solve(stacks)
    grams = ops.gram(stacks.b, False), ops.gram(stacks.a, True)
    return Variant(
        "surrogate alone",
        lambda: ops.surrogate(*grams, stacks.weights, stacks.scalings),
        task.checks,
        task.work,
        note="Gram matrices given",
    )


def sweeps(objective: Tensor) -> list[int]:
    """Sweeps until a module's objective, [L, max_sweeps + 1], stands: the least and the most."""
    taken = (objective != objective[:, -1:]).sum(1)
    return [int(taken.min()), int(taken.max())]


SUITE = Suite("surrogate", on_cases(compare, CASES))
