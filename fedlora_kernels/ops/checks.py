"""What the operators' checks have in common: one sentence per mistake, with what was found."""

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PRECISIONS = ("exact", "fast")
# float32 accumulation cannot tell higher shares of the energy apart.
FAST_ENERGY = 1 - 1e-6


def factor(name: str, tensor: Tensor) -> None:
    """A stack of factors: three dimensions, bf16, fp16, fp32 or fp64."""
    dimensions(name, tensor, 3)
    if tensor.dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"{name} must be bfloat16, float16, float32 or float64, found {tensor.dtype}"
        )


def real(name: str, tensor: Tensor) -> None:
    """Coefficients, weights or scalings: float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, found {tensor.dtype}")


def double(name: str, tensor: Tensor) -> None:
    """What the Gram stages pass on: float64."""
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} must be float64, found {tensor.dtype}")


def dimensions(name: str, tensor: Tensor, count: int) -> None:
    """A tensor with ``count`` dimensions."""
    if tensor.dim() != count:
        raise ValueError(f"{name} must have {count} dimensions, found shape {shape(tensor)}")


def sizes(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """A tensor of exactly the expected shape."""
    if tensor.dim() != len(expected) or any(
        have != want for have, want in zip(tensor.shape, expected, strict=True)
    ):
        raise ValueError(
            f"{name} must have shape {[int(size) for size in expected]}, found {shape(tensor)}"
        )


def equal_sizes(name: str, tensors: Sequence[Tensor]) -> None:
    """Tensors of one shape."""
    expected = tensors[0].shape
    for index, tensor in enumerate(tensors):
        if tensor.shape != expected:
            sizes(f"{name}[{index}]", tensor, expected)


def shape(tensor: Tensor) -> list[int]:
    """A tensor's shape as a message shows it."""
    return [int(size) for size in tensor.shape]


def precision(value: str) -> None:
    """One of the two precisions."""
    if value not in PRECISIONS:
        raise ValueError(f"precision must be 'exact' or 'fast', found {value!r}")


def energy(value: float) -> None:
    """A share of the energy, in (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"energy must lie in (0, 1], found {value}")


def resolvable(energy: float, precision: str) -> None:
    """An energy that the precision of the Gram matrices can tell from 1."""
    if precision == "fast" and energy > FAST_ENERGY:
        raise ValueError(
            f"precision 'fast' cannot resolve energies above {FAST_ENERGY}, found {energy}; "
            "use 'exact'"
        )


def max_rank(value: int | None) -> None:
    """A cap on ranks, at least 1."""
    if value is not None and value < 1:
        raise ValueError(f"max_rank must be at least 1, found {value}")


def ranks(values: Sequence[int], stacked_rank: int) -> None:
    """One rank for each client, which together are the stacked rank."""
    for client, rank in enumerate(values):
        if rank < 0:
            raise ValueError(f"ranks[{client}] must not be negative, found {rank}")
    if sum(values) != stacked_rank:
        raise ValueError(f"ranks must sum to the stacked rank {stacked_rank}, found {sum(values)}")


def pair(b: Tensor, a: Tensor) -> None:
    """Stacked factors of the same modules: b [L,m,R] beside a [L,R,n], one dtype."""
    factor("b", b)
    factor("a", a)
    if b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1]:
        raise ValueError(
            f"b [L,m,R] and a [L,R,n] must agree in L and R, found {shape(b)} and {shape(a)}"
        )
    if b.dtype != a.dtype:
        raise TypeError(f"b and a must have one dtype, found {b.dtype} and {a.dtype}")


def grams(gram_b: Tensor, gram_a: Tensor) -> None:
    """Two float64 Gram matrices [L,R,R] of the same modules."""
    for name, gram in (("gram_b", gram_b), ("gram_a", gram_a)):
        dimensions(name, gram, 3)
        double(name, gram)
        sizes(name, gram, (gram.shape[0], gram.shape[1], gram.shape[1]))
    sizes("gram_a", gram_a, gram_b.shape)


def factor_list(name: str, tensors: Sequence[Tensor], modules: int) -> None:
    """Module-major clients' factors: ``modules`` times the number of clients, all matrices."""
    if modules < 1 or len(tensors) == 0 or len(tensors) % modules:
        raise ValueError(
            f"{name} must hold the same number of clients for each of {modules} modules, "
            f"found {len(tensors)} tensors"
        )
    clients = len(tensors) // modules
    if tensors[0].dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"{name} must be bfloat16, float16, float32 or float64, found {tensors[0].dtype}"
        )
    dtype, shapes = tensors[0].dtype, [tensor.shape for tensor in tensors[:clients]]
    for index, tensor in enumerate(tensors):
        if tensor.dim() != 2:
            raise ValueError(f"{name}[{index}] must be a matrix, found shape {shape(tensor)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}[{index}] must be {dtype}, found {tensor.dtype}")
        if tensor.shape != shapes[index % clients]:
            sizes(f"{name}[{index}]", tensor, shapes[index % clients])


def list_pair(b: Sequence[Tensor], a: Sequence[Tensor], modules: int) -> int:
    """Listed factors of the same clients: b[i] [m,r] beside a[i] [r,n], one dtype.

    Returns:
        The stacked rank R of a module.
    """
    factor_list("b", b, modules)
    factor_list("a", a, modules)
    if len(b) != len(a):
        raise ValueError(f"b and a must be equally long, found {len(b)} and {len(a)} tensors")
    if b[0].dtype != a[0].dtype:
        raise TypeError(f"b and a must have one dtype, found {b[0].dtype} and {a[0].dtype}")
    for index, (left, right) in enumerate(zip(b, a, strict=True)):
        if left.shape[0] != b[0].shape[0] or right.shape[1] != a[0].shape[1]:
            raise ValueError(
                f"b[{index}] and a[{index}] must be factors of a {int(b[0].shape[0])} x "
                f"{int(a[0].shape[1])} update, found {shape(left)} and {shape(right)}"
            )
        if left.shape[1] != right.shape[0]:
            raise ValueError(
                f"b[{index}] [m,r] and a[{index}] [r,n] must agree in r, "
                f"found {shape(left)} and {shape(right)}"
            )
    return sum(tensor.shape[0] for tensor in a[: len(a) // modules])
