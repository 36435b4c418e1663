"""Kind: how a pair B [m, r], A [r, n] lies in PEFT's file. A linear layer's are the file's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A linear layer; the other kinds say what differs."""

    name: ClassVar[str] = "linear"
    key_a: ClassVar[str] = "lora_A.weight"
    key_b: ClassVar[str] = "lora_B.weight"
    targeted: ClassVar[bool] = True
    """whether target_modules names the module"""

    @property
    def told(self) -> str:
        """The kind as messages tell it."""
        return f"a layer of kind {self.name}"

    @property
    def place(self) -> int:
        """Where the pair stands among those that share a tensor."""
        return 0

    def module(self, pair: str) -> str:
        """The module whose tensors hold the pair of this name."""
        return pair

    def named(self, pair: str) -> tuple[str, ...]:
        """What rank_pattern and alpha_pattern call it."""
        return (pair,)

    def group(self, pair: str) -> str | None:
        """What pairs of one rank and one scaling have in common; None where each has its own."""
        return None

    def joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The file's tensors (B, A) of the pairs of one module, in the order of their places."""
        return pairs[0]

    def magnitude(self, vector: Tensor) -> Tensor:
        """DoRA's magnitudes [m] in the file's shape."""
        return vector


LINEAR = Kind()
