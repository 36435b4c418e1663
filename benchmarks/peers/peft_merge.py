"""PEFT's add_weighted_adapter on a model that holds all clients' adapters (svd and cat)."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.stand.correctness import Check, Pair
from benchmarks.stand.inputs import Round
from benchmarks.stand.peer import Peer, Prepared
from benchmarks.stand.tasks import Stack, Truncation


def installed(task: object) -> bool:
    """The extra ``bench`` installs it."""
    return find_spec("peft") is not None


class PeftModel:
    """A model of linear layers that holds all clients' adapters, as PEFT merges them.

    Building it is not timed; ``add_weighted_adapter`` is.
    """

    MERGED = "merged"

    def __init__(self, round_: Round) -> None:
        from peft import LoraConfig, get_peft_model

        parts = [(part, index) for part in round_.parts for index in range(part.case.modules)]
        layers = [
            torch.nn.utils.skip_init(
                torch.nn.Linear, part.case.n, part.case.m, bias=False, device=part.b.device
            )
            for part, _ in parts
        ]
        base = torch.nn.Module()
        base.layers = torch.nn.ModuleList(layers)
        self.names = [f"client{k}" for k in range(round_.case.clients)]
        self.weights = round_.shares
        self.model: Any = None
        for k, (name, rank) in enumerate(zip(self.names, round_.case.ranks, strict=True)):
            alpha = float(round_.parts[0].scalings[0, k]) * rank
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=[str(i) for i in range(len(layers))]
            )
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        self.layers = self.model.base_model.model.layers
        for layer, (part, index) in zip(self.layers, parts, strict=True):
            for k, name in enumerate(self.names):
                layer.lora_B[name].weight.data = part.client_b[index][k].float()
                layer.lora_A[name].weight.data = part.client_a[index][k].float()

    def forget(self) -> None:
        """Remove the last result: PEFT returns at once where the name exists."""
        if self.MERGED in self.model.peft_config:
            self.model.delete_adapter(self.MERGED)

    def merge(self, combination: str, rank: int | None = None) -> list[Pair]:
        """``add_weighted_adapter`` with PEFT's defaults; ``rank`` is svd_rank."""
        self.model.base_model.add_weighted_adapter(
            self.names,
            self.weights,
            self.MERGED,
            combination_type=combination,
            svd_rank=rank,
        )
        return [
            (
                layer.lora_B[self.MERGED].weight.data * layer.scaling[self.MERGED],
                layer.lora_A[self.MERGED].weight.data,
            )
            for layer in self.layers
        ]


def _svd(task: Truncation) -> Prepared:
    model, rank = PeftModel(task.round), task.fixed_rank
    return Prepared(
        lambda: model.merge("svd", rank), model.forget, f"fixed rank {rank}", task.facts
    )


def _near_optimal(task: Truncation, found: Sequence[Pair]) -> list[Check]:
    return task.checks(found, room=10, ranks=False)


def _cat(task: Stack) -> Prepared:
    model = PeftModel(task.round)
    note = f"stacks only: rank {task.round.case.stacked_rank}"
    return Prepared(lambda: model.merge("cat"), model.forget, note)


SVD = Peer(
    "PEFT svd",
    "peft add_weighted_adapter(combination_type='svd')",
    _svd,
    _near_optimal,
    answers=installed,
)
CAT = Peer(
    "PEFT cat",
    "peft add_weighted_adapter(combination_type='cat')",
    _cat,
    Stack.checks,
    answers=installed,
)
CAT_AS_LESS = replace(CAT, less=True)
"""Beside tasks that ask for more than a stack."""
