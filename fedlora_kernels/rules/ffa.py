"""FFA-LoRA (arXiv 2403.12313): A is a fixed common start, only B is trained and averaged: exact.

A = A_1 = ... = A_K        B = sum_k w_k B_k
"""

from collections.abc import Sequence

import torch

from fedlora_kernels.adapter import Adapter
from fedlora_kernels.factors import AdapterError
from fedlora_kernels.grams import Grams
from fedlora_kernels.peft_format import label
from fedlora_kernels.rules.rule import Rule, equal_rank, unequal_rank
from fedlora_kernels.rules.solution import Mixture, Solution, common_scaling


def solve(grams: Sequence[Grams]) -> list[Solution]:
    """The mean of B beside the common A, bit for bit."""
    solutions = []
    for batch in grams:
        rank = equal_rank(batch, "ffa")
        scaling, folded = common_scaling(batch)
        first = torch.zeros_like(folded)
        first[:, 0] = 1
        solutions.append(Solution(Mixture(batch.weights * folded, first, scaling, rank)))
    return solutions


def validate(adapters: Sequence[Adapter]) -> None:
    """Refuse clients whose A differs from the first client's (they trained or drew their own)."""
    first: dict[str, int] = {}
    pairs = [
        (index, first.setdefault(module, index), module)
        for index, adapter in enumerate(adapters)
        for module in adapter.factors
    ]
    names = [label(index, adapter.name) for index, adapter in enumerate(adapters)]
    for index, owner, module in pairs:
        rank, common = (adapters[k].factors[module].rank for k in (index, owner))
        if rank != common:
            raise unequal_rank("ffa", names[index], module, rank, names[owner], common)
    for index, owner, module in pairs:
        a, common_a = (adapters[k].factors[module].a.cpu() for k in (index, owner))
        if not torch.equal(a, common_a):
            raise AdapterError(
                f"{names[index]}, module {module}: A differs from {names[owner]}'s; ffa expects "
                "one fixed A in all clients (only B is trained)"
            )


RULE = Rule(
    name="ffa",
    title="FFA-LoRA",
    paper="2403.12313",
    solve=solve,
    travels="B",
    exact="yes",
    is_exact=True,
    heterogeneous=False,
    sends="b",
    trains="b",
    validate=validate,
)
