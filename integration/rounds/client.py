"""Local training: a client starts from an adapter and gives its own back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

import fedlora_kernels as flk
from integration.model.model import Model
from integration.model.tokens import Completions, Tokens
from integration.model.trainer import LocalTrainer, Moments
from integration.settings import Settings
from integration.settings.seeds import generator, seed


@dataclass(frozen=True)
class Update:
    """What a client sends after a round of local training."""

    client: int
    adapter: flk.Adapter
    examples: int
    """Number of its training examples: its weight in the aggregation."""
    loss: float
    """Mean training loss of the round."""
    seconds: float
    trains: str = "both"
    """The factors that were trained."""
    moments: Moments | None = field(default=None, repr=False)
    """AdamW's state; it stays with the client."""


@dataclass(frozen=True)
class Client:
    """One party: its number, its rank and the positions of its examples in the training split."""

    number: int
    rank: int
    positions: list[int]
    tests: list[int] = field(default_factory=list)
    """Positions in the test split that follow the client's own proportions of labels."""

    def train(
        self,
        model: Model,
        trainer: LocalTrainer,
        tokens: Tokens,
        start: flk.Adapter,
        round_number: int,
        settings: Settings,
        trains: str = "both",
        moments: Moments | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Update:
        """One round of AdamW on the cross-entropy, from `start`.

        With the balanced loss the logits of a classification's training (never those of a test)
        carry the logarithms of the client's own class frequencies: a client with few classes would
        otherwise spend its steps on learning which classes it holds (balanced softmax, arXiv
        2007.10740; in federations 2209.00189).

        `trains` is "both", or the factor that trains: "a" or "b". Nothing is left behind in the
        model but the contents of an adapter slot; equal arguments give equal bits.
        """
        begun = perf_counter()
        parameters = model.take(start, trains)
        balanced = settings.loss == "balanced" and not isinstance(tokens, Completions)
        loss, after = trainer.fit(
            parameters,
            tokens,
            self.batches(tokens, round_number, settings),
            rate=rate(round_number, settings),
            seed=seed(settings.seed, round_number, self.number) % 2**32,
            frequencies=self.log_frequencies(tokens, model.classes) if balanced else None,
            moments=moments,
            on_step=on_step,
        )
        return Update(
            client=self.number,
            adapter=model.give(self.rank, f"client {self.number}"),
            examples=len(self.positions),
            loss=loss,
            seconds=perf_counter() - begun,
            trains=trains,
            moments=after if settings.optimizer_state == "keep" else None,
        )

    def log_frequencies(self, tokens: Tokens, classes: int) -> Tensor:
        """log((n_c + 1) / (n + classes)) for the client's n examples, n_c of class c: [classes]."""
        counts = torch.bincount(tokens.labels[self.positions], minlength=classes)
        return ((counts + 1) / (len(self.positions) + classes)).log()

    def steps(self, settings: Settings) -> int:
        """Optimizer steps of one round."""
        if settings.steps is not None:
            return settings.steps
        return int(settings.epochs or 1) * math.ceil(len(self.positions) / settings.batch_size)

    def batches(self, tokens: Tokens, round_number: int, settings: Settings) -> list[list[int]]:
        """One round's batches: passes over the client's data in an order of their own, cut off.

        What the round uses is drawn first and then laid out by length, so that a batch holds texts
        of similar length and little padding; the order of the batches is shuffled again.
        """
        drawn_from = generator(settings.seed, round_number, self.number)
        size = settings.batch_size
        if settings.steps is None:
            needed = int(settings.epochs or 1) * len(self.positions)
        else:
            needed = settings.steps * size
        drawn: list[int] = []
        while len(drawn) < needed:
            order = torch.randperm(len(self.positions), generator=drawn_from).tolist()
            drawn += [self.positions[place] for place in order]
        drawn = sorted(drawn[:needed], key=tokens.length)
        count = math.ceil(needed / size)
        order = torch.randperm(count, generator=drawn_from).tolist()
        return [drawn[place * size : (place + 1) * size] for place in order]


def rate(round_number: int, settings: Settings) -> float:
    """The learning rate of a round; within the round it is constant.

    `linear` falls to 1/rounds of its first value, `cosine` along half a cosine: a constant one
    leaves the accuracy of a rule that starts afresh (FLoRA) at the mercy of its last round (0.73,
    then 0.71).
    """
    done = (round_number - 1) / settings.rounds
    falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return settings.learning_rate * falling[settings.schedule]
