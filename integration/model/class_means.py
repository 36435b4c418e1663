"""A classification head that stays as it starts: the class means of the shared split.

The head compares the mean-pooled embedding e(x) with the means mu_c of the classes' embeddings in
the shared split, both of length 1:

    logits_c = logit_scale * <e(x), mu_c>

It is made from the start model and then frozen, so only the adapters move the accuracy. (A fresh
random head does not learn in the few dozen steps of a quick run.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.modeling_outputs import SequenceClassifierOutput


class ClassMeans(nn.Module):
    """An encoder with the head of means on top: token numbers in, logits out."""

    means: Tensor

    def __init__(self, encoder: nn.Module, classes: int, width: int, logit_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = logit_scale
        self.register_buffer("means", torch.zeros(classes, width))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last hidden states over a text's tokens, scaled to length 1: [n, width]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Logits [n, classes], as transformers' models give them."""
        embedded = self.embed(input_ids, attention_mask)
        logits = self.logit_scale * embedded @ self.means.to(embedded).T
        return SequenceClassifierOutput(logits=logits)

    def learn(self, embedded: Tensor, labels: Tensor) -> None:
        """Take the means of these embeddings [n, width] by label [n] as the head."""
        sums = torch.zeros_like(self.means)
        sums.index_add_(0, labels, embedded.to(sums))
        self.means.copy_(normalize(sums, dim=1))
