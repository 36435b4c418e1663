"""Texts, tokenised once and kept as token numbers; batches are padded to their longest text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from integration.tasks import Example


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `attention_mask` are [n, longest] int64, `labels` is [n] int64."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Tokens:
    """A split of the task in the model's tokens, at most `max_tokens` of every text."""

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> None:
        encoded = tokenizer(
            [example.text for example in examples], truncation=True, max_length=max_tokens
        )
        self.texts = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self.labels = torch.tensor([example.label for example in examples])
        self._padding = int(tokenizer.pad_token_id or 0)

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, position: int) -> int:
        """Number of tokens of one text."""
        return len(self.texts[position])

    def batch(self, positions: Sequence[int]) -> Batch:
        """The texts at `positions`, padded to the longest of them."""
        texts = [self.texts[position] for position in positions]
        return Batch(
            pad_sequence(texts, batch_first=True, padding_value=self._padding),
            pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
            self.labels[list(positions)],
        )

    def in_order_of_length(self, size: int) -> Iterator[Batch]:
        """All texts, the shortest first, so that hardly any padding is computed."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])
