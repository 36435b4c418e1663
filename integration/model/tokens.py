"""Texts, tokenized once and kept as token numbers; batches are padded to their longest text.

Language tasks follow the conventions of TRL's supervised fine-tuning: prompt and completion are
tokenized together with the end-of-text token behind them, conversations go through the tokenizer's
chat template, and the loss counts the completion's tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from integration.tasks import Example

Batch = dict[str, Tensor]
"""`input_ids` and `attention_mask` are [n, longest] int64; `labels` is [n] (classes) or
[n, longest] (next tokens), int64."""

IGNORED = -100
"""The label of a token that the loss does not count: torch's and transformers' own."""


class Tokens:
    """A split of a classification in the model's tokens, at most `max_tokens` of every text."""

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> None:
        self.examples = examples
        self.labels = torch.tensor([example.label for example in examples], dtype=torch.int64)
        self.padding = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.texts = self._tokenized(tokenizer, max_tokens) if examples else []

    def _tokenized(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Tensor]:
        texts = [example.text for example in self.examples]
        second = [example.second for example in self.examples if example.second is not None]
        encoded = tokenizer(texts, second or None, truncation=True, max_length=max_tokens)
        return [torch.tensor(ids) for ids in encoded["input_ids"]]

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, position: int) -> int:
        """Number of tokens of one text."""
        return len(self.texts[position])

    def batch(self, positions: Sequence[int]) -> Batch:
        """The texts at `positions`, padded to the longest of them."""
        texts = [self.texts[position] for position in positions]
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=self.padding),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in texts], batch_first=True),
            "labels": self._labels(positions),
        }

    def _labels(self, positions: Sequence[int]) -> Tensor:
        return self.labels[list(positions)]

    def in_order_of_length(
        self, size: int, among: Sequence[int] | None = None
    ) -> Iterator[list[int]]:
        """Batches of positions, the shortest texts first, so that hardly any padding is computed.

        `among` are the positions to go through; all of them when None.
        """
        order = sorted(range(len(self)) if among is None else among, key=self.length)
        for start in range(0, len(order), size):
            yield order[start : start + size]


def predicted(labels: Tensor) -> int:
    """How many last columns the logits are needed in: from the one before the first counted label.

    The columns before it hold prompts; the head, the widest layer of a small model, is spared them.
    """
    counted = (labels != IGNORED).any(0).nonzero()
    first = int(counted[0]) if len(counted) else labels.shape[1]
    return labels.shape[1] - max(first - 1, 0)


class Completions(Tokens):
    """A split of a language task: prompts, and completions whose tokens are the labels."""

    def _tokenized(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Tensor]:
        pairs = [_pair(example, tokenizer) for example in self.examples]
        self.prompts = [torch.tensor(prompt[:max_tokens]) for prompt, _ in pairs]
        self._starts = [_common(prompt, whole) for prompt, whole in pairs]
        return [torch.tensor(whole[:max_tokens]) for _, whole in pairs]

    def _labels(self, positions: Sequence[int]) -> Tensor:
        labels = [self.texts[position].clone() for position in positions]
        for label, position in zip(labels, positions, strict=True):
            label[: self._starts[position]] = IGNORED
        return pad_sequence(labels, batch_first=True, padding_value=IGNORED)

    def to_complete(self, positions: Sequence[int]) -> Batch:
        """The prompts alone, padded on the left: what a model generates from."""
        prompts = [self.prompts[position] for position in positions]
        return {
            "input_ids": pad_sequence(
                prompts, batch_first=True, padding_value=self.padding, padding_side="left"
            ),
            "attention_mask": pad_sequence(
                [torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left"
            ),
        }


def _common(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens the two begin with in common: where the completion starts."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(prompt))


def _pair(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and of prompt and completion together."""
    completion = example.completion or ""
    if example.turns:
        turns = [{"role": role, "content": content} for role, content in example.turns]
        answer = {"role": "assistant", "content": completion}
        options = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*turns, answer], **options)
        return list(prompt), list(whole)
    end = tokenizer.eos_token or ""
    closed = completion if end and completion.endswith(end) else completion + end
    return (
        list(tokenizer(example.text)["input_ids"]),
        list(tokenizer(example.text + closed)["input_ids"]),
    )
