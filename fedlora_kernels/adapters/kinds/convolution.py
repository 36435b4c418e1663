"""Convolutions in 1, 2 and 3 dimensions: a pair B [m, r], A [r, n k] with k = prod(kernel).

dW[o, i, :] = s sum_j B[o, j] A[j, i, :]    PEFT: lora_A [r, n, *kernel], lora_B [m, r, 1, ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora_kernels.adapters.kinds.kind import Kind


@dataclass(frozen=True)
class Convolution(Kind):
    """A convolution with a kernel of this size."""

    kernel: tuple[int, ...]

    name: ClassVar[str] = "convolution"

    @property
    def told(self) -> str:
        """See :attr:`Kind.told`."""
        return f"a convolution with the kernel {list(self.kernel)}"

    def joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """See :meth:`Kind.joined`."""
        ((b, a),) = pairs
        ones = [1] * len(self.kernel)
        return b.reshape(*b.shape, *ones), a.reshape(a.shape[0], -1, *self.kernel)

    def magnitude(self, vector: Tensor) -> Tensor:
        """See :meth:`Kind.magnitude`."""
        return vector.reshape(1, -1, *[1] * len(self.kernel))


def read(b: Tensor, a: Tensor) -> tuple[Convolution, Tensor, Tensor]:
    """The kind and the pair of a file's tensors.

    Raises:
        ValueError: these are no tensors of a convolution without groups.
    """
    shapes = f"B {list(b.shape)} and A {list(a.shape)}"
    if a.dim() != b.dim() or any(size != 1 for size in b.shape[2:]):
        raise ValueError(f"found {shapes}, expected [m,r,1,...] and [r,n,*kernel]")
    if b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
        raise ValueError(
            f"found {shapes}, a convolution with {a.shape[0] // b.shape[1]} groups, expected one; "
            "leave it out of target_modules"
        )
    return Convolution(tuple(a.shape[2:])), b.flatten(1), a.flatten(1)
