"""How good a model is on a split: accuracy and loss, by the kind of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

import fedlora_kernels as flk
from integration.model.model import Model
from integration.model.tokens import IGNORED, Completions, Tokens
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


def evaluate(
    model: Model,
    task: LoadedTask,
    tokens: Tokens,
    *adapters: flk.Adapter,
    max_new_tokens: int = 64,
    among: Sequence[int] | None = None,
) -> Score:
    """The score of the base with these adapters' updates on `tokens`.

    `among` are the positions to look at; all of them when None.
    """
    model.network.eval()
    with torch.inference_mode(), model.carrying(*adapters):
        if not isinstance(tokens, Completions):
            return _classes(model, tokens, among)
        score = _next_tokens(model, tokens, among)
        if task.right is None:
            return score
        return Score(_answers(model, task, tokens, max_new_tokens, among), score.loss)


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
        labels = batch.pop("labels")[:, 1:]
        counted = labels != IGNORED
        logits = model.network(**batch).logits[:, :-1][counted].float()
        right += int((logits.argmax(1) == labels[counted]).sum())
        loss += float(cross_entropy(logits, labels[counted], reduction="sum"))
        seen += int(counted.sum())
    return Score(right / max(seen, 1), loss / max(seen, 1))


def _answers(
    model: Model,
    task: LoadedTask,
    tokens: Completions,
    max_new_tokens: int,
    among: Sequence[int] | None,
) -> float:
    """Share of examples whose greedily generated text is right."""
    assert task.right is not None
    right, seen = 0, 0
    for positions in tokens.in_order_of_length(model.evaluation_batch, among):
        prompts = model.here(tokens.to_complete(positions))
        written = model.network.generate(  # type: ignore[operator]
            **prompts,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokens.padding,
            eos_token_id=model.tokenizer.eos_token_id,
        )
        texts = model.tokenizer.batch_decode(
            written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(
            task.right(tokens.examples[position], text)
            for position, text in zip(positions, texts, strict=True)
        )
        seen += len(positions)
    return right / max(seen, 1)
