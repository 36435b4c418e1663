"""Local training: a client starts from an adapter and gives its own back.

The loop is written out because a client takes 8 steps a round: they cost 1.37 s of CPU time here
and 1.75 s through transformers' Trainer (one thread of an EPYC, transformers 5), which also keeps
its own random state, while here everything is drawn from (seed, round, client).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fedlora_kernels as flk
from integration.model import Model, generator
from integration.settings import Settings
from integration.tokens import Tokens


@dataclass(frozen=True)
class Client:
    """One party: its number, its rank and the positions of its examples in the training split."""

    number: int
    rank: int
    positions: list[int]

    def train(
        self,
        model: Model,
        tokens: Tokens,
        start: flk.Adapter,
        round_number: int,
        settings: Settings,
        trains: str = "both",
        on_step: Callable[[], None] = lambda: None,
    ) -> flk.Adapter:
        """`settings.steps` steps of AdamW on the cross-entropy, from `start`.

        The learning rate falls linearly over the rounds, to 1/rounds of its value in the last one:
        a constant one leaves the accuracy of a rule that starts afresh (FLoRA) at the mercy of its
        last round (0.73, then 0.71).

        The logits of the training (never those of a test) carry the logarithms of the client's own
        class frequencies: a client with few classes would otherwise spend its steps on learning
        which classes it holds (balanced softmax, arXiv 2007.10740; in federations 2209.00189).

        `trains` is "both", or "b" where the rule freezes A. Nothing is left behind in the model but
        the contents of an adapter slot; equal arguments give equal bits.
        """
        parameters = model.take(start, trains)
        rate = settings.learning_rate * (1 - (round_number - 1) / settings.rounds)
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        frequencies = self.log_frequencies(tokens, model.classes)
        for positions in self.batches(tokens, round_number, settings):
            batch = tokens.batch(positions)
            loss = cross_entropy(model.logits(batch) + frequencies, batch.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            on_step()
        return model.give(self.rank, f"client {self.number}")

    def log_frequencies(self, tokens: Tokens, classes: int) -> Tensor:
        """log((n_c + 1) / (n + classes)) for the client's n examples, n_c of class c: [classes]."""
        counts = torch.bincount(tokens.labels[self.positions], minlength=classes)
        return ((counts + 1) / (len(self.positions) + classes)).log()

    def batches(self, tokens: Tokens, round_number: int, settings: Settings) -> list[list[int]]:
        """One round's batches: passes over the client's data in an order of their own, cut off.

        What the round uses is drawn first and then laid out by length, so that a batch holds texts
        of similar length and little padding; the order of the batches is shuffled again.
        """
        drawn_from = generator(settings.seed, round_number, self.number)
        needed = settings.steps * settings.batch_size
        drawn: list[int] = []
        while len(drawn) < needed:
            order = torch.randperm(len(self.positions), generator=drawn_from).tolist()
            drawn += [self.positions[place] for place in order]
        drawn = sorted(drawn[:needed], key=tokens.length)
        order = torch.randperm(settings.steps, generator=drawn_from).tolist()
        size = settings.batch_size
        return [drawn[place * size : (place + 1) * size] for place in order]
