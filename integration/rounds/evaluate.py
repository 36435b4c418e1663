"""How good a model is on a split: accuracy and loss, by the kind of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import fedlora_kernels as flk
from integration.model.model import Model
from integration.model.tokens import IGNORED, Completions, Tokens, predicted
from integration.tasks import LoadedTask


@dataclass(frozen=True)
class Score:
    """Accuracy and loss on a split.

    Classification: share of right classes, mean cross-entropy. Language: share of right answers (or
    of predicted tokens, where the task has no answers), mean cross-entropy of the completions'
    tokens; its exponential is the perplexity.
    """

    accuracy: float
    loss: float
    texts: tuple[str, ...] = ()
    """What a language model wrote for the first SHOWN test examples, where it answers."""


SHOWN = 3
"""Examples whose generated texts are kept, for people to read."""


def evaluate(
    model: Model,
    task: LoadedTask,
    tokens: Tokens,
    *adapters: flk.Adapter,
    max_new_tokens: int = 64,
    answers: int | None = None,
    among: Sequence[int] | None = None,
) -> Score:
    """The score of the base with these adapters' updates on `tokens`.

    `among` are the positions to look at, all of them when None; answers are generated for the first
    `answers` of them.
    """
    model.network.eval()
    with torch.inference_mode(), model.carrying(*adapters):
        if not isinstance(tokens, Completions):
            return _classes(model, tokens, among)
        score = _next_tokens(model, tokens, among)
        if task.right is None:
            return score
        asked = (range(len(tokens)) if among is None else among)[:answers]
        written = _written(model, tokens, max_new_tokens, asked)
        right = [task.right(tokens.examples[place], text) for place, text in written.items()]
        shown = tuple(written[place] for place in range(SHOWN) if place in written)
        return Score(sum(right) / max(len(right), 1), score.loss, shown)


def _classes(model: Model, tokens: Tokens, among: Sequence[int] | None) -> Score:
    right, loss, seen = 0, 0.0, 0
    for positions in tokens.in_order_of_length(model.evaluation_batch, among):
        batch = model.here(tokens.batch(positions))
        labels = batch.pop("labels")
        logits = model.network(**batch).logits.float()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        seen += len(positions)
    return Score(right / seen, loss / seen)


def _next_tokens(model: Model, tokens: Completions, among: Sequence[int] | None) -> Score:
    right, loss, seen = 0, 0.0, 0
    for positions in tokens.in_order_of_length(model.evaluation_batch, among):
        batch = model.here(tokens.batch(positions))
        labels = batch.pop("labels")
        last = predicted(labels)
        labels = labels[:, -last:][:, 1:]
        counted = labels != IGNORED
        logits = model.network(**batch, logits_to_keep=last).logits[:, :-1][counted].float()
        right += int((logits.argmax(1) == labels[counted]).sum())
        loss += float(cross_entropy(logits, labels[counted], reduction="sum"))
        seen += int(counted.sum())
    return Score(right / max(seen, 1), loss / max(seen, 1))


def _written(
    model: Model, tokens: Completions, max_new_tokens: int, among: Sequence[int]
) -> dict[int, str]:
    """Position -> the greedily generated text."""
    texts: dict[int, str] = {}
    for positions in tokens.in_order_of_length(model.evaluation_batch, among):
        prompts = model.here(tokens.to_complete(positions))
        written = model.network.generate(  # type: ignore[operator]
            **prompts,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokens.padding,
            eos_token_id=model.tokenizer.eos_token_id,
        )
        ends = written[:, prompts["input_ids"].shape[1] :]
        decoded = model.tokenizer.batch_decode(ends, skip_special_tokens=True)
        texts |= zip(positions, decoded, strict=True)
    return texts
