"""robust: what the clients' inner products and a robust rule's weights cost beside the Gram pass.

The first row of a block is the Gram pass over the clients' factors, which a rule such as FLoRIST
makes anyway. The other rows begin with the Gram matrices: the K x K inner products, then the
weights. Their floor is reading the lower triangles of both matrices once.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.stand import inputs, roofline
from benchmarks.stand.correctness import EXACT, Check
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.shapes import Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import GramMatrices
from benchmarks.suites.aggregate import adapters, names
from fedlora_kernels import ops, robust
from fedlora_kernels.gram_space.batches import stack
from fedlora_kernels.gram_space.grams import Grams
from fedlora_kernels.gram_space.updates import Updates, products

CASES = (
    Case("RoBERTa-large", "query", equal(8, 16), modules=48),
    Case("Llama-2-7B", "q_proj", equal(16, 16), modules=224, dtype=torch.bfloat16),
)
TINY = (Case("all-MiniLM-L6-v2", "query", equal(4, 4), modules=6),)


class Weighed:
    """The Gram matrices of a round, and its clients' inner products another way."""

    def __init__(self, stacks: Stacks) -> None:
        self.stacks = stacks
        clients = adapters(inputs.Round.of(stacks))
        self.labels = [str(client.name) for client in clients]
        self.batches = stack(clients, stacks.weights)
        self.made = [Grams(batch) for batch in self.batches]
        for grams in self.made:
            _ = grams.matrices

    def passed(self) -> tuple[Tensor, Tensor]:
        """Both Gram matrices, from the factors where they lie."""
        found = [
            [
                ops.gram_list(factors, len(batch.modules), rows=rows)
                for factors, rows in ((batch.list_b, False), (batch.list_a, True))
            ]
            for batch in self.batches
        ]
        return torch.cat([b for b, _ in found]), torch.cat([a for _, a in found])

    def in_order(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same in the order of the stacks: batches sort modules by name."""
        known = [name for batch in self.batches for name in batch.modules]
        order = torch.tensor([known.index(name) for name in names(self.stacks)])
        return found[0][order], found[1][order]

    def updates(self) -> Updates:
        """The inner products, from Gram matrices that are there."""
        fresh = []
        for grams in self.made:
            one = Grams(grams.batch)
            one.adopt(grams)
            fresh.append(one)
        return Updates.summed([products(fresh, len(self.labels))], self.labels)

    def weights(self, rule: robust.Robust) -> tuple[Updates, robust.Weighing]:
        """A robust rule's, from the inner products on."""
        updates = self.updates()
        return updates, rule.weigh(updates, self.stacks.weights, self.labels)

    @cached_property
    def expected(self) -> Tensor:
        """<dW_j, dW_k> in float64 without a Gram matrix: B_j T_j with A = [T_1 ; ...] Q by QR."""
        case = self.stacks.case
        total = torch.zeros(case.clients, case.clients, dtype=torch.float64)
        for index, scalings in enumerate(self.stacks.scalings):
            triangle = torch.linalg.qr(self.stacks.a[index].double().mT, mode="r")[1]
            updates = [
                (scale * (b.double() @ t.mT)).flatten()
                for scale, b, t in zip(
                    scalings,
                    self.stacks.b[index].split(case.ranks, dim=1),
                    triangle.split(case.ranks, dim=1),
                    strict=True,
                )
            ]
            points = torch.stack(updates)
            total += points @ points.mT
        return total

    def checks(self, found: Updates) -> list[Check]:
        """Every inner product beside that one, and weights that sum to 1."""
        sizes = self.expected.diagonal().sqrt()
        gap = (found.products - self.expected).abs() / (sizes[:, None] * sizes[None, :])
        return [Check("inner products", float(gap.max()), EXACT)]


def compare(stacks: Stacks) -> Comparison:
    """The Gram pass, the inner products, and every robust rule's weights."""
    asked, grams = Weighed(stacks), GramMatrices(stacks)
    case = stacks.case
    work = roofline.client_products(len(stacks.scale), case.clients, case.stacked_rank)

    def of(rule: robust.Robust) -> Variant:
        return Variant(
            rule.name,
            lambda: asked.weights(rule),
            lambda found: [
                *asked.checks(found[0]),
                Check("sum of the weights", abs(sum(found[1].weights) - 1), EXACT),
            ],
            work,
        )

    run: Callable[[], Updates] = asked.updates
    variants = (
        Variant(
            "Gram matrices",
            asked.passed,
            lambda found: grams.checks(asked.in_order(found)),
            grams.work,
        ),
        Variant("inner products", run, asked.checks, work),
        *(of(robust.make(name)) for name in robust.names()),
    )
    return Comparison("robust", stacks.case, variants)


SUITE = Suite("robust", on_cases(compare, CASES), everyday=False, tiny=on_cases(compare, TINY))
