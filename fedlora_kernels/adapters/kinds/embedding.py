"""Embeddings: lora_embedding_A [r, n] and lora_embedding_B [m, r]; the weight is (s B A)^T."""

from dataclasses import dataclass
from typing import ClassVar

from fedlora_kernels.adapters.kinds.kind import Kind


@dataclass(frozen=True)
class Embedding(Kind):
    """A pair as a linear layer's, under keys of its own."""

    name: ClassVar[str] = "embedding"
    key_a: ClassVar[str] = "lora_embedding_A"
    key_b: ClassVar[str] = "lora_embedding_B"


EMBEDDING = Embedding()
